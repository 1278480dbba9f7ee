"""Predicted against true proportions, of pseudobulks and of real bulks.

Each method reads the same bulks: pseudobulks of held-out cells ("within"), and real bulks whose
lineages were measured (", real bulk").

Notation in shape comments: S bulks, N cells, G genes of the decoder, K cell types, L lineages.
"""

import contextlib

import numpy as np
import pandas as pd
import scipy.sparse as sp

from counts.pseudobulks import draw_test_bulks
from data import align_genes, mean_counts
from deconvolution.encode import encode_samples
from deconvolution.estimators import NNLS, estimate_all, nnls_proportions, type_statistics
from evaluation.metrics import pearson_within, proportion_metrics, to_lineages
from readers.barcodes import check_same_start
from readers.bulk import Bulk, read_bulk
from readers.lineages import lineages_in, read_fractions, read_lineages
from runtime.errors import InputError, some


class ProportionMethods:
    """bulk2sc and what it is measured beside, of one model and the cells that it was trained on.

    Args:
        model: Model. reference: Reference. estimators: list of Estimator, which read all
            genes. seed: of theirs.
    """

    def __init__(self, model, reference, estimators=(), seed=0):
        self.model, self.reference = model, reference
        self.estimators, self.seed = estimators, seed
        rows, K = reference.train, len(model.cell_types)
        codes = reference.codes[rows]
        X, _ = reference.counts(model.encoder_genes, "the encoder", rows)
        self.profiles = mean_counts(X, codes, K)  # (K, G)
        self.statistics = None
        if estimators:
            sample = reference.sample[rows] if len(reference.samples) > 1 else None
            X = model.counts(reference, rows)
            self.statistics = type_statistics(X, codes, K, model.genes, sample)

    def predict(self, bulk):
        """Proportions of bulks: dict method -> (S, K).

        bulk2sc answers as bulk2sc.py does, mRNA content included. NNLS reads the encoder's genes,
        the other estimators all genes.

        Args:
            bulk: Bulk in the decoder's genes (S).

        Raises:
            InputError: a bulk has no counts in any gene of the encoder.
        """
        values, measured, genes = bulk.dense(), bulk.measured, self.model.genes
        encoded = encode_samples(self.model, bulk, n_halves=0)
        encoder_genes = self.model.encoder_genes
        X, _ = align_genes(sp.csr_matrix(values), genes, encoder_genes, bulk.where, report=False)
        read = np.isin(encoder_genes, np.array(genes)[measured])
        results = {
            "bulk2sc": encoded.cells.cpu().numpy(),
            NNLS.name: nnls_proportions(X.toarray()[:, read], self.profiles[:, read]),
        }
        if self.estimators:
            given = values, measured, self.statistics, self.estimators, self.seed
            results |= estimate_all(*given)
        return results


def with_constant(true, predictions):
    """Predictions, and the constant answer: the mean truth (S, K) of these very bulks.

    No method can know it; what it scores needs no bulk.
    """
    return predictions | {"constant answer": np.broadcast_to(true.mean(axis=0), true.shape)}


def score(true, predictions, names, suffix, of="lineage"):
    """Rows (method, metric, type or lineage or None for all, value) of predicted proportions.

    Args:
        true: (S, K). predictions: method -> (S, K). names: of the columns (K). suffix, of: as
            :func:`evaluation.metrics.proportion_names` has them.
    """
    rows = []
    for method, predicted in with_constant(true, predictions).items():
        values = proportion_metrics(true, predicted, suffix, of)
        rows += [(method, metric, None, value) for metric, value in values.items()]
        within = zip(names, pearson_within(true, predicted), strict=True)
        rows += [
            (method, f"proportions Pearson within {of}{suffix}", name, r)
            for name, r in within
            if not np.isnan(r)
        ]
    return rows


