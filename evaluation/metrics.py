"""How good generated cells and predicted proportions are: every metric.

Notation: N real and M generated cells, G genes, P features (PCs or genes), S bulks, K cell types,
L lineages.
"""

from dataclasses import dataclass

import numpy as np
import scanpy
import scipy.sparse as sp
import scipy.stats
import sklearn
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, pairwise_distances, roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.neighbors import NearestNeighbors

from counts.genes import choose_genes
from counts.markers import markers_by_test
from data import library_size, log_normalise

METRICS = {  # every metric in the order of the tables, and its best possible value
    "random-forest AUROC, PCs": 0.5,
    "random-forest AUROC, genes": 0.5,
    "excess of AUROC, PCs": 0,
    "excess of AUROC, genes": 0,
    "MMD2, PCs": 0,
    "within-type variance ratio": 1,
    "gene-gene correlation RMSE": 0,
    "zero-fraction error": 0,
    "library-size KS": 0,
    "macro-F1, generated to real": 1,
    "energy distance": 0,
    "marker mean error": 0,
    "marker fraction error": 0,
    "fold-change correlation": 1,
    "fold-change slope": 1,
    "nearest neighbour trained on, excess": 0,
    "sum of cells against bulk, Pearson": 1,
}


def proportion_names(suffix, of="lineage"):
    """dict: metric of proportions -> its best possible value.

    suffix: what they are measured on, with which the names end. of: what a column of the
    proportions is, ``type`` or ``lineage``.
    """
    best = {"RMSE": 0, "CCC": 1, "MAE": 0, f"Pearson within {of}": 1}
    return {f"proportions {metric}{suffix}": value for metric, value in best.items()}


def setting_of(metric):
    """What a metric is of, for tables and panels: "" for cells, "fold changes", or its bulks."""
    if metric in CONTRAST_METRICS:
        return "fold changes"
    is_proportion = metric.startswith("proportions ")
    return (metric.partition(", ")[2] or "within") if is_proportion else ""


for _suffix in ("", ", shift"):
    METRICS |= proportion_names(_suffix, "type") | proportion_names(f"{_suffix}, lineages")
METRICS |= proportion_names(", real bulk") | {"proportions Pearson, real bulk": 1}
CONTRAST_METRICS = {  # of samples of donors that no training has seen
    "fold change Pearson": 1,
    "fold change concordance": 1,
    "fold change specific": 1,
    "AUROC against the sample's own cells, PCs": 0.5,
    "false changes, same state": 0,
}
METRICS |= CONTRAST_METRICS

N_VARIABLE = 1000  # highly variable genes, by scanpy's default flavour
N_CORRELATED = 200  # highly variable genes whose correlations are compared, by seurat_v3
N_PCS = 20
N_MARKERS = 20  # per cell type
MIN_CELLS = 3  # of a type on either side, for a metric of that type
N_SPLITS = 10  # into halves, for slopes of fold changes


# --------------------------------------------------------------------- two sets of cells


def random_forest_auroc(real, generated, seed, n_trees=300):
    """Cross-validated AUROC of a random forest that separates generated from real cells.

    0.5 is best: the cells cannot be told apart. real (N, P), generated (M, P).
    """
    X = np.vstack([real, generated])
    y = np.repeat([0, 1], [len(real), len(generated)])
    forest = RandomForestClassifier(n_trees, random_state=seed)
    # Shuffled, as cells may be sorted by type, and a fold of a single type scores far below 0.5.
    folds = StratifiedKFold(min(5, len(real), len(generated)), shuffle=True, random_state=seed)
    # Folds side by side, and no check of each of a thousand trees, which takes as long as the tree.
    with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):
        score = cross_val_predict(forest, X, y, cv=folds, method="predict_proba", n_jobs=-1)
    return roc_auc_score(y, score[:, 1])


