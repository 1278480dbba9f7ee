"""Cells of one donor under two conditions, real and generated, for the pictures of make_figures.py.

The donor is one that no training has seen. The bulk of each of its two samples is the sum of all
of the sample's cells; generated cells come from these bulks alone, as many of each type as there
are real ones.

Notation in shape comments: N cells, S = 2 samples (condition A, then B), G genes, K cell types,
P genes that are shown, T cell types that are shown.
"""

from dataclasses import dataclass

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from counts.genes import choose_state_genes
from data import Reference, align_genes, library_size, sum_by_type
from deconvolution.samples import BulkSamples
from generation import CHUNK, decode
from readers.bulk import Bulk
from readers.labels import natural_order
from runtime.errors import InputError, some
from states.conditions import choose_conditions

# Shown unless others are asked for: two interferon-stimulated genes of all cells, two of monocytes,
# and a marker of monocytes.
STATE_GENES = ("ISG15", "IFI6", "CXCL10", "CCL8", "CD14")
MIN_CELLS = 5  # real cells of a type in each of the two samples, for its expression to be shown
MAX_TYPES = 12  # whose expression is shown
PSEUDOCOUNT = 10  # added to CPM, as in the fold changes of evaluation/metrics.py


@dataclass
class DonorSamples:
    """Two samples of one donor that no training has seen."""

    donor: str
    conditions: tuple[str, str]
    """A and B."""
    samples: tuple[str, str]
    """Names, of A and of B."""


@dataclass
class DonorCells:
    """Labelled cells of a donor's two samples, and as many generated ones; those of A first."""

    found: DonorSamples
    codes: np.ndarray
    """Cell types, of the real and of the generated cells alike (N)."""
    condition: np.ndarray
    """0 for A, 1 for B, likewise (N)."""
    real: sp.csr_matrix
    """Counts (N x G)."""
    generated: sp.csr_matrix
    """Counts (N x G)."""
    expected: np.ndarray
    """What each type is expected to express: fractions of a cell's counts (S, K, G)."""

    @property
    def origins(self):
        """Origin and condition in words, of the real cells, then of the generated ones (2 N)."""
        names = [self.found.conditions[c] for c in self.condition]
        return [f"{origin}, {name}" for origin in ("real", "generated") for name in names]


def find_donor(obs, held_out, settings):
    """A held-out donor's samples of both conditions; None if there are none, and a line says why.

    Args:
        obs: sample, donor and condition of cells (N rows). held_out: mask (N). settings: of
            make_figures.py.

    Raises:
        InputError: it is not clear which two conditions, or one is not there.
    """
    why = None
    if settings.samples is None or settings.conditions is None:
        why = "they need --samples and --conditions"
    else:
        known = natural_order(obs["condition"].astype(str))
        conditions = choose_conditions(settings.contrast, known, "--contrast")
        found = first_donor(obs, held_out, conditions)
        if len(known) == 1:
            why = f"--conditions {settings.conditions} has {known[0]} alone, expected two"
        elif found is None:
            both = " and ".join(conditions)
            why = f"{settings.weights} holds out no donor with samples of both {both}"
    if why is not None:
        ending = settings.format
        print(f"states.{ending} and state_genes.{ending} left out: {why}")
        return None
    return found


def first_donor(obs, held_out, conditions):
    """DonorSamples of the first donor without a training cell who has both conditions, or None.

    Of several samples of a condition the first one is taken; obs, held_out: see find_donor.
    """
    obs = obs[["sample", "donor", "condition"]].astype(str)
    unseen = obs[~obs["donor"].isin(obs["donor"][~held_out])]
    for donor in natural_order(unseen["donor"]):
        own = unseen[unseen["donor"] == donor]
        samples = [natural_order(own["sample"][own["condition"] == c])[:1] for c in conditions]
        if all(samples):
            return DonorSamples(donor, conditions, (samples[0][0], samples[1][0]))
    return None


def generate_donor(found, model, reference, settings):
    """DonorCells: at most --max-cells real cells, and as many generated from the two bulks.

    Args:
        found: DonorSamples. model: Model. reference: Reference. settings: of make_figures.py.
    """
    sample = pd.Index(found.samples).get_indexer(reference.cells.obs["sample"])  # (N), -1 in others
    rows = np.flatnonzero(sample >= 0)
    rows = np.random.default_rng(settings.seed).permutation(rows)[: settings.max_cells]
    rows = rows[np.argsort(sample[rows], kind="stable")]
    codes, sample = reference.codes[rows], sample[rows]
    bulk = sum_all_cells(settings, found.samples, model.genes)
    encoded, expression = encode_donor(bulk, model)
    generator = torch.Generator(model.device).manual_seed(settings.seed)
    log_factor = expression.log_factor
    generated = generate_like(codes, sample, encoded, log_factor, model.decoder, generator)
    real = reference.X[rows]
    return DonorCells(found, codes, sample, real, generated, expression.profiles)


def sum_all_cells(settings, names, genes):
    """Bulk of samples: the sums of all of their cells, unlabelled ones as well.

    Args:
        settings: of the dataset. names: of the samples (S). genes: of the result (G).
    """
    cells = Reference.load(settings, need_labels=False)
    sums = sum_by_type(cells.X, cells.sample, len(cells.samples))
    sums = sums[[cells.samples.index(name) for name in names]]
    values, measured = align_genes(sums, cells.genes, genes, settings.data, report=False)
    return Bulk(values, measured, names, "the donor's samples")


def encode_donor(bulk, model):
    """Encode a Bulk and estimate the expression of its cell types, as bulk2sc.py does by default.

    Returns:
        what :func:`generation.generate_cells` takes of them; and
        :class:`deconvolution.expression.Expression`.
    """
    samples = BulkSamples(bulk, model)
    samples.estimate_expression("types" if model.states else "none", "keep")
    return samples.encoded, samples.expression


