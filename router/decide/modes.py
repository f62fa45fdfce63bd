"""The names of the ways to answer, for whoever checks one: imports nothing.

    route         the kernel that the text belongs to, looked up again every W bytes
    mixture       several kernels at once, their probabilities averaged (mixture.py)
    barycenter    several kernels at once, averaged in the square-root chart

and one kernel by its name.
"""

ROUTE, MIXTURE, BARYCENTER = "route", "mixture", "barycenter"
MIXED = (MIXTURE, BARYCENTER)
MODES = (ROUTE, *MIXED)