def pairwise_discrepancy(real, generated, kernel):
    """Compare two samples by E k(X, X') + E k(Y, Y') - 2 E k(X, Y).

    Unbiased, as no point is paired with itself. real (N, P), generated (M, P). kernel: maps all
    pairwise distances (N + M, N + M) to k.
    """
    k = kernel(pairwise_distances(np.vstack([real, generated])))
    n, m = len(real), len(generated)
    rr, gg, rg = k[:n, :n], k[n:, n:], k[:n, n:]
    return (
        (rr.sum() - np.trace(rr)) / (n * (n - 1))
        + (gg.sum() - np.trace(gg)) / (m * (m - 1))
        - 2 * rg.mean()
    )


def mmd2(real, generated):
    """Unbiased squared maximum mean discrepancy, Gaussian kernel of median width; 0 is best.

    Gretton et al., JMLR 2012, equation 3. real (N, P), generated (M, P).
    """
    return pairwise_discrepancy(
        real, generated, lambda d: np.exp(-(d**2) / np.median(d[d > 0] ** 2))
    )


def energy_distance(real, generated):
    """Unbiased energy distance 2 E|X-Y| - E|X-X'| - E|Y-Y'|; 0 is best.

    Székely and Rizzo, J. Statistical Planning and Inference 2013. real (N, P), generated (M, P).
    """
    return pairwise_discrepancy(real, generated, lambda d: -d)


