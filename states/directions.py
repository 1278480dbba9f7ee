"""How the state of a sample shows in its bulk: directions learned from a reference of many samples.

Two samples with the same proportions differ inside their cell types. In the latent the difference
is that of their moments (:mod:`states.moments`); in a bulk it is how far genes lie off what the
proportions explain. A ridge regression of one on the other, of low rank, is what the Bulk Encoder
starts from (:class:`models.BulkEncoder`).

Notation in shape comments: n bulks, G genes, K cell types, D latent dimensions, R directions.
"""

from dataclasses import dataclass

import numpy as np
import torch

PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0)  # of the ridge, for each bulk
LEAST_STATE = 1e-3  # of μ between bulks, in σ_k (root mean square), below which it is rounding
EXPLAINED = 0.99  # of the variance of the predicted moments that the directions keep
MOST_DIRECTIONS = 16
N_GROUPS = 5  # of donors, for the cross-validation that chooses the penalty


@dataclass
class States:
    """What :func:`fit_states` learns; the buffers ``state_...`` of the Bulk Encoder."""

    center: np.ndarray
    """(G)."""
    weight: np.ndarray
    """Aᵀ (G, R)."""
    share: np.ndarray
    """Of each gene in t where all are measured (G, R); columns sum to 1."""
    mu: np.ndarray
    """M, in units of σ_k (R, K, D)."""
    log_var: np.ndarray
    """V (R, K, D)."""

    def copy_to(self, model):
        """Set a Bulk Encoder's buffers."""
        for name, value in vars(self).items():
            getattr(model, f"state_{name}").copy_(torch.from_numpy(value).float())


def fit_states(ratio, mu, log_var, groups):
    """Learn how moments follow from a bulk's log-ratios: a ridge regression of reduced rank.

        min over W of  ‖F W + Ȳ - Y‖² + λ n ‖W‖²,   F W = U Σ Vᵀ,   t = A F, A = W V / sd(t)

    with F the centred log-ratios and Y the targets. λ is chosen by cross-validation over donors,
    as a new bulk will be of one that training has not seen. Where no λ beats the constant answer
    there is nothing to learn.

    Args:
        ratio: of bulks, see :meth:`models.BulkEncoder.ratio_to` (n, G).
        mu: what the moments of the bulks' cells differ from the types' by, in units of σ_k
            (n, K, D). log_var: difference of ln σ² (n, K, D).
        groups: of donors that each bulk comes from (n); -1 if from several.

    Returns:
        States, or None; and the share of the squared error of mu that is left in cross-validation.
    """
    n, (K, D) = len(ratio), mu.shape[1:]
    center = ratio.mean(axis=0)
    F, Y = ratio - center, np.concatenate([mu, log_var], axis=1).reshape(n, -1)  # (n, 2 K D)
    penalty, left = choose_penalty(F, Y, groups, n_mu=K * D)
    if penalty is None:
        return None, left
    mean = Y.mean(axis=0)
    W = ridge(F, Y - mean, penalty)  # (G, 2 K D)
    _, size, Vt = np.linalg.svd(F @ W, full_matrices=False)
    explained = np.cumsum(size**2) / (size**2).sum()
    R = min(int((explained < EXPLAINED).sum()) + 1, MOST_DIRECTIONS)
    A, V = W @ Vt[:R].T, Vt[:R]  # (G, R), (R, 2 K D)
    t = F @ A  # (n, R)
    A, V = A / t.std(axis=0), V * t.std(axis=0)[:, None]
    t = F @ A
    share = A * (F.T @ t) / (t**2).sum(axis=0)  # columns sum to 1, as Σ_g A_gr F_g = t_r
    # Where t is 0 the answer is to be the type's moments, which need not be the samples' mean.
    at_mean = np.linalg.lstsq(V.T, mean, rcond=None)[0]  # (R)
    center = center - np.linalg.lstsq(A.T, at_mean, rcond=None)[0]
    V = V.reshape(R, 2, K, D)
    return States(center, A, share, V[:, 0], V[:, 1]), left


def ridge(F, Y, penalty):
    """Weights (G, m) of the ridge regression of Y (n, m) on F (n, G), penalty for each row."""
    gram = F.T @ F
    gram[np.diag_indices_from(gram)] += penalty * len(F)
    return np.linalg.solve(gram, F.T @ Y)


def choose_penalty(F, Y, groups, n_mu):
    """The penalty of least squared error on donors left out, and its share of the constant's.

    Args:
        F: (n, G). Y: (n, m), of which the first n_mu count. groups: of donors (n), -1 for several.

    Returns:
        ``(penalty, share)``; penalty None if none is better than the constant answer, and share
        nan if there are fewer than two groups to compare.
    """
    names = np.unique(groups[groups >= 0])
    if len(names) < 2:
        return None, np.nan
    if np.mean(Y[:, :n_mu] ** 2) < LEAST_STATE**2:  # all samples' moments are the types'
        return None, 1.0
    error, constant = np.zeros(len(PENALTIES)), 0.0
    for group in names:
        test = groups == group
        train = (groups >= 0) & ~test
        center = F[train].mean(axis=0)
        # One eigendecomposition serves all penalties.
        value, vector = np.linalg.eigh((F[train] - center) @ (F[train] - center).T)  # (n', n')
        value = np.maximum(value, 0)
        mean = Y[train, :n_mu].mean(axis=0)
        rotated = vector.T @ (Y[train, :n_mu] - mean)
        kernel = (F[test] - center) @ (F[train] - center).T @ vector
        for i, penalty in enumerate(PENALTIES):
            predicted = kernel @ (rotated / (value + penalty * train.sum())[:, None]) + mean
            error[i] += ((predicted - Y[test, :n_mu]) ** 2).sum()
        constant += (Y[test, :n_mu] ** 2).sum()
    best = error.argmin()
    share = float(error[best] / max(constant, 1e-12))
    return (PENALTIES[best] if share < 1 else None), share


def group_bulks(share, donor, rng):
    """Group of donors that each bulk comes from (n), -1 if from several; N_GROUPS at most.

    share: of the samples in each bulk (n, S). donor: code of each sample's donor (S).
    """
    used = share.any(axis=0)  # not those that are held out
    names, donor_used = np.unique(donor[used], return_inverse=True)
    group = np.full(len(donor), -1)  # (S)
    group[used] = (rng.permutation(len(names)) % N_GROUPS)[donor_used]
    first = group[share.argmax(axis=1)]  # (n)
    return np.where(((share > 0) & (group != first[:, None])).any(axis=1), -1, first)
