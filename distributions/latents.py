"""The shape of a cell type's cloud in the latent space: a mixture of diagonal Gaussians.

    z = μ_k + σ_k e,   e ~ Σ_c w_kc N(m_kc, diag s_kc²),   E[e] = 0,   Var[e] = 1

A rarer kind of cell inside a type skews its distribution, which one Gaussian cannot follow. Mean
and variance of z remain μ_k and σ_k² whatever the shape.

Notation in shape comments: N cells, n cells of one type, S bulk samples, K cell types, C parts of a
cloud, D latent dimensions.
"""

import torch

MAX_CELLS = 20_000  # that the shape of a type is fitted to; a random sample if it has more
TILT_PENALTY = 0.1  # keeps the parts of a cloud from going to 0 for a mean that none of them has


def fit_shapes(e, spread, codes, n_parts, seed):
    """Yields each type's code and its shape (:func:`fit_shape`), of types with two cells or more.

    The posterior of a single cell is N(μ_k, σ_k²) already.

    Args:
        e, spread: as of :func:`fit_shape`, of all cells (N, D). codes: their types (N).
    """
    generator = torch.Generator().manual_seed(seed)
    for k in codes.unique().tolist():
        cells = torch.nonzero(codes == k).flatten()
        if len(cells) > MAX_CELLS:
            cells = cells[torch.randperm(len(cells), generator=generator)[:MAX_CELLS]]
        if len(cells) > 1:
            yield k, fit_shape(e[cells], spread[cells], n_parts, seed)


def fit_shape(e, spread, n_parts, seed):
    """The parts of one type's cloud, by EM on the posterior means of its cells.

    The mean posterior variance is added to s², so that e is distributed as all posteriors together.
    A type with fewer than 6 cells per part gets fewer parts.

    Args:
        e: posterior means in standard deviations from the type's (n, D). spread: posterior
            variances in the type's (n, D). n_parts: at most so many. seed: of EM's start.

    Returns:
        ``(weight, mean, sd)``: w (C), m and s (C, D), float64.
    """
    from sklearn.mixture import GaussianMixture

    e, noise = e.double(), spread.double().mean(dim=0)  # (n, D), (D)
    n = max(1, min(n_parts, len(e) // 6))
    # The floor of 0.02 σ² keeps parts from collapsing onto single cells.
    fit = GaussianMixture(n, covariance_type="diag", reg_covar=0.02, n_init=3)
    fit.set_params(random_state=seed).fit(e.numpy())
    weight, m, s2 = (torch.as_tensor(v) for v in (fit.weights_, fit.means_, fit.covariances_))
    s2 = s2 + noise
    center = weight @ m  # (D)
    scale = (weight @ (s2 + (m - center) ** 2)).sqrt()  # (D)
    return weight, (m - center) / scale, s2.sqrt() / scale


def tilt(target, weight, mean, sd):
    """The parts' weights nearest to a type's own that give its cloud another mean.

        w'_c ∝ w_c exp(λᵀ m_c),   max over λ of  λᵀ t - ln Σ_c w_c exp(λᵀ m_c) - TILT_PENALTY/2 ‖λ‖²

    by Newton's method (exponential tilting; Efron, The Annals of Statistics 1981).

    Args:
        target: t, the means asked for in each sample, (μ̂ - μ_k) / σ_k (S, K, D). weight, mean, sd:
            of the parts, (K, C), (K, C, D) and (K, C, D).

    Returns:
        ``(weight, center, scale)``: w' (S, K, C), and mean and sd of the parts so weighted
        (S, K, D).
    """
    dtype, target, m = target.dtype, target.double(), mean.double()
    log_weight = weight.double().log()
    penalty = TILT_PENALTY * torch.eye(m.shape[2], dtype=m.dtype, device=m.device)
    slope = torch.zeros_like(target)  # λ
    for _ in range(20):
        w = (log_weight + torch.einsum("skd,kcd->skc", slope, m)).softmax(dim=2)
        center = torch.einsum("skc,kcd->skd", w, m)
        off = m - center[:, :, None]  # (S, K, C, D)
        hessian = torch.einsum("skc,skcd,skce->skde", w, off, off) + penalty
        step = torch.linalg.solve(hessian, target - center - TILT_PENALTY * slope)
        slope = slope + step.clamp(-2, 2)
    w = (log_weight + torch.einsum("skd,kcd->skc", slope, m)).softmax(dim=2)
    center = torch.einsum("skc,kcd->skd", w, m)
    square = torch.einsum("skc,kcd->skd", w, m**2 + sd.double() ** 2)
    scale = (square - center**2).clamp(min=1e-6).sqrt()
    return tuple(part.to(dtype) for part in (w, center, scale))