@torch.inference_mode()
def generate_like(codes, sample, encoded, log_factor, decoder, generator):
    """Counts (N x G), CSR, of cells of given types and samples.

    Args:
        codes, sample: type and sample of each cell (N). encoded, log_factor: of the samples, as
            :func:`generation.generate_cells` takes them.
    """
    mu, var, _, *weight = encoded
    weight = weight[0] if weight else None
    pairs = (torch.as_tensor(part, device=mu.device).split(CHUNK) for part in (codes, sample))
    blocks = [
        decode(decoder, mu[s, k], var[s, k], k, generator, log_factor, s, weight)[0]
        for k, s in zip(*pairs, strict=True)
    ]
    return sp.vstack(blocks, format="csr")


# -------------------------------------------------------------------------------------- neighbours


def state_mixing(neighbors, condition):
    """Which cells are among the neighbours of a real one, mean over the real cells.

    Args:
        neighbors: indices of the nearest others of each cell (2 N, n): the real cells first, then
            the generated ones. condition: of the real cells, and of the generated ones (N).

    Returns:
        shares (2, 2), summing to 1: real and generated cells (rows), of the real cell's own
        condition and of the other one (columns).
    """
    N = len(condition)
    neighbors = neighbors[:N]
    generated = neighbors >= N
    own = condition[neighbors % N] == condition[:, None]
    return np.array([[np.mean((generated == g) & (own == o)) for o in (1, 0)] for g in (0, 1)])


def describe_mixing(neighbors, cells):
    """:func:`state_mixing` in words, three lines. cells: DonorCells."""
    own, other = 100 * state_mixing(neighbors, cells.condition).T
    n, donor = neighbors.shape[1], cells.found.donor
    return (
        f"of the {n} nearest neighbours of a real cell, donor {donor}:\n"
        f"own condition {own[0]:.0f} % real, {own[1]:.0f} % generated; "
        f"other {other[0]:.0f} % and {other[1]:.0f} %\n"
        "(as many generated as real if they were alike)"
    )


# ------------------------------------------------------------------------------ expression of genes


def pick_genes(asked, reference, conditions):
    """Names of the genes to show.

    Those asked for; by default STATE_GENES, or, where the model lacks one of them, the same number
    that differ most between the conditions inside the cell types, in training cells.

    Args:
        asked: names, maybe none. reference: of make_figures.py. conditions: A and B.

    Raises:
        InputError: a name is none of the model's.
    """
    genes = reference.genes
    if unknown := [name for name in asked if name not in genes]:
        raise InputError(
            f"--state-genes: found {some(unknown)}, expected genes of the model, such as "
            f"{some(genes)}"
        )
    if asked:
        return list(dict.fromkeys(asked))
    if set(STATE_GENES) <= set(genes):
        return list(STATE_GENES)
    condition = pd.Index(conditions).get_indexer(
        reference.cells.obs["condition"]
    )  # (N), -1 in others
    rows = np.flatnonzero((condition >= 0) & ~reference.held_out)
    var = pd.DataFrame({"gene_ids": genes}, index=genes)
    cells = anndata.AnnData(reference.X[rows], var=var)
    return choose_state_genes(cells, reference.codes[rows], condition[rows], len(STATE_GENES))


def mean_cpm(X, library):
    """Counts per million of cells together, and the standard error of it by the cells (P each).

        p = Σ_i x_i / Σ_i l_i,   se(p) = sqrt( n / (n - 1) Σ_i (x_i - p l_i)² ) / Σ_i l_i

    X: counts (N, P). library: all counts of each cell, l (N).
    """
    n, total = len(X), library.sum()
    p = X.sum(axis=0) / total
    error = ((X - library[:, None] * p) ** 2).sum(axis=0) * n / max(n - 1, 1)
    return 1e6 * p, 1e6 * np.sqrt(error) / total


def count_cells(cells, n_types):
    """Real cells of each type under A and B (2, K); cells: DonorCells."""
    group = cells.condition * n_types + cells.codes
    return np.bincount(group, minlength=2 * n_types).reshape(2, n_types)


def shown_types(n_cells):
    """Codes (T) of the MAX_TYPES largest types with MIN_CELLS cells or more under A and B.

    n_cells: (2, K).
    """
    enough = np.flatnonzero(n_cells.min(axis=0) >= MIN_CELLS)
    order = np.argsort(-n_cells.sum(axis=0)[enough], kind="stable")
    return np.sort(enough[order[:MAX_TYPES]])


def state_table(cells, columns, types):
    """Expression of genes in cell types under both conditions, as log2(CPM + PSEUDOCOUNT).

    Args:
        cells: DonorCells. columns: of the genes in the decoder's (P). types: codes (T).

    Returns:
        dict: "real" and "generated" -> (3, S, T, P), the value and one standard error below and
        above; "expected" -> the value alone (S, T, P).
    """
    table = {}
    for origin in ("real", "generated"):
        counts = getattr(cells, origin)
        X, library = counts[:, columns].toarray().astype(float), library_size(counts).astype(float)
        groups = [[(cells.condition == s) & (cells.codes == k) for k in types] for s in (0, 1)]
        values = [[mean_cpm(X[rows], library[rows]) for rows in row] for row in groups]
        mean, error = np.moveaxis(np.array(values), 2, 0)  # (S, T, P)
        table[origin] = to_log2(np.stack([mean, np.maximum(mean - error, 0), mean + error]))
    table["expected"] = to_log2(1e6 * cells.expected[:, types][:, :, columns])
    return table


def to_log2(cpm):
    """log2(CPM + PSEUDOCOUNT)."""
    return np.log2(cpm + PSEUDOCOUNT)
