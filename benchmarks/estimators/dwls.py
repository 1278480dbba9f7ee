"""Dampened weighted least squares, as bulk2sc.py itself uses it, on all training cells."""

from deconvolution.dwls import choose_signature, dwls
from deconvolution.estimators import Estimator


def dwls_of_cells(bulk, statistics, seed=0):
    """:func:`deconvolution.dwls.dwls` in the signature of the training cells."""
    genes = choose_signature(statistics.mean, statistics.change)
    return dwls(bulk[:, genes], statistics.mean[:, genes].T, seed)


ESTIMATORS = [
    Estimator("DWLS", "Tsoucas et al., Nature Communications 2019", dwls_of_cells),
]