def correlation_rmse(real, generated):
    """Root mean squared difference of gene-gene Pearson correlations; 0 is best.

    real (N, P), generated (M, P): log-expression of the same genes. A constant gene counts as
    uncorrelated with any other.
    """
    upper = np.triu_indices(real.shape[1], 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        r, g = (np.nan_to_num(np.corrcoef(log, rowvar=False))[upper] for log in (real, generated))
    return np.sqrt(np.mean((r - g) ** 2))


def zero_fraction_error(real, generated):
    """Mean absolute difference, over genes, of the fraction of cells without a count; 0 is best."""
    return np.abs((generated == 0).mean(axis=0) - (real == 0).mean(axis=0)).mean()


def macro_f1(train, train_codes, test, test_codes):
    """F1, mean over cell types, of a logistic regression on PCs trained on one set of cells."""
    predicted = LogisticRegression(max_iter=2000).fit(train, train_codes).predict(test)
    return f1_score(test_codes, predicted, average="macro", labels=np.unique(test_codes))


def trained_on_share(cells, real, trained_on, skip_self=False):
    """Share of cells whose nearest real neighbour is one that the model was trained on.

    Copies of training cells score 1.

    Args:
        cells: PCs (M, P). real: PCs (N, P). trained_on: mask (N).
        skip_self: the cells are among the real ones, so that the nearest is the cell itself.
    """
    n = 1 + skip_self
    nearest = NearestNeighbors(n_neighbors=n).fit(real).kneighbors(cells, return_distance=False)
    return trained_on[nearest[:, -1]].mean()


# ------------------------------------------------------------------------ one cell type


def within_type_variance_ratio(real, real_codes, generated, generated_codes):
    """Variance within each cell type, summed over PCs, generated over real; 1 is best.

    real, generated: PCs (N, P), (M, P). Types of fewer than ``MIN_CELLS`` on either side have none.

    Returns:
        dict: type code -> ratio.
    """
    ratios = {}
    for k in np.unique(real_codes):
        r, g = real[real_codes == k], generated[generated_codes == k]
        if min(len(r), len(g)) >= MIN_CELLS:
            ratios[int(k)] = g.var(axis=0, ddof=1).sum() / r.var(axis=0, ddof=1).sum()
    return ratios


def marker_errors(real, generated):
    """Mean absolute differences, over marker genes, of mean and of fraction of expressing cells.

    real (N, P), generated (M, P): log-expression of a type's markers in its cells. 0 is best.
    """
    mean = np.abs(real.mean(axis=0) - generated.mean(axis=0)).mean()
    fraction = np.abs((real > 0).mean(axis=0) - (generated > 0).mean(axis=0)).mean()
    return mean, fraction


def log_fold_change(log, in_type):
    """Mean log-expression (N, P) of one type against all other cells, each gene (P)."""
    return log[in_type].mean(axis=0) - log[~in_type].mean(axis=0)


def fold_change_slopes(real, real_codes, generated, generated_codes, seed):
    """Slope of generated on real log fold changes of each cell type, over genes; 1 is best.

        slope = cov(c + d, a + b) / (4 cov(a, b))

    Below 1 fold changes are attenuated. a and b are those of two halves of the real cells, c and d
    of the generated ones: log2 fold changes of :func:`fold_changes`, of the type's summed counts
    against those of all other cells, in CPM. A few cells give noisy fold changes, and noise in the
    predictor attenuates a least-squares slope (regression dilution; Fuller, Measurement Error
    Models, 1987), even of perfect cells. The halves share no cell and so no noise: each is the
    other's instrument. All four have as many cells of each type, so that the logarithm of noisy
    means is biased alike. Numerator and denominator are means over ``N_SPLITS`` random splits.
    Above 1 fold changes are exaggerated, or share the noise of these very real cells.

    Args:
        real, generated: counts (N x G), (M x G), CSR. real_codes, generated_codes: types (N), (M).
        seed: of the splits.

    Returns:
        dict: type code -> slope. Types that have, or leave to the others, fewer than ``MIN_CELLS``
        in a half have none, nor do types whose halves hardly agree: r² G <= 10 for their
        correlation r, a weak instrument (Staiger and Stock, Econometrica 1997).
    """
    sides = (real, real_codes), (generated, generated_codes)
    types = np.intersect1d(real_codes, generated_codes)
    size = np.array([min((codes == k).sum() for _, codes in sides) // 2 for k in types], int)
    types, size = types[size > 0], size[size > 0]
    if len(types) < 2:
        return {}
    rng = np.random.default_rng(seed)
    above, below, spread = (np.zeros(len(types)) for _ in range(3))
    for _ in range(N_SPLITS):
        (a, b), (c, d) = (
            [type_changes(X, part) for part in draw_halves(codes, types, size, rng)]
            for X, codes in sides
        )
        above += ((c + d) * (a + b)).sum(axis=1)
        below += 4 * (a * b).sum(axis=1)
        spread += 2 * (a**2 + b**2).sum(axis=1)
    strong = below > np.sqrt(10 / real.shape[1]) * spread
    enough = strong & (np.minimum(size, size.sum() - size) >= MIN_CELLS)
    return {int(k): above[i] / below[i] for i, k in enumerate(types) if enough[i]}


def draw_halves(codes, types, size, rng):
    """Two sets of cells without a cell in common, with ``size`` (K) cells of ``types`` (K).

    Returns:
        two lists of the indices of each type's cells.
    """
    orders = [rng.permutation(np.flatnonzero(codes == k)) for k in types]
    pairs = list(zip(orders, size, strict=True))
    return [order[:n] for order, n in pairs], [order[n : 2 * n] for order, n in pairs]


def type_changes(X, cells):
    """log2 fold changes of types against all others together, less their mean over genes (K, G).

    X: counts (N x G), CSR. cells: the indices of each type's cells (K).
    """
    sums = np.stack([np.asarray(X[rows].sum(axis=0)).ravel() for rows in cells]).astype(float)
    others = sums.sum(axis=0) - sums
    cpm = [1e6 * part / part.sum(axis=1, keepdims=True).clip(1) for part in (others, sums)]
    change = fold_changes(*cpm)
    return change - change.mean(axis=1, keepdims=True)


# ---------------------------------------------------------------- generated against real cells


@dataclass
class Features:
    """What the metrics compare of some cells (N)."""

    log: np.ndarray
    """Log-expression of the variable genes (N, P)."""
    pcs: np.ndarray
    """Their PCs (N, 20)."""
    correlated: np.ndarray
    """Log-expression of the genes whose correlations are compared (N, 200)."""
    markers: dict[int, np.ndarray]
    """Log-expression of each type's markers: type code -> (N, 20)."""
    counts: sp.csr_matrix
    """Counts of all genes (N x G)."""
    library_size: np.ndarray
    """Total counts (N)."""


class CellMetrics:
    """Metrics of generated cells against held-out real ones, in a space fitted on all real cells.

    Log-expression is log1p of counts per 10,000. Markers come from the training cells alone.

    Args:
        cells: AnnData of real cells (N x G). held_out: mask (N). codes: cell types (N).
        n_trees: trees of each random forest.
    """

    def __init__(self, cells, held_out, codes, n_trees=300):
        log = cells.copy()
        log.X = log_normalise(cells.X)
        scanpy.pp.highly_variable_genes(log, n_top_genes=min(N_VARIABLE, log.n_vars))
        self.variable = np.flatnonzero(log.var["highly_variable"])
        correlated = choose_genes(cells, min(N_CORRELATED, cells.n_vars))
        self.correlated = cells.var_names.get_indexer(correlated)
        self.markers = markers_by_test(log[~held_out], codes[~held_out], N_MARKERS)

        variable = log.X[:, self.variable].toarray()  # (N, P)
        self.pca = PCA(min(N_PCS, *variable.shape), random_state=0).fit(variable)
        self.all_pcs, self.trained_on = self.pca.transform(variable), ~held_out
        self.real = self.features(cells.X[np.flatnonzero(held_out)])
        self.codes, self.n_trees = codes[held_out], n_trees
        # The share among real cells that no model was trained on; copying shows in the excess.
        self.expected_share = trained_on_share(
            self.real.pcs, self.all_pcs, self.trained_on, skip_self=True
        )

    def features(self, X):
        """Features of cells with counts X (M x G)."""
        log = log_normalise(X)  # (M x G)
        variable = log[:, self.variable].toarray()  # (M, P)
        return Features(
            log=variable,
            pcs=self.pca.transform(variable),
            correlated=log[:, self.correlated].toarray(),
            markers={k: log[:, genes].toarray() for k, genes in self.markers.items()},
            counts=X,
            library_size=library_size(X),
        )

    def compare(self, X, codes, seed, trained_on=False):
        """All metrics of generated cells.

        Args:
            X: counts (M x G), CSR. codes: cell types (M). seed: of forests and of random halves.
            trained_on: the cells are training cells themselves.

        Returns:
            list of (metric, type code, value); the code is None for a metric of all cells.
        """
        generated = self.features(X)
        overall = self.of_all_cells(generated, codes, seed, trained_on)
        rows = [(metric, None, value) for metric, value in overall.items()]
        for metric, values in self.by_type(generated, codes, seed).items():
            # Each type counts the same, so that a large one does not decide the metric.
            rows += [(metric, None, np.mean(list(values.values())))]
            rows += [(metric, k, value) for k, value in values.items()]
        return rows

    def of_all_cells(self, generated, codes, seed, trained_on):
        """dict: metric -> value, of all cells together."""
        real = self.real
        share = trained_on_share(generated.pcs, self.all_pcs, self.trained_on, skip_self=trained_on)
        library = scipy.stats.ks_2samp(real.library_size, generated.library_size)
        return {
            "random-forest AUROC, PCs": random_forest_auroc(
                real.pcs, generated.pcs, seed, self.n_trees
            ),
            "random-forest AUROC, genes": random_forest_auroc(
                real.log, generated.log, seed, self.n_trees
            ),
            "MMD2, PCs": mmd2(real.pcs, generated.pcs),
            "gene-gene correlation RMSE": correlation_rmse(real.correlated, generated.correlated),
            "zero-fraction error": zero_fraction_error(real.log, generated.log),
            "library-size KS": library.statistic,
            "macro-F1, generated to real": macro_f1(generated.pcs, codes, real.pcs, self.codes),
            "nearest neighbour trained on, excess": share - self.expected_share,
        }

    def by_type(self, generated, codes, seed):
        """dict: metric -> {type code: value}."""
        ratios = within_type_variance_ratio(self.real.pcs, self.codes, generated.pcs, codes)
        values = {"within-type variance ratio": ratios}
        for k in ratios:  # the types with enough cells
            for metric, value in self.of_type(k, generated, codes).items():
                values.setdefault(metric, {})[k] = value
        both = (self.real.counts, self.codes), (generated.counts, codes)
        if slopes := fold_change_slopes(*both[0], *both[1], seed):
            values["fold-change slope"] = slopes
        return values

    def of_type(self, k, generated, codes):
        """dict: metric -> value, of the cells of type k."""
        real, r, g = self.real, self.codes == k, codes == k
        values = {"energy distance": energy_distance(real.pcs[r], generated.pcs[g])}
        if k in self.markers:
            mean, fraction = marker_errors(real.markers[k][r], generated.markers[k][g])
            values |= {"marker mean error": mean, "marker fraction error": fraction}
        if min((~r).sum(), (~g).sum()) >= MIN_CELLS:
            change = log_fold_change(real.log, r), log_fold_change(generated.log, g)
            values["fold-change correlation"] = np.corrcoef(*change)[0, 1]
        return values


# ------------------------------------------------------------- predicted against true proportions


def concordance(true, predicted):
    """Lin's concordance correlation coefficient over all entries; 1 is best.

    Lin, Biometrics 1989.
    """
    t, p = np.ravel(true), np.ravel(predicted)
    return 2 * np.cov(t, p, bias=True)[0, 1] / (t.var() + p.var() + (t.mean() - p.mean()) ** 2)


def pearson_within(true, predicted):
    """Pearson's correlation over the samples, within each type or lineage (K).

    Concordance over all entries is high for any answer that knows which types are common, even
    the same for every sample; this is not. true, predicted: (S, K). A constant prediction has 0; a
    constant truth has NaN.
    """
    t, p = (np.asarray(part, float) - part.mean(axis=0) for part in (true, predicted))
    norm = np.sqrt((t**2).sum(axis=0) * (p**2).sum(axis=0))
    is_constant = np.ptp(predicted, axis=0) < 1e-12
    r = np.where(is_constant, 0.0, (t * p).sum(axis=0) / np.where(is_constant, 1, norm + 1e-300))
    return np.where(np.ptp(true, axis=0) < 1e-12, np.nan, r)


def proportion_metrics(true, predicted, suffix, of="lineage"):
    """dict: metric -> value, of true and predicted proportions, (S, K) or (S, L).

    RMSE, CCC and MAE are over all entries; Pearson is the mean over the types or lineages in which
    it is defined. suffix, of: as :func:`proportion_names` has them.
    """
    error = predicted - true
    within = pearson_within(true, predicted)
    values = (
        np.sqrt(np.mean(error**2)),
        concordance(true, predicted),
        np.abs(error).mean(),
        np.nan if np.isnan(within).all() else np.nanmean(within),
    )
    return dict(zip(proportion_names(suffix, of), values, strict=True))


def to_lineages(proportions, names, lineages):
    """Proportions (S, K) summed to lineages and renormalised over these (S, L).

    names: lineage of each column (K); a column of None or of another name is left out. A row
    without anything of these lineages becomes uniform.
    """
    member = np.array([[name == lineage for lineage in lineages] for name in names], float)
    summed = proportions @ member
    total = summed.sum(axis=1, keepdims=True)
    return np.where(total > 0, summed / np.where(total > 0, total, 1), 1 / len(lineages))


# ------------------------------------------------ fold changes between samples inside cell types

PSEUDOCOUNT = 10  # CPM, added to both sides of a fold change
EXPRESSED = 30  # CPM from which the fold change of a gene counts
DIFFERENT = 1  # log2 fold change between types from which a gene counts as specific
FALSE_EXPRESSED, FALSE_CHANGE = 50, 0.5  # CPM and log2 fold change of a false change


def fold_changes(a, b):
    """log2 fold changes from a to b, both in CPM, of the same shape."""
    return np.log2((b + PSEUDOCOUNT) / (a + PSEUDOCOUNT))


def pearson(true, predicted):
    """Pearson correlation; 0 for a constant prediction, nan where there is nothing to predict."""
    if len(true) < 2 or np.std(true) < 1e-9:
        return np.nan
    return 0.0 if np.std(predicted) < 1e-9 else np.corrcoef(true, predicted)[0, 1]


def fold_change_metrics(true_a, true_b, predicted_a, predicted_b):
    """Predicted against true fold changes from one sample to another, inside each cell type.

    Pearson correlation and Lin's concordance are over the genes above EXPRESSED in the truth of
    either sample; attenuated changes lower the concordance alone. ``specific`` asks whether changes
    are in the right type: from the fold changes of all types each gene's mean over types is taken
    away, and of the genes where the truth then differs by more than DIFFERENT in some type all
    type x gene entries are correlated.

    Args:
        true_a, true_b, predicted_a, predicted_b: profiles in CPM (K, G); NaN rows where a type is
            missing.

    Returns:
        ``(overall, by_type, n_left_out)``: dict metric -> value, the mean over types; dict metric
        -> values (K), NaN for types that are missing in the truth or the prediction or that no gene
        changes in; and the number of types missing.
    """
    parts = (true_a, true_b, predicted_a, predicted_b)
    there = ~np.any([np.isnan(part).any(axis=1) for part in parts], axis=0)  # (K)
    correlation, agreement = np.full(len(there), np.nan), np.full(len(there), np.nan)
    true, predicted = fold_changes(true_a, true_b), fold_changes(predicted_a, predicted_b)  # (K, G)
    for k in np.flatnonzero(there):
        genes = np.maximum(true_a[k], true_b[k]) > EXPRESSED
        t, p = true[k, genes], predicted[k, genes]
        correlation[k] = pearson(t, p)
        if not np.isnan(correlation[k]):
            agreement[k] = concordance(t, p) if correlation[k] else 0.0  # of a constant: not -0
    by_type = {"fold change Pearson": correlation, "fold change concordance": agreement}
    overall = {metric: mean_of_known(values) for metric, values in by_type.items()}
    overall["fold change specific"] = specific_correlation(true[there], predicted[there])
    return overall, by_type, int(np.sum(~there))


def specific_correlation(true, predicted):
    """``specific`` of :func:`fold_change_metrics`; fold changes (K, G). nan if no gene differs."""
    if len(true) < 2:
        return np.nan
    t, p = true - true.mean(axis=0), predicted - predicted.mean(axis=0)
    genes = (np.abs(t) > DIFFERENT).any(axis=0)
    return pearson(t[:, genes].ravel(), p[:, genes].ravel())


def mean_of_known(values):
    """Mean of the values that are not NaN; NaN if there is none."""
    known = values[~np.isnan(values)]
    return known.mean() if len(known) else np.nan


def false_changes(a, b):
    """Share of genes that seem to change between two samples of the same state, each type (K).

    Of genes above FALSE_EXPRESSED in either, those with an absolute log2 fold change above
    FALSE_CHANGE. a, b: profiles in CPM (K, G), NaN rows where a type is missing; there and where no
    gene is expressed the share is NaN.
    """
    expressed = np.maximum(a, b) > FALSE_EXPRESSED  # (K, G), False where NaN
    changed = expressed & (np.abs(fold_changes(a, b)) > FALSE_CHANGE)
    n = expressed.sum(axis=1)
    return np.where(n > 0, changed.sum(axis=1) / np.maximum(n, 1), np.nan)
