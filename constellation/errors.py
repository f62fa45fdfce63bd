"""What can go wrong, drawn as a tree.

    ConstellationError
    |-- ConfigError       the request is impossible: a value, a name or a combination   (exit 2, HTTP 400)
    |-- DataError         the corpus cannot be used: nothing readable in it             (exit 2, HTTP 400)
    |-- ArtifactError     a saved file is damaged, foreign or of another schema         (exit 2, HTTP 409)
    |-- PlacementError    the constellation does not fit the cluster                    (exit 2, HTTP 503)
    `-- RunError          the work itself failed: diverged, died too often, disk full   (exit 1, HTTP 500)

Every message is one line that names the value and the way out. Outcomes that are not errors
(a solver that did not converge, a router that abstained) are data, never exceptions.
"""


class ConstellationError(Exception):
    """Base of all errors meant for a user; anything else is a bug in constellation."""

    exit_code = 2
    http_status = 400


class ConfigError(ConstellationError, ValueError):
    """The request is impossible: an unknown name, a value out of range, an excluded combination."""


class DataError(ConstellationError):
    """The corpus cannot be used."""


class ArtifactError(ConstellationError):
    """A saved file is damaged, foreign or of another schema version."""

    http_status = 409


class PlacementError(ConstellationError):
    """The constellation needs more than the cluster has."""

    http_status = 503


class RunError(ConstellationError):
    """The work itself failed."""

    exit_code = 1
    http_status = 500
