"""Generated against real cells, predicted against true proportions: every metric."""

import numpy as np
import pandas as pd
import scipy.optimize
import scipy.stats

from data import choose_genes, library_size, log_normalise

METRICS = {  # every metric in the order of the tables, and its best possible value
    "random-forest AUROC, PCs": 0.5,
    "random-forest AUROC, genes": 0.5,
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
    "nearest neighbour trained on, excess": 0,
    "sum of cells against bulk, Pearson": 1,
} | {
    f"proportions {measure}{where}": best
    for where in ("", ", lineages", ", shift", ", shift, lineages", ", real bulk")
    for measure, best in (("RMSE", 0), ("CCC", 1), ("MAE", 0), ("Pearson", 1))
    if measure != "Pearson" or where == ", real bulk"
}

N_MARKERS = 20  # per cell type


def within_type_variance_ratio(real, real_codes, generated, generated_codes):
    """Variance within cell types, generated over real; 1 is best. real, generated: (N, P) PCs.

    For each type with at least three cells on either side, the variance summed over PCs.

    Returns:
        dict: type code -> ratio.
    """
    ratios = {}
    for k in np.unique(real_codes):
        r, m = real[real_codes == k], generated[generated_codes == k]
        if min(len(r), len(m)) > 2:
            ratios[int(k)] = m.var(axis=0, ddof=1).sum() / r.var(axis=0, ddof=1).sum()
    return ratios


