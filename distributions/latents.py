"""The shape of a cell type's cloud in the latent space: a mixture of diagonal Gaussians.

    z = μ_k + σ_k e,   e ~ Σ_c w_kc N(m_kc, diag s_kc²),   E[e] = 0,   Var[e] = 1

A rarer kind of cell inside a type skews its distribution, which one Gaussian cannot follow. Mean
and variance of z remain μ_k and σ_k² whatever the shape.

Notation in shape comments: N cells, n cells of one type, S bulk samples, K cell types, C parts of a
cloud, D latent dimensions.
"""

import torch

MAX_CELLS = 20_000  # that the shape of a type is fitted to; a random sample if it has more
MIN_PARTS = 3  # of a group of cells, whatever the number of groups
BORROWED = 3  # cells of the type's variance that a part of one group of several borrows


def parts_of_group(n_parts, n_groups):
    """Most parts that each group of a type's cells gets, so that all together have ``n_parts``."""
    return max(min(MIN_PARTS, n_parts), -(-n_parts // n_groups))


def fit_shapes(e, spread, codes, n_parts, seed, group):
    """Yields each type's code and its shape (:func:`fit_shape`), of types with two cells or more.

    The posterior of a single cell is N(μ_k, σ_k²) already.

    Args:
        e, spread, group: as of :func:`fit_shape`, of all cells (N, D), (N). codes: types (N).
    """
    generator = torch.Generator().manual_seed(seed)
    for k in codes.unique().tolist():
        cells = torch.nonzero(codes == k).flatten()
        if len(cells) > MAX_CELLS:
            cells = cells[torch.randperm(len(cells), generator=generator)[:MAX_CELLS]]
        if len(cells) > 1:
            yield k, fit_shape(e[cells], spread[cells], n_parts, seed, group[cells])


def fit_shape(e, spread, n_parts, seed, group):
    """The parts of one type's cloud, by EM on the posterior means of each group of its cells.

    Cells of different batches or conditions share no part, so that a sample's weights of the parts
    tell its state. The mean posterior variance is added to s², so that e is distributed as all
    posteriors together. A group with fewer than 6 cells per part gets fewer parts.

    Args:
        e: posterior means in standard deviations from the type's (n, D). spread: posterior
            variances in the type's (n, D). n_parts: of a group, at most. seed: of EM's start.
            group: of each cell (n).

    Returns:
        ``(weight, mean, sd, owner)``: w (C), m and s (C, D), float64, and the group of each part.
    """
    groups = group.unique()
    parts = []
    for g in groups:
        own = group == g
        weight, m, s2 = fit_parts(e[own].double(), n_parts, seed)
        n = own.sum()
        if len(groups) > 1:
            s2 = (n * s2 + BORROWED) / (n + BORROWED)
        noise = spread[own].double().mean(dim=0)  # (D)
        parts.append((weight * (n / len(e)), m, s2 + noise, g.expand(len(m))))
    weight, m, s2, owner = (torch.cat(part) for part in zip(*parts, strict=True))
    center = weight @ m  # (D)
    scale = (weight @ (s2 + (m - center) ** 2)).sqrt()  # (D)
    return weight, (m - center) / scale, s2.sqrt() / scale, owner


def fit_parts(e, n_parts, seed):
    """Weights (C), means and variances (C, D) of a mixture of diagonal Gaussians, of e (n, D)."""
    from sklearn.mixture import GaussianMixture

    if len(e) == 1:
        return torch.ones(1, dtype=e.dtype), e, torch.ones_like(e)
    n = max(1, min(n_parts, len(e) // 6))
    # The floor of 0.02 σ² keeps parts from collapsing onto single cells.
    fit = GaussianMixture(n, covariance_type="diag", reg_covar=0.02, n_init=3)
    fit.set_params(random_state=seed).fit(e.numpy())
    return tuple(torch.as_tensor(v) for v in (fit.weights_, fit.means_, fit.covariances_))
