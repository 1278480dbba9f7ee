"""What each cell type expresses in each bulk sample, given the sample's state and its bulk.

The latent holds what the reference's samples taught. What is left between a bulk and the sum that
proportions and states make is allotted to the cell types, gene by gene, and to the platform, which
all bulks of a table share.

Notation in shape comments: S bulk samples, K cell types, G genes.
"""

from dataclasses import dataclass

import numpy as np
import torch

from runtime.progress import progress
from states.reading import LIMIT, normalise

N_DRAWS = 384  # of z, for the profiles of the parts of a type's cloud
# Prior sd of ln expression of a gene between two samples, inside a type; and between two platforms,
# of which the bulks choose one. Full-length RNA-seq differs from 3' counts by 1.5.
SAMPLE_SD, PLATFORM_SDS = 0.5, (0.3, 0.7, 1.5)
N_PRIOR_GENES = 2000  # that the choice is made on
# Bulks that the platform is read from, a random choice of more. Of 500 bulks, all of them in place
# of 200 moved what differs between samples by a tenth.
N_PLATFORM_BULKS = 200
SHARED = 0.8  # correlation of a change between cell types
STATE_ERROR = 0.15  # of what a state changes, by which it may be wrong
FLOOR = 2e-6  # added to fractions of all counts: two counts per million
GENES_AT_A_TIME = 500
SAMPLES_AT_A_TIME = 32


def parts_of(n, size=None):
    """Slices of at most ``size`` of n samples (default SAMPLES_AT_A_TIME), in order."""
    size = size or SAMPLES_AT_A_TIME
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


# ----------------------------------------------------------------------- what states make of types


class SampleProfiles:
    """Expected fractions of all counts in cells of each type in each sample (S, K, G).

    They are made for some samples at a time: ``profiles[rows]`` is a numpy array (s, K, G) float32.
    They are the baseline's and the states', as the sample has them (:mod:`states.reading`); of a
    reference of one sample the same for all.

    Attributes:
        shape: (S, K, G). reference: the profiles of no state (1, K, G).
    """

    def __init__(self, model, n_samples, share=None):
        """Args:
        model: generation.Model. share: of the states of the reference's samples in each bulk
            (S, samples); None without states.
        """
        self.states, self.share = model.states, share
        if share is None:
            own = type_profiles(model.decoder)
        else:
            own = self.states.baseline.astype(np.float32)
        self.reference = own[None]
        self.shape = (n_samples, *own.shape)

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        if self.share is None:
            n = len(range(*rows.indices(len(self)))) if isinstance(rows, slice) else len(rows)
            return np.broadcast_to(self.reference, (n, *self.shape[1:]))
        return self.states.profiles(self.share[rows], self.states.moved)

    def log_factor(self, rows, profiles):
        """What cells drawn from the states' parts lack to these profiles, ln (s, K, G) float32.

        A state's cells are of its own batch, and its profile is as the baseline's batches are. None
        without states.
        """
        if self.share is None:
            return None
        drawn = self.states.profiles(self.share[rows], self.states.own)
        return np.log((profiles + FLOOR) / (drawn + FLOOR))


def type_profiles(decoder):
    """Expected fractions of all counts in cells of each type (K, G) float32, numpy."""
    own = torch.einsum("kc,kcg->kg", decoder.shape_weight, part_profiles(decoder))
    return normalise(own.cpu().numpy())


@torch.inference_mode()
def part_profiles(decoder):
    """Expected fractions of all counts in each part of the types' clouds (K, C, G), a tensor.

    Means over draws of z that fill space evenly (Sobol), as many for each type.
    """
    (K, C, D), device = decoder.shape_mean.shape, decoder.mu.device
    profiles = torch.zeros(K, C, decoder.out.out_features, device=device)
    for k in range(K):
        in_use = torch.nonzero(decoder.shape_weight[k]).flatten()
        e = even_draws(max(N_DRAWS // max(len(in_use), 1), 1), D).to(device)  # (n, D)
        for c in in_use:
            e_of_part = decoder.shape_mean[k, c] + decoder.shape_sd[k, c] * e
            z = decoder.mu[k] + decoder.var[k].sqrt() * e_of_part
            profiles[k, c] = mean_fractions(decoder, k, z).mean(dim=0)
    return profiles


def even_draws(n, D):
    """n draws (n, D) from the standard normal that fill space evenly, of mean 0 and variance 1."""
    u = torch.quasirandom.SobolEngine(D, scramble=True, seed=0).draw(n, dtype=torch.float64)
    e = torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))
    e = e - e.mean(dim=0)
    return (e / e.std(dim=0, unbiased=False).clamp(min=1e-6)).float() if n > 1 else e.float()


