"""Generated cells against held-out real ones, and predicted against true proportions.

    python evaluate.py
    python evaluate.py --data filtered_feature_bc_matrix --weights my_weights

Every figure is read on the cells that no training has seen; "other real cells" are the training
cells measured the same way, which is as good as generated cells can be expected to become.
Writes evaluation.csv to --weights.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.optimize
import scipy.sparse as sp
import scipy.stats
import torch
from tqdm import trange

from bulk2sc import decode_cells, encode_bulks
from data import (
    DatasetSettings,
    InputError,
    align_genes,
    apply_split,
    codes_of,
    draw_pseudobulks,
    library_size,
    load_cells,
    mean_counts,
    run_script,
    write_whole,
)
from models import (
    BulkEncoder,
    check_cell_types,
    check_mixture,
    load_model,
    pick_device,
    scDecoder,
    seed_everything,
)


@dataclass
class Settings(DatasetSettings):
    n_draws: int = 3
    """Times the generated cells and the pseudobulks are drawn; figures are mean and spread."""
    n_pseudobulks: int = 100
    """Pseudobulks of held-out cells per draw, proportions from Dirichlet(1)."""
    cells_per_bulk: int = 500
    """Cells in each pseudobulk."""

    def __post_init__(self):
        super().__post_init__()
        if min(self.n_draws, self.n_pseudobulks, self.cells_per_bulk) < 1:
            raise InputError("--n-draws, --n-pseudobulks, --cells-per-bulk: expected 1 or more")


# ------------------------------------------------------------------------------------ figures


def within_type_variance_ratio(real, real_codes, made, made_codes):
    """Variance within cell types, made over real; 1 is best. real, made: (N, P) PCs.

    For each type with at least three cells on either side, the variance summed over PCs; then the
    mean of the types' ratios, so that one type with a few odd cells does not decide the figure.
    """
    ratios = []
    for k in np.unique(real_codes):
        r, m = real[real_codes == k], made[made_codes == k]
        if min(len(r), len(m)) > 2:
            ratios.append(m.var(axis=0, ddof=1).sum() / r.var(axis=0, ddof=1).sum())
    return np.mean(ratios)


def random_forest_auroc(real, made, seed):
    """Cross-validated AUROC of a random forest told to tell real from made; 0.5 is best."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    X = np.vstack([real, made])
    y = np.repeat([0, 1], [len(real), len(made)])
    forest = RandomForestClassifier(300, random_state=seed, n_jobs=-1)
    # Shuffled: cells may come sorted by type, and a fold of one type alone reads far below 0.5.
    folds = StratifiedKFold(min(5, len(real), len(made)), shuffle=True, random_state=seed)
    score = cross_val_predict(forest, X, y, cv=folds, method="predict_proba")
    return roc_auc_score(y, score[:, 1])


def mmd2(real, made):
    """Unbiased squared maximum mean discrepancy, Gaussian kernel of median width; 0 is best.

    Gretton et al., JMLR 2012, equation 3. real (N, P), made (M, P).
    """
    from sklearn.metrics import pairwise_distances

    d = pairwise_distances(np.vstack([real, made]), metric="sqeuclidean")
    k = np.exp(-d / np.median(d[d > 0]))
    n, m = len(real), len(made)
    rr, mm, rm = k[:n, :n], k[n:, n:], k[:n, n:]
    return (
        (rr.sum() - np.trace(rr)) / (n * (n - 1))
        + (mm.sum() - np.trace(mm)) / (m * (m - 1))
        - 2 * rm.mean()
    )


def concordance(true, predicted):
    """Lin's concordance correlation coefficient over all entries; 1 is best."""
    t, p = np.ravel(true), np.ravel(predicted)
    return 2 * np.cov(t, p, bias=True)[0, 1] / (t.var() + p.var() + (t.mean() - p.mean()) ** 2)


def nnls_proportions(bulk, profiles):
    """Proportions by non-negative least squares on mean count profiles, the field's baseline.

    bulk (S, G) and profiles (K, G) are counts of cells of their natural depth, so that weights
    are cell numbers. Returns (S, K), rows summing to 1.
    """
    weights = np.stack([scipy.optimize.nnls(profiles.T, b / b.sum())[0] for b in bulk])
    return weights / weights.sum(axis=1, keepdims=True)


class CellFigures:
    """Figures of made cells against the held-out real ones, in a space fitted on all real cells.

    Log-normalised to 1e4, 1,000 highly variable genes, 20 PCs.
    """

    def __init__(self, cells, held_out, codes):
        import scanpy

        real = cells.copy()
        real.X = real.X.astype(np.float32)
        scanpy.pp.normalize_total(real, target_sum=1e4)
        scanpy.pp.log1p(real)
        scanpy.pp.highly_variable_genes(real, n_top_genes=min(1000, real.n_vars))
        self.genes = real.var["highly_variable"].to_numpy()
        from sklearn.decomposition import PCA

        log = self.log(cells.X)
        self.pca = PCA(min(20, *log.shape), random_state=0).fit(log)
        self.real = self.describe(cells.X[np.flatnonzero(held_out)], log[held_out])
        self.codes = codes[held_out]

    def log(self, X):
        """log1p of counts per 10,000 at the variable genes (N, P)."""
        total = library_size(X)
        part = np.asarray(X[:, np.flatnonzero(self.genes)].todense(), dtype=np.float64)
        return np.log1p(part / np.maximum(total, 1)[:, None] * 1e4)

    def describe(self, X, log=None):
        log = self.log(X) if log is None else log
        return dict(log=log, pcs=self.pca.transform(log), library=library_size(X))

    def compare(self, X, codes, seed):
        """All figures of made cells: counts X (M x G) and type codes (M)."""
        made, real = self.describe(X), self.real
        zeros = np.abs((made["log"] == 0).mean(axis=0) - (real["log"] == 0).mean(axis=0))
        return {
            "random-forest AUROC, PCs": random_forest_auroc(real["pcs"], made["pcs"], seed),
            "random-forest AUROC, genes": random_forest_auroc(real["log"], made["log"], seed),
            "MMD2, PCs": mmd2(real["pcs"], made["pcs"]),
            "within-type variance ratio": within_type_variance_ratio(
                real["pcs"], self.codes, made["pcs"], codes
            ),
            "zero-fraction error": zeros.mean(),
            "library-size KS": scipy.stats.ks_2samp(real["library"], made["library"]).statistic,
        }


