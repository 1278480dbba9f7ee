"""dtangle: a log-linear estimator from marker genes."""

import numpy as np

from deconvolution.dwls import to_proportions
from deconvolution.estimators import Estimator

GAMMA = 0.943  # of RNA-seq, as the package has it
SHARE = 0.1  # of the markers of each type


def dtangle(bulk, statistics):
    """Log-linear estimator from marker genes (dtangle: Hunt et al., Bioinformatics 2019).

        π_k ∝ 2^( mean over markers g of k of (y_g - η_kg) / γ ),   γ = 0.943

    with y and η log2(CPM + 1) of the bulk and of the type's cells. A gene is a marker of the type
    that it is highest in; the tenth of them with the highest ratio to the sum of all other types
    counts. γ and this tenth are the package's. π are fractions of RNA; they are divided by the
    library sizes of the types.
    """
    y, eta = (np.log2(X * 1e6 / X.sum(axis=1, keepdims=True) + 1) for X in (bulk, statistics.mean))
    linear = 2**eta
    ratio = linear / np.maximum(linear.sum(axis=0) - linear, 1e-300)  # (K, G)
    is_top = ratio == ratio.max(axis=0)
    is_top &= is_top.sum(axis=0) == 1  # without ties
    weights = np.zeros((len(bulk), len(eta)))
    for k, top in enumerate(is_top):
        genes = np.flatnonzero(top)
        genes = genes[np.argsort(-ratio[k, genes], kind="stable")]
        genes = genes[: max(int(SHARE * len(genes)), 1)]
        if len(genes):
            weights[:, k] = 2 ** ((y[:, genes] - eta[k, genes]).mean(axis=1) / GAMMA)
    return to_proportions(weights / statistics.mean.sum(axis=1))


ESTIMATORS = [
    Estimator(
        "dtangle",
        "Hunt et al., Bioinformatics 2019",
        lambda bulk, statistics, seed: dtangle(bulk, statistics),
    ),
]