def mean_fractions(decoder, k, z):
    """Expected fractions of all counts in cells of type k at positions z: (n, D) -> (n, G)."""
    unit = torch.ones(len(z), device=z.device)  # library sizes, so that means are fractions
    mean, dropout_logits = decoder(z, unit, decoder.type_log_factor[k])
    return mean if dropout_logits is None else mean * torch.sigmoid(-dropout_logits)


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


class Allotment:
    """What is left between bulks and their expected sums, allotted to platform and cell types.

        r_sg = ln((p + ε) / (q + ε)) = Σ_k w_skg (P_kg + δ_skg) + e_sg
        E[δ_skg | r] = (C w)_k (r - wᵀ P) / (wᵀ C w + noise)

    with w the share of a gene's counts that each type gives, δ what a sample changes in a type
    beyond its state, P what the platform changes in all samples, and noise that of counting. δ and
    P are Gaussian (:func:`covary`, :func:`platform_posterior`), and the bulks choose the variance
    of P (:func:`choose_platform_sd`). Of several bulks, what they share goes to P. One bulk cannot
    tell P from δ, and the wider of the two takes most of r. The shares depend on P, hence rounds.

    P is found first, from at most N_PLATFORM_BULKS of the bulks; then δ of any of them
    (:meth:`changes`), so that not all have to be in memory.

    Attributes:
        P: mean of P (K, G). covariance: of P (G, K, K).
    """

    def __init__(self, bulk, weight, profiles, measured, platform="keep", reference=None):
        """Args:
        bulk: (S, G), any scale; its sum counts as its depth, at least 1e5. weight: counts that each
            type gives to the bulk (S, K). profiles: SampleProfiles or an array (S, K, G). measured:
            mask (G). platform: ``none`` if the bulks are of the reference's own platform, else
            anything. reference: what the states have moved the profiles from (1, K, G), default
            nothing.
        """
        self.bulk, self.weight, self.profiles = bulk, weight, profiles
        self.measured, self.reference = measured, reference
        _, K, G = profiles.shape
        self.genes = parts_of(G, GENES_AT_A_TIME)
        self.P, self.covariance = np.zeros((K, G)), np.zeros((G, K, K))
        if platform != "none" and len(bulk):
            self.find_platform()

    def expect(self, rows, profiles):
        """ln ratio and noise (s, G) of some bulks, and their q, under the platform found so far."""
        bulk, weight = np.where(self.measured, self.bulk[rows], 0.0), self.weight[rows]
        depth = np.maximum(bulk.sum(axis=1, keepdims=True), 1e5)
        p = fractions(bulk, self.measured)
        total = [sum_types(weight, profiles[:, :, g], self.P[:, g])[0] for g in self.genes]
        q = fractions(np.concatenate(total, axis=1), self.measured)
        return np.log((p + FLOOR) / (q + FLOOR)), 1 / (q * depth + 0.5), q

    def moved(self, profiles, genes):
        """Natural log of what the states changed in profiles (s, K, G): in some genes."""
        if self.reference is None:
            return np.zeros(1)
        return np.log((profiles[:, :, genes] + FLOOR) / (self.reference[:, :, genes] + FLOOR))

    def find_platform(self):
        """Find P and its covariance, in four rounds."""
        S, measured = len(self.bulk), self.measured
        rows = np.sort(np.random.default_rng(0).permutation(S)[:N_PLATFORM_BULKS])
        weight, profiles = self.weight[rows], self.profiles[rows]
        ratio, noise, q = self.expect(rows, profiles)
        known = np.flatnonzero(measured & (q.mean(axis=0) > 5 * FLOOR))  # of the others, ε decides
        some = known[:: max(1, len(known) // N_PRIOR_GENES)]
        share = sum_types(weight, profiles[:, :, some])[1]
        v = covary(share, self.moved(profiles, some))[1] + noise[:, some]
        sd = choose_platform_sd(ratio[:, some], share, v)
        for _ in progress(range(4), "what the platform changes", "round"):
            for g in self.genes:
                P = self.P[:, g]
                share = sum_types(weight, profiles[:, :, g], P)[1]
                v = covary(share, self.moved(profiles, g))[1] + noise[:, g]
                linear = ratio[:, g] + (share * P).sum(axis=1)
                self.P[:, g], self.covariance[g], _ = platform_posterior(linear, share, v, sd)
            self.P = np.where(measured, self.P, 0).clip(-2 * LIMIT, 2 * LIMIT)
            ratio, noise, _ = self.expect(rows, profiles)

    def changes(self, rows, profiles=None):
        """Mean of δ and its sd in some samples, each (s, K, G) float32.

        0 and the prior's in genes not measured. profiles: of these samples, if they are there.
        """
        profiles = self.profiles[rows] if profiles is None else profiles
        ratio, noise, _ = self.expect(rows, profiles)
        delta, sd = np.zeros(profiles.shape, np.float32), np.zeros(profiles.shape, np.float32)
        for g in self.genes:
            measured, moved = self.measured[g], self.moved(profiles, g)
            share = sum_types(self.weight[rows], profiles[:, :, g], self.P[:, g])[1]
            Cw, v = covary(share, moved)
            v = v + noise[:, g]
            by_gene = share.transpose(2, 0, 1)  # (G, s, K)
            unsure = ((by_gene @ self.covariance[g]) * by_gene).sum(axis=2).T  # of wᵀ P (s, G)
            delta[:, :, g] = np.where(measured, Cw * (ratio[:, g] / v)[:, None], 0)
            known = Cw**2 * (1 / v - unsure / v**2)[:, None]
            prior = SAMPLE_SD**2 + (STATE_ERROR * moved) ** 2
            sd[:, :, g] = np.sqrt(np.maximum(prior - np.where(measured, known, 0), 0))
        return delta.clip(-LIMIT, LIMIT), sd


def calibration(bulk, expected, measured):
    """Logarithm of the factors (S, G) float32 that turn the expected sum into the bulk.

        ln f_g = ln( (p_g + 5e-8) / (q_g + 5e-8) ), kept within ± ln 30; 0 for genes not in the bulk

    p, q: fractions of bulk and expected sum (S, G). A twentieth of a count per million, added to
    both, shrinks the factors of genes with hardly any counts.
    """
    p, q = (np.where(measured, part, 0.0) for part in (bulk, expected))
    p, q = (part / part.sum(axis=1, keepdims=True) + 5e-8 for part in (p, q))
    return np.where(measured, np.clip(np.log(p / q), -LIMIT, LIMIT), 0).astype(np.float32)


def expected_bulk(decoder, pi, profiles=None):
    """The sum (S, G), a numpy array, that proportions make of each type's mean counts.

    pi: of the bulks (S, K), a tensor. profiles: SampleProfiles, where samples have states.
    """
    if profiles is None or profiles.share is None:
        return (pi @ decoder.type_means()).cpu().numpy()
    weight = pi.cpu().double().numpy() * mean_library(decoder)
    total = np.zeros((len(weight), profiles.shape[2]))
    for rows in progress(parts_of(len(weight)), "sums of cell types", "part"):
        total[rows] = (weight[rows, None].astype(np.float32) @ profiles[rows])[:, 0]
    return total


@dataclass
class ExpressionPart:
    """Expected expression of the cell types in some of the samples."""

    profiles: np.ndarray
    """Fractions of a cell's counts (s, K, G) float32, rows summing to 1."""
    log_fold_change: np.ndarray
    """Natural log of the change against the type's mean in the reference, or in its baseline where
    samples have states, without the platform's part (s, K, G) float32."""
    sd: np.ndarray
    """Posterior sd of what was allotted to the type, the part of it that is not in the state
    (s, K, G) float32; the prior's where nothing is known, 0 where nothing was allotted."""
    log_factor: torch.Tensor | None
    """What is added to the logarithm of each gene's mean in generated cells, (s, K, G) or (s, G)
    float32; None for nothing."""


class Expression:
    """Expected expression of the cell types in the samples of a table of bulks.

    It is made for some samples at a time (:meth:`part`). What ExpressionPart has is there for all
    samples, too, made anew when it is asked for: 4 kB for a thousand genes of a type in a sample.

    Attributes:
        shape: (S, K, G). library: mean counts of a cell of each type (K).
    """

    def __init__(self, profiles, library, allotment=None, P=None, factor=None):
        """Args:
        profiles: SampleProfiles. library: (K). allotment: Allotment of --calibrate types, and P,
            what cells show of the platform (K, G) float32. factor: of --calibrate uniform (S, G).
        """
        self.states, self.library, self.shape = profiles, library, profiles.shape
        self.allotment, self.P, self.factor = allotment, P, factor

    def part(self, rows):
        """ExpressionPart of the samples in a slice."""
        start = self.states[rows]
        delta, sd = np.zeros((1, 1, 1), np.float32), np.zeros_like(start)
        log_factor, P = self.states.log_factor(rows, start), np.float32(0)
        if self.factor is not None:
            delta = self.factor[rows, None]
            log_factor = self.factor[rows] if log_factor is None else log_factor + delta
        elif self.allotment is not None:
            delta, sd = self.allotment.changes(rows, start)
            P = self.P
            log_factor = delta + P if log_factor is None else log_factor + delta + P
        own = start * np.exp(delta)
        profiles = normalise(own * np.exp(P))
        change = np.log((normalise(own) + 1e-9) / (self.states.reference + 1e-9))
        if log_factor is not None:
            log_factor = torch.from_numpy(log_factor)
        return ExpressionPart(profiles, change, sd, log_factor)

    def all(self, name):
        """An attribute of ExpressionPart, of all samples."""
        parts = [getattr(self.part(rows), name) for rows in parts_of(self.shape[0])]
        if parts[0] is None:
            return None
        return torch.cat(parts) if isinstance(parts[0], torch.Tensor) else np.concatenate(parts)

    profiles = property(lambda self: self.all("profiles"))
    log_fold_change = property(lambda self: self.all("log_fold_change"))
    sd = property(lambda self: self.all("sd"))
    log_factor = property(lambda self: self.all("log_factor"))


def estimate_expression(decoder, pi, bulk, measured, profiles, calibrate="types", platform="keep"):
    """Expected expression of each type in each sample, and what generated cells take of it.

    Args:
        pi: of the bulks (S, K), a tensor. bulk: (S, G) in the decoder's genes. measured: mask (G).
            profiles: SampleProfiles.
        calibrate: ``none``: states alone; ``uniform``: one factor per gene for all types, so that
            the cells of a sample add up to its bulk; ``types``: :class:`Allotment`.
        platform: ``keep``: what all bulks share is the platform's, and cells show it as the bulks
            do; ``remove``: cells are as the reference's platform would measure them; ``none``:
            there is none, and what the bulks share is the samples'.

    Returns:
        Expression.
    """
    library = mean_library(decoder)
    if calibrate == "uniform":
        factor = calibration(bulk, expected_bulk(decoder, pi, profiles), measured)
        return Expression(profiles, library, factor=factor)
    if calibrate != "types":
        return Expression(profiles, library)
    weight = pi.cpu().double().numpy() * library
    allotment = Allotment(bulk, weight, profiles, measured, platform, profiles.reference)
    P = allotment.P.clip(-LIMIT, LIMIT).astype(np.float32)
    return Expression(profiles, library, allotment, P if platform == "keep" else np.float32(0))


def expression_rows(samples, proportions, cell_types):
    """Names and proportions of the rows of the table: a DataFrame (S K rows).

    samples: names (S). proportions: (S, K). cell_types: names (K).
    """
    import pandas as pd

    sample = np.repeat(np.arange(len(samples)), len(cell_types))
    cell_type = np.tile(np.arange(len(cell_types)), len(samples))
    return pd.DataFrame(
        {
            "sample": pd.Categorical.from_codes(sample, samples),
            "cell_type": pd.Categorical.from_codes(cell_type, cell_types),
            "proportion": np.ravel(proportions),
        },
        index=[f"{sample} | {name}" for sample in samples for name in cell_types],
    )


def write_expression(path, samples, proportions, expression, metadata):
    """Write the expected expression, some samples at a time: a row for each type of each sample.

    An .h5ad (S K x G), float32. X: expected counts of one cell. Layers: ``log2_fold_change``
    (that of ExpressionPart) and ``log2_fold_change_sd``. obs: sample, cell_type, proportion. Values
    are rounded to 13 binary digits, four decimal ones, as further ones are noise that takes most of
    the space.

    Args:
        path: of the file. samples: names (S). proportions: (S, K). expression: Expression.
            metadata: of the decoder, with ``genes``, ``gene_ids`` and ``cell_types``.
    """
    import anndata
    import pandas as pd

    from runtime.cell_writers import open_tables

    S, K, G = expression.shape
    var = pd.DataFrame(index=metadata["genes"])
    if "gene_ids" in metadata:
        var["gene_ids"] = metadata["gene_ids"]
    obs = expression_rows(samples, proportions, metadata["cell_types"])
    library = expression.library[:, None].astype(np.float32)
    names = ("X", "layers/log2_fold_change", "layers/log2_fold_change_sd")
    with open_tables(path, anndata.AnnData(obs=obs, var=var), names, rows=K) as write:
        for rows in progress(parts_of(S), "expression of each type in each sample", "part"):
            part = expression.part(rows)
            changes = (x / np.float32(np.log(2)) for x in (part.log_fold_change, part.sd))
            write([x.reshape(-1, G) for x in (part.profiles * library, *changes)])