def random_forest_auroc(real, generated, seed, n_trees=300):
    """Cross-validated AUROC of a random forest for generated against real cells; 0.5 is best."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    X = np.vstack([real, generated])
    y = np.repeat([0, 1], [len(real), len(generated)])
    forest = RandomForestClassifier(n_trees, random_state=seed, n_jobs=-1)
    # Shuffled: cells may come sorted by type, and a fold of one type alone reads far below 0.5.
    folds = StratifiedKFold(min(5, len(real), len(generated)), shuffle=True, random_state=seed)
    score = cross_val_predict(forest, X, y, cv=folds, method="predict_proba")
    return roc_auc_score(y, score[:, 1])


def pairwise_discrepancy(real, generated, kernel):
    """E k(X, X') + E k(Y, Y') - 2 E k(X, Y), unbiased: no point is paired with itself.

    real (N, P), generated (M, P). kernel: function of all pairwise distances (N + M, N + M).
    """
    from sklearn.metrics import pairwise_distances

    k = kernel(pairwise_distances(np.vstack([real, generated])))
    n, m = len(real), len(generated)
    rr, mm, rm = k[:n, :n], k[n:, n:], k[:n, n:]
    return (
        (rr.sum() - np.trace(rr)) / (n * (n - 1))
        + (mm.sum() - np.trace(mm)) / (m * (m - 1))
        - 2 * rm.mean()
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

    real (N, P), generated (M, P): log-expression of the same genes. Constant genes correlate as 0.
    """
    upper = np.triu_indices(real.shape[1], 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        r, m = (np.nan_to_num(np.corrcoef(a, rowvar=False))[upper] for a in (real, generated))
    return np.sqrt(np.mean((r - m) ** 2))


def macro_f1(train, train_codes, test, test_codes):
    """F1, mean over cell types, of a logistic regression on PCs trained on one set of cells."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score

    predicted = LogisticRegression(max_iter=2000).fit(train, train_codes).predict(test)
    return f1_score(test_codes, predicted, average="macro", labels=np.unique(test_codes))


def trained_on_share(cells, real, trained_on, skip_self=False):
    """Share of cells whose nearest real neighbour is one the model was trained on.

    Copies of training cells read 1. cells (M, P), real (N, P) PCs, trained_on bool (N).
    skip_self: the cells are among the real ones, so the nearest is the cell itself.
    """
    from sklearn.neighbors import NearestNeighbors

    n = 1 + skip_self
    nearest = NearestNeighbors(n_neighbors=n).fit(real).kneighbors(cells, return_distance=False)
    return trained_on[nearest[:, -1]].mean()


def concordance(true, predicted):
    """Lin's concordance correlation coefficient over all entries; 1 is best."""
    t, p = np.ravel(true), np.ravel(predicted)
    return 2 * np.cov(t, p, bias=True)[0, 1] / (t.var() + p.var() + (t.mean() - p.mean()) ** 2)


class CellMetrics:
    """Metrics of generated against held-out real cells, in a space fitted on all real cells.

    Log-normalised to 1e4; 1,000 highly variable genes for zeros and the forest on genes, and 20 PCs
    of them; 200 genes by seurat_v3 for correlations; 20 markers of each cell type by t-test on the
    training cells.

    Args:
        cells: AnnData (N) of real cells. held_out: bool (N). codes: cell types (N).
        n_trees: of each random forest.
    """

    def __init__(self, cells, held_out, codes, n_trees=300):
        import scanpy
        from sklearn.decomposition import PCA

        real = cells.copy()
        real.X = log_normalise(cells.X)
        scanpy.pp.highly_variable_genes(real, n_top_genes=min(1000, real.n_vars))
        self.genes = np.flatnonzero(real.var["highly_variable"])
        correlated = choose_genes(cells, min(200, cells.n_vars))
        self.correlated = cells.var_names.get_indexer(correlated)
        self.markers = find_markers(real[~held_out], codes[~held_out])

        log = real.X[:, self.genes].toarray()  # (N, P)
        self.pca = PCA(min(20, *log.shape), random_state=0).fit(log)
        self.all_pcs, self.held_out = self.pca.transform(log), held_out
        self.codes, self.n_trees = codes[held_out], n_trees
        self.real = self.describe(cells.X[np.flatnonzero(held_out)])
        # What copying must be compared with: real cells that nothing was trained on.
        self.expected_share = trained_on_share(
            self.real["pcs"], self.all_pcs, ~held_out, skip_self=True
        )

    def describe(self, X):
        log = log_normalise(X)  # (M, G)
        variable = log[:, self.genes].toarray()  # (M, P)
        return dict(
            log=variable,
            pcs=self.pca.transform(variable),
            correlated=log[:, self.correlated].toarray(),
            markers={k: log[:, genes].toarray() for k, genes in self.markers.items()},
            library=library_size(X),
        )

    def compare(self, X, codes, seed, trained_on=False):
        """All metrics of generated cells: counts X (M x G) and type codes (M).

        trained_on: they are training cells themselves.

        Returns:
            list of (metric, type code, value); the code is None for a metric of all cells.
        """
        generated, real = self.describe(X), self.real
        zeros = np.abs((generated["log"] == 0).mean(axis=0) - (real["log"] == 0).mean(axis=0))
        share = trained_on_share(
            generated["pcs"], self.all_pcs, ~self.held_out, skip_self=trained_on
        )
        auroc_pcs, auroc_genes = (
            random_forest_auroc(real[space], generated[space], seed, self.n_trees)
            for space in ("pcs", "log")
        )
        whole = {
            "random-forest AUROC, PCs": auroc_pcs,
            "random-forest AUROC, genes": auroc_genes,
            "MMD2, PCs": mmd2(real["pcs"], generated["pcs"]),
            "gene-gene correlation RMSE": correlation_rmse(
                real["correlated"], generated["correlated"]
            ),
            "zero-fraction error": zeros.mean(),
            "library-size KS": scipy.stats.ks_2samp(
                real["library"], generated["library"]
            ).statistic,
            "macro-F1, generated to real": macro_f1(
                generated["pcs"], codes, real["pcs"], self.codes
            ),
            "nearest neighbour trained on, excess": share - self.expected_share,
        }
        rows = [(metric, None, value) for metric, value in whole.items()]
        by_type = {
            "within-type variance ratio": within_type_variance_ratio(
                real["pcs"], self.codes, generated["pcs"], codes
            )
        }
        for k in np.unique(self.codes):
            r, m = self.codes == k, codes == k
            if min(r.sum(), m.sum()) < 3:
                continue
            own = {"energy distance": energy_distance(real["pcs"][r], generated["pcs"][m])}
            if k in self.markers:
                a, b = real["markers"][k][r], generated["markers"][k][m]
                own["marker mean error"] = np.abs(a.mean(axis=0) - b.mean(axis=0)).mean()
                expressing = np.abs((a > 0).mean(axis=0) - (b > 0).mean(axis=0))
                own["marker fraction error"] = expressing.mean()
            if min((~r).sum(), (~m).sum()) > 2:
                # Difference of means of log-expression, type against the rest, each gene.
                change = (
                    log[own_type].mean(axis=0) - log[~own_type].mean(axis=0)
                    for log, own_type in ((real["log"], r), (generated["log"], m))
                )
                own["fold-change correlation"] = np.corrcoef(*change)[0, 1]
            for metric, value in own.items():
                by_type.setdefault(metric, {})[int(k)] = value
        for metric, values in by_type.items():
            # The mean of the types, so that one type with a few odd cells does not decide it.
            rows += [(metric, None, np.mean(list(values.values())))]
            rows += [(metric, k, value) for k, value in values.items()]
        return rows


def find_markers(real, codes):
    """Indices of the 20 genes that mark each type, by t-test against the rest.

    real: AnnData of log-normalised cells. codes (N). Types of fewer than two cells have none.

    Returns:
        dict: type code -> gene indices.
    """
    import scanpy

    real = real.copy()
    real.obs["code"] = pd.Categorical(codes.astype(str))
    size = pd.Series(codes).value_counts()
    groups = [str(k) for k in size.index if size[k] > 1]
    if real.obs["code"].nunique() < 2 or not groups:
        return {}
    scanpy.tl.rank_genes_groups(real, "code", groups=groups, method="t-test", n_genes=N_MARKERS)
    names = real.uns["rank_genes_groups"]["names"]
    return {int(k): real.var_names.get_indexer(names[k]) for k in names.dtype.names}


def to_lineages(proportions, names, lineages):
    """Proportions (S x K) summed to lineages and renormalised over these (S x L).

    names: lineage of each column (K), None or another name where it is left out. A row that has
    nothing of any lineage becomes even.
    """
    member = np.array([[name == lineage for lineage in lineages] for name in names], float)
    summed = proportions @ member
    total = summed.sum(axis=1, keepdims=True)
    return np.where(total > 0, summed / np.where(total > 0, total, 1), 1 / len(lineages))


def proportion_metrics(true, predicted, where):
    """dict: name of metric -> value, over all entries; true, predicted (S, K or L).

    where: the end of the names, as in ``METRICS``.
    """
    error = predicted - true
    values = {
        "RMSE": np.sqrt(np.mean(error**2)),
        "CCC": concordance(true, predicted),
        "MAE": np.abs(error).mean(),
    }
    return {f"proportions {measure}{where}": value for measure, value in values.items()}
