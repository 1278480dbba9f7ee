"""What a reference lacks: the share of a bulk's RNA that belongs to none of its cell types.

From one bulk alone it cannot be told whether a gene reads high because of the platform or because
of cells that the reference lacks: full-length RNA-seq moves genes by a factor of two to three, a
missing type that is 30 % of a bulk moves most of its genes by less. So the question asked here is a
narrower one. ``blood_types.csv`` holds the profiles of cells of blood. Those that the reference has
no type like are candidates; they and the reference's types are fitted to the bulk together, and
what the candidates take is the share that the reference lacks:

    b_g ≈ Σ_k a_k P_kg + Σ_l u_l L_lg,      share = Σ_l u_l        over the candidates l

with the bulk's fractions b (G), the reference's profiles P (K, G) and the candidates' L (L, G), on
the reference's platform by the types that both have (:func:`adapt_types`). What a candidate takes
is no more than its own markers hold (:func:`own_markers`): they are hardly in any type of the
reference, so the platform cannot pass for them.

The share is of RNA, without genes of the protocol, haemoglobin and receptors of lymphocytes. Cells
that neither the reference nor the table has, and those much like a type of the reference (CD8 T
cells against NK cells), are not seen; nor is anything without two lineages of blood in the
reference, which is said by nan.

Notation in shape comments: S bulks, G genes, K types of the reference, L types of the table.
"""

import re
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from counts.genes import PROTOCOL_GENES
from data import TABLES
from deconvolution import itakura_saito

TABLE = TABLES / "blood_types.csv"
LINEAGES = ("Monocytes", "B cells", "Natural killer cells", "T cells")
# Genes of the protocol, of red cells and of receptors: their level says little of how many cells.
NOT_COUNTED = re.compile(PROTOCOL_GENES.pattern + r"|HB[ABDEGMQZ]\d?|(IG[HKL]|TR[ABDG]).*", re.I)
FLOOR = 1e-5  # added to fractions, below which profiles of a few hundred cells say nothing
ALIKE = 0.5  # correlation of profiles from which types are of one lineage, on two platforms
IN_REFERENCE = 0.72  # the same on one platform, from which the reference has the type
N_GENES = 1200  # that differ most between types, on which they are fitted
N_MARKERS, FEWEST_MARKERS, FEWEST_GENES = 40, 8, 300
# Quantiles over its markers of what is left for a type: the share itself, and its lower limit.
SHARE_QUANTILE, LOW_QUANTILE = 0.7, 0.5
# What the upper limit adds: with less, it covers too few of the bulks of other data sets.
ABSOLUTE, RELATIVE = 0.05, 0.2
# Share that bulks of the reference's own cells hardly exceed, on so many genes; the fewer, the more
# chance has to say.
FALSE_SHARE, FALSE_SHARE_GENES = 0.02, 5000
WARN = 0.1  # lower limit of the share from which users are warned


@dataclass
class UnknownShare:
    """What the reference lacks, as shares of the RNA of bulks; nan where it cannot be told."""

    share: np.ndarray
    """(S)."""
    low: np.ndarray
    """Limits of the 90 % interval (S)."""
    high: np.ndarray
    cell_types: list
    """Names of the types of the table that the reference lacks (L)."""
    parts: np.ndarray
    """Share of each of them (S, L); rows sum to ``share``."""

    @property
    def is_flagged(self):
        """Mask of the bulks (S) that hold much that the reference lacks: the lower limit is over
        WARN."""
        return self.low > WARN

    def describe(self, s, fewest=0.02):
        """The types that bulk ``s`` holds and the reference lacks, in words; '' if there are none.

        fewest: smallest share of a type that is named.
        """
        order = np.argsort(-self.parts[s])
        named = [i for i in order if self.parts[s, i] >= fewest]
        return ", ".join(f"{self.cell_types[i]} {self.parts[s, i]:.0%}" for i in named)


def read_types(path=TABLE):
    """Profiles of cells of blood: DataFrame of CPM, genes x types, nan where not measured."""
    return pd.read_csv(path, index_col=0, comment="#")


# ------------------------------------------------------------------------------ the candidates


def centred_logs(profiles):
    """ln (profiles + FLOOR) (N, G), less the mean over profiles of each gene."""
    logs = np.log(profiles + FLOOR)
    return logs - logs.mean(axis=0)


