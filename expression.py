"""What each cell type expresses in each bulk sample, given the sample's state and its bulk.

The latent holds what the reference's samples taught. What is left between a bulk and the sum that
proportions and states make is allotted to the cell types, gene by gene, and to the platform, which
all bulks of a table share.

Notation in shape comments: S bulk samples, K cell types, G genes.
"""

from dataclasses import dataclass

import numpy as np
import torch

N_DRAWS = 128  # of z, for the expected profile of a type in a sample
# Prior sd of ln expression of a gene between two samples, inside a type; and between two platforms,
# of which the bulks choose one. Full-length RNA-seq differs from 3' counts by 1.5.
SAMPLE_SD, PLATFORM_SDS = 0.3, (0.3, 0.7, 1.5)
N_PRIOR_GENES = 2000  # that the choice is made on
SHARED = 0.8  # correlation of a change between cell types
STATE_ERROR = 0.15  # of what a state changes, by which it may be wrong
FLOOR = 2e-6  # added to fractions of all counts: two counts per million
LIMIT = float(np.log(30))  # of a factor; a NumPy scalar would make float32 wider
GENES_AT_A_TIME = 2000


@dataclass
class Expression:
    """Expected expression of the cell types in the samples of a table of bulks."""

    profiles: np.ndarray
    """Fractions of a cell's counts (S, K, G) float32, rows summing to 1."""
    library: np.ndarray
    """Mean counts of a cell of each type (K)."""
    log_fold_change: np.ndarray
    """Natural log of the change against the type's mean in the reference, without the platform's
    part (S, K, G) float32."""
    sd: np.ndarray
    """Posterior sd of what was allotted to the type, the part of it that is not in the state
    (S, K, G) float32; the prior's where nothing is known, 0 where nothing was allotted."""
    log_factor: torch.Tensor | None
    """What is added to the logarithm of each gene's mean in generated cells, (S, K, G) or (S, G)
    float32; None for nothing."""


@torch.inference_mode()
def type_profiles(decoder, mu, var, n=N_DRAWS):
    """Expected fractions of all counts in cells of each type (S, K, G) float32, a numpy array.

    A mean over n draws of z, the same noise in every sample, so that their differences are
    more precise than their values.

    Args:
        mu, var: moments of z of the types in each sample (S, K, D).
    """
    tilt = decoder.tilt_shape(mu, var)
    if tilt is None and len(mu) > 1:  # no sample has a state of its own
        one = type_profiles(decoder, mu[:1], var[:1], n)
        return np.broadcast_to(one, (len(mu), *one.shape[1:]))
    S, K, _ = mu.shape
    out = np.zeros((S, K, decoder.out.out_features), np.float32)
    unit = torch.ones(n, device=mu.device)  # library sizes, so that means are fractions
    for s in range(S):
        rows = torch.full((n,), s, device=mu.device)
        for k in range(K):
            codes = torch.full_like(rows, k)
            generator = torch.Generator(mu.device).manual_seed(k)
            z = decoder.sample_latent(mu[rows, k], var[rows, k], codes, generator, tilt, rows)
            mean, dropout_logits = decoder(z, unit, decoder.type_log_factor[k])  # (n, G)
            if dropout_logits is not None:
                mean = mean * torch.sigmoid(-dropout_logits)
            out[s, k] = mean.mean(dim=0).cpu().numpy()
    return normalise(out)


def mean_library(decoder):
    """Mean counts of a cell of each type (K,), float64."""
    return decoder.log_library.double().exp().mean(dim=1).cpu().numpy()


def fractions(bulk, measured):
    """Bulks (S, G) over their sums in the measured genes (G), float64; 0 elsewhere."""
    part = np.where(measured, bulk, 0.0).astype(np.float64)
    return part / np.maximum(part.sum(axis=1, keepdims=True), 1e-300)


def sum_types(weight, profiles, P=0.0):
    """What types add up to, each gene times its platform's factor exp(P).

    weight: counts that each type gives (S, K). profiles: (S, K, G). P: (K, G).

    Returns:
        (S, G), and the share of each type in it (S, K, G).
    """
    part = weight[:, :, None] * profiles * np.exp(P)
    total = part.sum(axis=1)
    return total, part / np.maximum(total, 1e-300)[:, None]


