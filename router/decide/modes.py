"""The names of the ways to answer, for whoever checks one: imports nothing.

    route         the kernel that the text belongs to, looked up again every W bytes
    mixture       several kernels at once, their probabilities averaged (mixture.py)
    barycenter    several kernels at once, averaged in the square-root chart
    phi           the mixture, each kernel's weight times its measured integration, renormalised (mixture.py)

and one kernel by its name.
"""

ROUTE, MIXTURE, BARYCENTER, PHI = "route", "mixture", "barycenter", "phi"
MIXED = (MIXTURE, BARYCENTER, PHI)
MODES = (ROUTE, *MIXED)