def most_variable(profiles, n):
    """Indices of the n genes whose logs vary most between profiles (N, G)."""
    return np.argsort(-np.log(profiles + FLOOR).std(axis=0), kind="stable")[:n]


def correlate(types, profiles):
    """Correlation (L, K) of types (L, G) with profiles (K, G), of logs about the mean of each set.

    Each about its own mean, so that a platform, which moves a gene in all types, drops out.
    """
    logs = np.concatenate([centred_logs(types), centred_logs(profiles)])
    return np.corrcoef(logs)[: len(types), len(types) :]


def platform_factor(source, target, low=FLOOR):
    """Natural log of what turns a source's platform into the target's, gene by gene (G).

        f_g = Σ_t w_tg ln(target_tg / source_tg) / (Σ_t w_tg + low),
        w = m² / (m + low),   m = √(source · target)

    over types t that both have: those that express a gene say most of it, and genes that none
    expresses stay as they are. source, target: fractions (T, G).
    """
    ratio = np.log((target + FLOOR / 5) / (source + FLOOR / 5))
    m = np.sqrt(source * target)
    w = m**2 / (m + low)
    return (w * ratio).sum(axis=0) / (w.sum(axis=0) + low)


def fractions(x):
    """Rows of x (N, G) over their sums; nan for rows without counts."""
    x = np.asarray(x, dtype=np.float64)
    total = x.sum(axis=1, keepdims=True)
    return np.divide(x, total, out=np.full_like(x, np.nan), where=total > 0)