def score_lineages(true, predictions, lineage_of, suffix):
    """:func:`score` of proportions (S, K) summed to lineages, without bulks that have none."""
    lineages = lineages_in(lineage_of)
    filled = true[:, [lineage is not None for lineage in lineage_of]].any(axis=1)
    summed = {
        method: to_lineages(pi[filled], lineage_of, lineages) for method, pi in predictions.items()
    }
    return score(to_lineages(true[filled], lineage_of, lineages), summed, lineages, suffix)


def measure_pseudobulks(methods, lineage_of, cfg, rng, suffix="", change=None):
    """Proportions of pseudobulks of held-out cells; none, if no cells were held out.

    Args:
        lineage_of: lineage of each type (K), or None. suffix: of the metrics' names. change:
            function of the bulks (S, G) that changes their counts, or None.
    """
    model, reference = methods.model, methods.reference
    if len(reference.test) == 0:
        print(f"{model.folder}: no cells were held out, so no pseudobulks are made of them")
        return []
    print(f"{model.folder}: proportions of pseudobulks", flush=True)
    X, names = model.counts(reference, reference.test), model.cell_types
    measured = pd.Index(model.genes).isin(reference.genes)  # np.isin takes seconds
    rows = []
    for _ in range(cfg.n_draws):
        bulk, true = draw_test_bulks(
            X, reference.test_codes, len(names), cfg.n_pseudobulks, cfg.cells_per_bulk, rng
        )
        bulk = bulk if change is None else change(bulk)
        with contextlib.redirect_stdout(None):  # sums of cells need no word on their protocol
            results = methods.predict(Bulk(bulk, measured, range(len(bulk)), cfg.data))
        rows += score(true, results, names, suffix, "type")
        if lineage_of is not None:
            rows += score_lineages(true, results, lineage_of, f"{suffix}, lineages")
    return rows


def read_truth(cfg, cell_types, other_types=()):
    """Lineage of each cell type (K), and measured fractions of lineages (S x L); None without.

    Args:
        cfg: settings, with ``lineages`` and ``fractions``. cell_types: of the model (K).
            other_types: further names that --lineages may have.
    """
    if cfg.lineages is None:
        return None, None
    lineage_of = read_lineages(cfg.lineages, cell_types, set(other_types))
    if cfg.fractions is None:
        return lineage_of, None
    return lineage_of, read_fractions(cfg.fractions, lineages_in(lineage_of), cfg.lineages)


def measure_real_bulk(methods, lineage_of, fractions, cfg):
    """Proportions of the real bulks of --bulk, if there are any; nothing is drawn.

    lineage_of, fractions: of :func:`read_truth`.

    Raises:
        InputError: as :func:`readers.bulk.read_bulk`; or no sample is in both files.
    """
    if fractions is None:
        return []
    lineages = list(fractions.columns)
    bulk = read_bulk(cfg.bulk, methods.model.genes, methods.model.gene_ids, cfg)
    samples = bulk.samples
    check_same_start(fractions.index, samples, cfg.fractions)
    index = fractions.index.get_indexer([str(name).strip() for name in samples])
    known = index >= 0
    n = known.sum()
    if n == 0:
        raise InputError(
            f"{cfg.fractions}: none of its samples ({some(fractions.index)}) is in {cfg.bulk} "
            f"({some(samples)})"
        )
    print(
        f"{cfg.bulk}: {n} samples with measured fractions, {len(samples) - n} without; "
        f"{len(fractions) - n} of {cfg.fractions} are not in it"
    )
    chosen = Bulk(
        bulk.values[np.flatnonzero(known)], bulk.measured, np.array(samples)[known], cfg.bulk
    )
    true = to_lineages(fractions.to_numpy()[index[known]], lineages, lineages)
    results = methods.predict(chosen)
    predictions = {method: to_lineages(pi, lineage_of, lineages) for method, pi in results.items()}
    rows = score(true, predictions, lineages, ", real bulk")
    for method, predicted in with_constant(true, predictions).items():
        r = np.corrcoef(true.ravel(), predicted.ravel())[0, 1]
        rows.append((method, "proportions Pearson, real bulk", None, r))
    return rows
