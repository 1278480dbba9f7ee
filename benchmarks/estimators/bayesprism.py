"""BayesPrism: shares of counts by the fixed point of its Gibbs sampler."""

import numpy as np

from deconvolution.dwls import to_proportions
from deconvolution.estimators import Estimator


def bayesprism_fixed_point(x, phi, n_iterations=100):
    """θ (S, M): shares of the counts of bulks that come from each of M cell states.

    The fixed point of BayesPrism's Gibbs sampler (Chu et al., Nature Cancer 2022), as InstaPrism
    computes it (Hu and Chikina, Bioinformatics 2024), without the optional update of the reference:

        Z_smg = x_sg θ_sm φ_mg / Σ_m' θ_sm' φ_m'g,   θ_sm ∝ Σ_g Z_smg

    x: counts or CPM (S, G). phi: shares of genes in the counts of a state (M, G), rows summing to
    1, none of them 0.
    """
    theta = np.full((len(x), len(phi)), 1 / len(phi))
    for _ in range(n_iterations):
        theta = theta * ((x / np.maximum(theta @ phi, 1e-300)) @ phi.T)
        theta /= np.maximum(theta.sum(axis=1, keepdims=True), 1e-300)
    return theta


def positive_shares(states):
    """Counts of states (M, G) as shares; BayesPrism's pseudo.min, 1e-8, stands for 0."""
    phi = np.maximum(states / np.maximum(states.sum(axis=1, keepdims=True), 1e-300), 1e-8)
    return phi / phi.sum(axis=1, keepdims=True)


def bayesprism(bulk, statistics):
    """θ of :func:`bayesprism_fixed_point`, one state per type, without PROTOCOL_GENES.

    θ are fractions of RNA; they are divided by the library sizes of the types, as BayesPrism's
    authors advise for numbers of cells.
    """
    genes = ~statistics.is_protocol if not statistics.is_protocol.all() else statistics.is_protocol
    phi = positive_shares(statistics.mean[:, genes])
    theta = bayesprism_fixed_point(bulk[:, genes].astype(float), phi)
    return to_proportions(theta / statistics.mean[:, genes].sum(axis=1))


ESTIMATORS = [
    Estimator(
        "BayesPrism",
        "Chu et al., Nature Cancer 2022",
        lambda bulk, statistics, seed: bayesprism(bulk, statistics),
    ),
]