def measure_cells(cells, codes, held_out, decoder, genes, cfg, rng):
    """Rows (method, figure, value): generated cells, and the training cells in their place.

    genes: names of the decoder's genes.
    """
    test, train = np.flatnonzero(held_out), np.flatnonzero(~held_out)
    figures = CellFigures(cells, held_out, codes)
    generator = torch.Generator(decoder.mu.device).manual_seed(cfg.seed)
    rows = []
    for draw in trange(cfg.n_draws, desc="cells", unit="draw"):
        # As many cells of each type as are held out, so that only the cells themselves differ.
        k = torch.as_tensor(codes[test], device=decoder.mu.device)
        X, _ = decode_cells(decoder, decoder.mu[k], decoder.var[k], k, generator)
        X, _ = align_genes(X, genes, list(cells.var_names), "the decoder", report=False)
        rows += [("bulk2sc", *r) for r in figures.compare(X, codes[test], draw).items()]
        other = []
        for c, n in zip(*np.unique(codes[test], return_counts=True), strict=True):
            own = train[codes[train] == c]
            other.append(rng.choice(own, n, replace=len(own) < n))
        other = np.concatenate(other)
        compared = figures.compare(cells.X[other], codes[other], draw)
        rows += [("other real cells", *r) for r in compared.items()]
    return rows


def measure_proportions(cells, codes, n_types, held_out, encoder, genes, cfg, rng):
    """Rows (method, figure, value) on pseudobulks of held-out cells, NNLS on the same genes.

    genes: names of the encoder's genes.
    """
    X, present = align_genes(cells.X, cells.var_names, genes, "the encoder", report=False)
    X_test, codes_test = X[np.flatnonzero(held_out)], codes[held_out]
    profiles = mean_counts(X[np.flatnonzero(~held_out)], codes[~held_out], n_types)
    # A type of which no cell is held out cannot be in a held-out bulk.
    has_cells = np.isin(np.arange(n_types), codes_test)
    rows = []
    for _ in trange(cfg.n_draws, desc="proportions", unit="draw"):
        expected = np.zeros((cfg.n_pseudobulks, n_types))
        expected[:, has_cells] = rng.dirichlet(np.ones(has_cells.sum()), cfg.n_pseudobulks)
        bulk, true = draw_pseudobulks(X_test, codes_test, expected, cfg.cells_per_bulk, rng)
        _, _, pi = encode_bulks(encoder, sp.csr_matrix(bulk), present, encoder.mu.device)
        for method, predicted in (
            ("bulk2sc", pi.cpu().numpy()),
            ("NNLS", nnls_proportions(bulk, profiles)),
        ):
            rmse = np.sqrt(np.mean((predicted - true) ** 2))
            rows += [(method, "proportions RMSE", rmse)]
            rows += [(method, "proportions CCC", concordance(true, predicted))]
    return rows


def main(cfg):
    rng = seed_everything(cfg.seed)
    device = pick_device(cfg.device)
    cells = load_cells(cfg)
    codes, cell_types = codes_of(cells)
    decoder_file = cfg.weights / "scDecoder_model.pt"
    encoder_file = cfg.weights / "bulkEncoder_model.pt"
    decoder, decoder_card = load_model(decoder_file, scDecoder, device)
    encoder, encoder_card = load_model(encoder_file, BulkEncoder, device)
    for file, card in ((decoder_file, decoder_card), (encoder_file, encoder_card)):
        check_cell_types(file, card, cell_types)
    check_mixture(encoder_file, encoder, decoder.mu, decoder.var, decoder_file)
    held_out = apply_split(cells, decoder_card["held_out"], decoder_file)
    if held_out.sum() < 2:
        raise InputError(f"{decoder_file}: no cells were held out, so nothing can be measured")

    rows = measure_cells(cells, codes, held_out, decoder, decoder_card["genes"], cfg, rng)
    rows += measure_proportions(
        cells, codes, len(cell_types), held_out, encoder, encoder_card["genes"], cfg, rng
    )
    table = pd.DataFrame(rows, columns=["method", "figure", "value"])
    table = table.groupby(["figure", "method"], sort=False)["value"].agg(["mean", "std", "count"])
    write_whole(cfg.weights / "evaluation.csv", table.to_csv)
    shown = table.apply(lambda r: f"{r['mean']:.4f} ± {r['std']:.4f}", axis=1).to_dict()
    figure_names, methods = (list(dict.fromkeys(i)) for i in zip(*shown, strict=True))
    wide = [[shown.get((f, m), "") for m in methods] for f in figure_names]
    print(pd.DataFrame(wide, figure_names, methods).to_string())
    print(
        f"wrote {cfg.weights / 'evaluation.csv'}: {held_out.sum()} held-out cells, "
        f"{cfg.n_draws} draws"
    )


if __name__ == "__main__":
    run_script(main, Settings)