def covary(share, moved):
    """How what a sample changes in a type covaries with what it changes in the sum, and the latter.

        C = SAMPLE_SD² (SHARED 1 1ᵀ + (1 - SHARED) I) + STATE_ERROR² m mᵀ,   C w and wᵀ C w

    Changes of a gene correlate between types. Where the state has moved a gene, it may have done so
    too far or not far enough, in all types in proportion; m is by how much.

    Args:
        share: w (S, K, G). moved: m, natural log (S, K, G).

    Returns:
        (S, K, G) and (S, G).
    """
    Cw = SAMPLE_SD**2 * (SHARED * share.sum(axis=1, keepdims=True) + (1 - SHARED) * share)
    Cw = Cw + STATE_ERROR**2 * moved * (moved * share).sum(axis=1, keepdims=True)
    return Cw, (share * Cw).sum(axis=1)


def platform_posterior(ratio, share, v, sd):
    """Posterior mean and covariance of the platform's ln factors, a linear Gaussian model by gene.

        r_s = Σ_k w_sk P_k + e_s,   P ~ N(0, sd² (SHARED 1 1ᵀ + (1 - SHARED) I)),   e_s ~ N(0, v_s)

    Args:
        ratio: r (S, G). share: w (S, K, G). v: (S, G), of counting and of what samples change.

    Returns:
        mean (K, G), covariance (G, K, K), and the log evidence of each gene but for a constant (G),
        by the matrix determinant lemma, so that it costs no more with many bulks.
    """
    K = share.shape[1]
    prior = sd**2 * (SHARED * np.ones((K, K)) + (1 - SHARED) * np.eye(K))
    by_gene = share.transpose(2, 1, 0)  # (G, K, S)
    precision = np.linalg.inv(prior) + (by_gene / v.T[:, None]) @ by_gene.transpose(0, 2, 1)
    covariance = np.linalg.inv(precision)  # (G, K, K)
    score = by_gene @ (ratio / v).T[:, :, None]  # (G, K, 1)
    mean = covariance @ score
    quadratic = (ratio**2 / v).sum(axis=0) - (score * mean).sum(axis=(1, 2))
    log_det = np.log(v).sum(axis=0) + np.linalg.slogdet(precision)[1] + np.linalg.slogdet(prior)[1]
    return mean[:, :, 0].T, covariance, -0.5 * (quadratic + log_det)


def choose_platform_sd(ratio, share, v):
    """Prior sd of the platform by the evidence of all genes together (empirical Bayes).

    ratio, v: (S, G). share: (S, K, G). Of some genes.
    """
    return max(PLATFORM_SDS, key=lambda sd: platform_posterior(ratio, share, v, sd)[2].sum())


