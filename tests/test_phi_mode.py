"""mode=phi: the posterior times the kernels' integration is one more mixture, and with equal ones none at all."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from constellation.errors import ArtifactError, ConfigError
from constellation.storage.atomic import write_json
from router.decide.evaluate import Scores, answers
from router.decide.fisher_rao import INTEGRATION, FisherRaoRouter
from router.decide.mixture import combine, judged, weights
from router.decide.modes import MIXTURE, PHI
from router.decide.policy import Trajectory
from tests.test_certificate import ROUTER


def posterior(values: list[float]) -> np.ndarray:
    p = np.array(values) + 1e-3
    return p / p.sum()


@given(st.lists(st.floats(0, 1), min_size=3, max_size=3), st.floats(0.01, 1))
def test_equal_integration_changes_no_weight(values: list[float], phi: float) -> None:
    p = posterior(values)
    np.testing.assert_allclose(judged(PHI, p, np.full(3, phi)), p, rtol=1e-12)


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_weights_are_the_product_renormalised(values: list[float], phi: list[float]) -> None:
    p, phi_K = posterior(values), np.array(phi) + 1e-3
    found = judged(PHI, p, phi_K)
    np.testing.assert_allclose(found, p * phi_K / (p @ phi_K))
    assert sum(w for _, w in weights("abcd", found, 2)) == pytest.approx(1)


def test_other_modes_do_not_look_at_it_and_phi_needs_it() -> None:
    p = posterior([1, 2])
    assert judged(MIXTURE, p, None) is p
    for missing in (None, np.zeros(2)):
        with pytest.raises(ConfigError, match=r"mode='phi' needs the kernels' phi.*constellation report RUN"):
            judged(PHI, p, missing)


def test_probabilities_are_averaged_as_in_a_mixture() -> None:
    log_p = np.log(np.random.default_rng(0).dirichlet(np.ones(5), (2, 3)))
    np.testing.assert_array_equal(combine(PHI, log_p, [0.3, 0.7]), combine(MIXTURE, log_p, [0.3, 0.7]))


def test_it_is_evaluated_beside_the_mixture() -> None:
    generator = np.random.default_rng(0)
    n, names = 40, ("a", "b", "c")
    scores = Scores(
        names, generator.exponential(size=n).astype(np.float32), generator.exponential(size=(3, n)).astype(np.float32),
        np.zeros(n, np.int64), np.arange(n) * 4, np.array([4 * n]), (None,),
    )  # fmt: skip
    looks = np.array([16, 64, 128])
    trajectory = Trajectory(
        looks, generator.dirichlet(np.ones(3), 3).astype(np.float32), np.zeros(3, np.float32), np.zeros(3, bool)
    )
    assert "phi_3" not in answers(scores, [trajectory], 0.1)
    same = answers(scores, [trajectory], 0.1, integration_K=np.full(3, 0.5))
    np.testing.assert_allclose(same["phi_3"], same["mixture_3"], rtol=1e-9)
    other = answers(scores, [trajectory], 0.1, integration_K=np.array([0.9, 0.1, 0.1]))
    assert not np.allclose(other["phi_3"], other["mixture_3"])


def test_a_router_reads_what_was_measured_beside_it_and_keeps_its_hash(tmp_path: Path) -> None:
    plain = dataclasses.replace(ROUTER, integration=None)
    plain.save(tmp_path)
    assert FisherRaoRouter.load(tmp_path).integration is None
    phis = {name: 0.1 * (i + 1) for i, name in enumerate(plain.names)}
    write_json(tmp_path / INTEGRATION, {"phi": phis})
    again = FisherRaoRouter.load(tmp_path)
    assert again.integration is not None and again.integration.tolist() == list(phis.values())
    assert again.hash == plain.hash
    write_json(tmp_path / INTEGRATION, {"phi": {"nobody": 0.5}})
    with pytest.raises(ArtifactError, match=r"integration.json is of other kernels"):
        FisherRaoRouter.load(tmp_path)