def adapt_types(types, names, profiles):
    """The table's types on the reference's platform, and which of them the reference lacks.

    Args:
        types: fractions (L, G). names: of them (L). profiles: the reference's fractions (K, G).

    The reference has a type whose correlation with one of its own is IN_REFERENCE or more. For
    rare types, whose profiles of few cells are noisy, ALIKE is enough if each is the other's
    nearest. Neutrophils are nearest to monocytes, but monocytes are nearest to monocytes.

    Returns:
        ``(adapted, lacking)``: (L, G) and a mask (L). None and no type where fewer than two
        LINEAGES are in the reference, as the platform cannot be told then.
    """
    if len(profiles) < 2:
        return None, np.zeros(len(types), bool)
    genes = most_variable(profiles, profiles.shape[1] // 4)
    alike = correlate(types[:, genes], profiles[:, genes])
    is_anchor = np.isin(names, LINEAGES) & (alike.max(axis=1) > ALIKE)
    if is_anchor.sum() < 2:
        return None, np.zeros(len(types), bool)
    own = profiles[alike.argmax(axis=1)]
    adapted = types * np.exp(platform_factor(types[is_anchor], own[is_anchor]))
    adapted = adapted / adapted.sum(axis=1, keepdims=True)
    both = np.concatenate([profiles, adapted])
    logs = centred_logs(both[:, most_variable(both, both.shape[1] // 4)])
    alike = np.corrcoef(logs)[len(profiles) :, : len(profiles)]  # (L, K)
    best = alike.max(axis=1)
    of_nearest = alike[:, alike.argmax(axis=1)].argmax(axis=0)  # nearest to each type's nearest
    is_mutual = of_nearest == np.arange(len(types))
    return adapted, ~((best >= IN_REFERENCE) | (is_mutual & (best > ALIKE)))


# ----------------------------------------------------------------------------- the estimate


def fit_types(bulk, profiles, n_iterations=100):
    """RNA shares of types in bulks (S, K), rows summing to 1 (:mod:`deconvolution.itakura_saito`).

    Args:
        bulk: fractions (S, G) of some genes. profiles: of the same genes (K, G).
    """
    scale = profiles.sum(axis=1).mean()
    floor = 0.02 * scale / profiles.shape[1]
    b = bulk / bulk.sum(axis=1, keepdims=True) * scale
    given = torch.from_numpy(b), torch.from_numpy(profiles), floor, n_iterations
    return itakura_saito.solve(*given).numpy()


def own_markers(types, profiles):
    """Markers of each type against the reference: indices of at most N_MARKERS genes, by type.

    Genes twice as high as in any type of the reference or more, the clearest first.
    types: (L, G). profiles: (K, G).
    """
    gap = np.log(types + FLOOR) - np.log(profiles + FLOOR).max(axis=0)
    gap = np.where(types > 5 * FLOOR, gap, -np.inf)  # (L, G)
    order = np.argsort(-gap, axis=1)[:, :N_MARKERS]
    return [genes[row[genes] > np.log(2)] for genes, row in zip(order, gap, strict=True)]


def left_for(bulk, share, all_types, j, genes):
    """What the others leave of each marker of type ``j``, as shares of the bulk (S, markers).

        x_g = (b_g - Σ_{i≠j} a_i P_ig) / P_jg

    bulk: (S, G). share: of all types (S, N). all_types: (N, G). genes: the markers of j.
    """
    others = share.copy()
    others[:, j] = 0
    return (bulk[:, genes] - others @ all_types[:, genes]) / all_types[j, genes]


def shares_of_types(bulk, profiles, types):
    """Share of each type that the reference lacks (L) in bulks, three times.

    Args:
        bulk: (S, G), profiles: (K, G), types: (L, G), all fractions of the same genes.

    Returns:
        lower limit, share and upper limit (S, L): what is fitted, but no more than the
        LOW_QUANTILE or SHARE_QUANTILE of what is left in the type's markers; and what is fitted. 0
        for types of which too few markers were measured.
    """
    K, both = len(profiles), np.concatenate([profiles, types])
    genes = most_variable(both, N_GENES)
    share = fit_types(bulk[:, genes], both[:, genes])  # (S, K + L)
    low, middle, high = (share[:, K:].copy() for _ in range(3))
    for j, markers in enumerate(own_markers(types, profiles)):
        if len(markers) < FEWEST_MARKERS:
            low[:, j] = middle[:, j] = high[:, j] = 0
            continue
        left = left_for(bulk, share, both, K + j, markers)  # (S, markers)
        for part, q in ((low, LOW_QUANTILE), (middle, SHARE_QUANTILE)):
            part[:, j] = np.minimum(part[:, j], np.quantile(left, q, axis=1).clip(0, 1))
    return low, middle, high


def nothing_known(n, names=()):
    """UnknownShare of n bulks of which nothing can be told."""
    nan = np.full(n, np.nan)
    return UnknownShare(nan, nan.copy(), nan.copy(), list(names), np.full((n, len(names)), np.nan))


def unknown_share(bulk, measured, profiles, genes, types=None):
    """Share of the RNA of bulks that no type of the reference explains, with a 90 % interval.

        low = l - n,    high = (1 + RELATIVE) h + ABSOLUTE + n      l, h: of shares_of_types

    with n the false share of bulks of the reference's own cells.

    Args:
        bulk: (S, G), counts, TPM or CPM. measured: mask (G) of the genes that the bulk has.
        profiles: of the reference's types, any scale, (K, G), or (S, K, G), of which the mean is
            taken. genes: names (G). types: DataFrame as of :func:`read_types`, the default.

    Returns:
        UnknownShare; nan for bulks without counts, and for all bulks where the reference has fewer
        than two lineages of blood, lacks none of the types, or too few genes are measured.
    """
    types = read_types() if types is None else types
    profiles = np.asarray(profiles, dtype=np.float64)
    profiles = profiles.mean(axis=0) if profiles.ndim == 3 else profiles
    table = types.reindex(list(genes))  # (G, L)
    counted = np.array([NOT_COUNTED.fullmatch(str(name)) is None for name in genes])
    used = measured & counted & table.notna().all(axis=1).to_numpy()
    if used.sum() < FEWEST_GENES or (profiles[:, used].sum(axis=1) == 0).any():
        return nothing_known(len(bulk))
    P, L = fractions(profiles[:, used]), fractions(table[used].to_numpy().T)
    L, lacking = adapt_types(L, list(table.columns), P)
    if not lacking.any():
        return nothing_known(len(bulk))
    names, b = list(table.columns[lacking]), fractions(np.asarray(bulk)[:, used])
    filled = ~np.isnan(b[:, 0])
    result = nothing_known(len(b), names)
    low, middle, high = shares_of_types(b[filled], P, L[lacking])
    false = FALSE_SHARE * max(1.0, (FALSE_SHARE_GENES / used.sum()) ** 0.5)
    result.parts[filled], result.share[filled] = middle, middle.sum(axis=1)
    result.low[filled] = (low.sum(axis=1) - false).clip(0, 1)
    result.high[filled] = ((1 + RELATIVE) * high.sum(axis=1) + ABSOLUTE + false).clip(0, 1)
    return result