def allot(bulk, weight, profiles, measured, platform="keep", moved=None):
    """Allot what is left between bulks and their expected sums to platform and cell types.

        r_sg = ln((p + ε) / (q + ε)) = Σ_k w_skg (P_kg + δ_skg) + e_sg
        E[δ_skg | r] = (C w)_k (r - wᵀ P) / (wᵀ C w + noise)

    with w the share of a gene's counts that each type gives, δ what a sample changes in a type
    beyond its state, P what the platform changes in all samples, and noise that of counting. δ and
    P are Gaussian (:func:`covary`, :func:`platform_posterior`), and the bulks choose the variance
    of P (:func:`choose_platform_sd`). Of several bulks, what they share goes to P. One bulk cannot
    tell P from δ, and the wider of the two takes most of r. The shares depend on P, hence rounds.

    Args:
        bulk: (S, G), any scale; its sum counts as its depth, at least 1e5. weight: counts that each
            type gives to the bulk (S, K). profiles: (S, K, G). measured: mask (G).
        platform: ``none`` if the bulks are of the reference's own platform, else anything.
        moved: natural log of what the state changed in the profiles (S, K, G), default nothing.

    Returns:
        mean of δ and its sd, each (S, K, G) float32, 0 and the prior's in genes not measured; and
        mean of P (K, G) float32.
    """
    S, K, G = profiles.shape
    moved = np.broadcast_to(0.0, profiles.shape) if moved is None else moved
    p = fractions(bulk, measured)
    depth = np.maximum(np.where(measured, bulk, 0).sum(axis=1, keepdims=True), 1e5)
    chunks = [slice(i, min(i + GENES_AT_A_TIME, G)) for i in range(0, G, GENES_AT_A_TIME)]
    P, covariance = np.zeros((K, G)), np.zeros((G, K, K))

    def expect():  # fractions q, ln ratio and noise (S, G) under the platform found so far
        total = [sum_types(weight, profiles[:, :, g], P[:, g])[0] for g in chunks]
        q = fractions(np.concatenate(total, axis=1), measured)
        return q, np.log((p + FLOOR) / (q + FLOOR)), 1 / (q * depth + 0.5)

    q, ratio, noise = expect()
    known = np.flatnonzero(measured & (q.mean(axis=0) > 5 * FLOOR))  # of the others, ε decides
    some = known[:: max(1, len(known) // N_PRIOR_GENES)]
    share = sum_types(weight, profiles[:, :, some])[1]
    v = covary(share, moved[:, :, some])[1] + noise[:, some]
    platform_sd = choose_platform_sd(ratio[:, some], share, v)
    for _ in range(0 if platform == "none" else 4):
        for g in chunks:
            share = sum_types(weight, profiles[:, :, g], P[:, g])[1]
            v = covary(share, moved[:, :, g])[1] + noise[:, g]
            linear = ratio[:, g] + (share * P[:, g]).sum(axis=1)
            P[:, g], covariance[g], _ = platform_posterior(linear, share, v, platform_sd)
        P = np.where(measured, P, 0).clip(-2 * LIMIT, 2 * LIMIT)
        q, ratio, noise = expect()
    delta, sd = np.zeros((S, K, G), np.float32), np.zeros((S, K, G), np.float32)
    for g in chunks:
        share = sum_types(weight, profiles[:, :, g], P[:, g])[1]
        Cw, v = covary(share, moved[:, :, g])
        v = v + noise[:, g]
        unsure = np.einsum("skg,gkj,sjg->sg", share, covariance[g], share, optimize=True)  # of wᵀ P
        delta[:, :, g] = np.where(measured[g], Cw * (ratio[:, g] / v)[:, None], 0)
        known = Cw**2 / v[:, None] - Cw**2 * (unsure / v**2)[:, None]
        prior = SAMPLE_SD**2 + (STATE_ERROR * moved[:, :, g]) ** 2
        sd[:, :, g] = np.sqrt(np.maximum(prior - np.where(measured[g], known, 0), 0))
    return delta.clip(-LIMIT, LIMIT), sd, P.clip(-LIMIT, LIMIT).astype(np.float32)


def calibration(bulk, expected, measured):
    """Logarithm of the factors (S, G) float32 that turn the expected sum into the bulk.

        ln f_g = ln( (p_g + 5e-8) / (q_g + 5e-8) ), kept within ± ln 30; 0 for genes not in the bulk

    p, q: fractions of bulk and expected sum (S, G). A twentieth of a count per million, added to
    both, shrinks the factors of genes with hardly any counts.
    """
    p, q = (np.where(measured, part, 0.0) for part in (bulk, expected))
    p, q = (part / part.sum(axis=1, keepdims=True) + 5e-8 for part in (p, q))
    return np.where(measured, np.clip(np.log(p / q), -LIMIT, LIMIT), 0).astype(np.float32)


def normalise(profiles):
    """Fractions (S, K, G): each profile over its sum, all 0 if that is 0."""
    return profiles / np.maximum(profiles.sum(axis=2, keepdims=True), 1e-12)


def expected_bulk(decoder, encoded, profiles=None, n=N_DRAWS):
    """The sum (S, G), a numpy array, that proportions make of each type's mean counts.

    encoded: mu, var (S, K, D) and pi (S, K) of the bulks. profiles: of :func:`type_profiles`, if
    they are there already; else from n draws of z for a type in a sample.
    """
    mu, var, pi = encoded
    if decoder.tilt_shape(mu, var) is None:  # no sample has a state of its own
        return (pi @ decoder.type_means()).cpu().numpy()
    weight = pi.cpu().double().numpy() * mean_library(decoder)
    profiles = type_profiles(decoder, mu, var, n) if profiles is None else profiles
    return sum_types(weight, profiles)[0]


def estimate_expression(
    decoder, encoded, bulk, measured, calibrate="types", platform="keep", profiles=None
):
    """Expected expression of each type in each sample, and what generated cells take of it.

    Args:
        encoded: mu, var (S, K, D) and pi (S, K) of the bulks, tensors. bulk: (S, G) in the
            decoder's genes. measured: mask (G).
        calibrate: ``none``: states alone; ``uniform``: one factor per gene for all types, so that
            the cells of a sample add up to its bulk; ``types``: :func:`allot`.
        platform: ``keep``: what all bulks share is the platform's, and cells show it as the bulks
            do; ``remove``: cells are as the reference's platform would measure them; ``none``:
            there is none, and what the bulks share is the samples'.
        profiles: of :func:`type_profiles`, if they are there already.

    Returns:
        Expression.
    """
    mu, var, pi = encoded
    library = mean_library(decoder)
    start = type_profiles(decoder, mu, var) if profiles is None else profiles  # (S, K, G)
    reference = type_profiles(decoder, decoder.mu[None], decoder.var[None])  # (1, K, G)
    weight = pi.cpu().double().numpy() * library
    shape, log_factor = start.shape, None
    delta, sd = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    P = np.float32(0)
    if calibrate == "uniform":
        factor = calibration(bulk, expected_bulk(decoder, encoded, start), measured)
        log_factor, delta = torch.from_numpy(factor).to(mu.device), delta + factor[:, None]
    elif calibrate == "types":
        moved = np.log((start + FLOOR) / (reference + FLOOR))
        delta, sd, P = allot(bulk, weight, start, measured, platform, moved)
        P = P if platform == "keep" else np.float32(0)
        log_factor = torch.from_numpy(delta + P).to(mu.device)
    change = np.log((normalise(start * np.exp(delta)) + 1e-9) / (reference + 1e-9))
    profiles = normalise(start * np.exp(delta + P))
    return Expression(profiles, library, change, sd, log_factor)


def expression_table(samples, proportions, expression, card):
    """AnnData of the expected expression: a row for each cell type of each sample.

    Args:
        samples: names (S). proportions: (S, K). expression: Expression. card: of the decoder, with
            ``genes``, ``gene_ids`` and ``cell_types``.

    Returns:
        AnnData (S K x G), float32. X: expected counts of one cell. Layers: ``log2_fold_change``
        against the type's mean in the reference, without the platform's part, and
        ``log2_fold_change_sd``. obs: sample, cell_type, proportion.
    """
    import anndata
    import pandas as pd

    S, K, G = expression.profiles.shape
    obs = pd.DataFrame(
        {
            "sample": np.repeat(np.array(samples, dtype=object), K),
            "cell_type": np.tile(np.array(card["cell_types"], dtype=object), S),
            "proportion": np.ravel(proportions),
        },
        index=[f"{sample} | {name}" for sample in samples for name in card["cell_types"]],
    )
    var = pd.DataFrame(index=card["genes"])
    if "gene_ids" in card:
        var["gene_ids"] = card["gene_ids"]
    counts = expression.profiles * expression.library[:, None].astype(np.float32)
    table = anndata.AnnData(counts.reshape(S * K, G), obs=obs, var=var)
    for name, values in (("", expression.log_fold_change), ("_sd", expression.sd)):
        values = (values / np.float32(np.log(2))).reshape(S * K, G)
        table.layers[f"log2_fold_change{name}"] = values.astype(np.float32)
    return table
