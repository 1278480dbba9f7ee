"""Generated cells against held-out real ones, beside simple baselines; proportions likewise.

    python evaluate.py
    python evaluate.py --data filtered_feature_bc_matrix --weights my_weights
    python evaluate.py --weights w0 --more-weights w1 w2       # mean ± std over three trainings
    python evaluate.py --bulk samples.csv --fractions measured.csv --lineages lineages.csv

Every figure is read on cells that no training has seen. Columns of the table:

- bulk2sc: z ~ N(mu_k, sigma_k^2) -> scDecoder, as many cells of each type as are held out
- calibrated: the same with bulk2sc.py --calibrate, to the sum of the held-out cells
- other real cells: training cells in the place of generated ones
- unseen real cells: the half of the training cells that the figures' space was not fitted on
- cell-type NB: each gene negative binomial with its cell type's training mean and variance
- published recipe: scDecoder with --pairing prior --loss mse_l1, trained here
- scVI: if scvi-tools is installed, trained here

Predicted proportions have a table of their own beside NNLS, non-negative least squares: on
pseudobulks of held-out cells, the same after a simulated change of platform, and real bulks whose
proportions were measured.

Writes evaluation.csv (with every cell type on its own as well) and evaluation.png to --weights.
"""

import contextlib
import importlib.util
import io
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.optimize
import scipy.sparse as sp
import scipy.stats
import torch
from tqdm import trange

import train_decoder
from bulk2sc import (
    add_to_sums,
    calibration,
    check_filled,
    decode_cells,
    draw_types,
    encode_bulks,
    expected_bulk,
    sum_agreement,
)
from data import (
    DatasetSettings,
    align_genes,
    apply_split,
    choose_genes,
    clean_label,
    codes_of,
    draw_pseudobulks,
    flag,
    library_size,
    load_cells,
    mean_counts,
    natural_order,
    read_bulk,
    read_counts,
    run_script,
    split_cells,
)
from files import InputError, read_table, some, write_whole
from models import (
    MIXTURE_FILES,
    BulkEncoder,
    check_cell_types,
    check_mixture,
    load_model,
    pick_device,
    scDecoder,
    seed_everything,
)
from plotting import write_evaluation

BEST = {  # every figure, in the order of the table, and its value for perfect cells
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
BULKS_PER_PLATFORM = 20  # of those under a simulated shift
SHIFT_DEPTH = 2e5  # their counts


@dataclass
class Settings(DatasetSettings):
    more_weights: tuple[Path, ...] = ()
    """Further weights folders, of other seeds; figures are then mean and std over trainings."""
    generated: Path | None = None
    """An .h5ad of generated cells to measure, as bulk2sc.py writes it; default: generate them."""
    n_draws: int = 3
    """Times the cells and the pseudobulks are drawn from each training."""
    n_pseudobulks: int = 100
    """Pseudobulks of held-out cells per draw, proportions from Dirichlet(1)."""
    cells_per_bulk: int = 500
    """Cells in each pseudobulk."""
    n_trees: int = 300
    """Trees of each random forest, the slowest of the figures."""
    baselines: bool = True
    """Measure the baselines too; --no-baselines saves their training."""
    bulk: Path | None = None
    """Real bulk samples, read as bulk2sc.py reads them, to be compared with --fractions."""
    fractions: Path | None = None
    """Their measured fractions: a csv, first column sample, then one column for each lineage."""
    lineages: Path | None = None
    """What --fractions calls the cell types: a csv cell_type,lineage. Alone, it has the proportions
    of pseudobulks measured over lineages too."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("n_draws", "n_pseudobulks", "cells_per_bulk", "n_trees"):
            if (found := getattr(self, name)) < 1:
                raise InputError(f"{flag(name)}: found {found}, expected 1 or more")
        if self.generated is not None and self.more_weights:
            raise InputError("--generated: one file of cells, expected no --more-weights with it")
        needed = ("bulk", "fractions", "lineages")
        missing = [flag(name) for name in needed if getattr(self, name) is None]
        if missing and not (self.bulk is self.fractions is None):
            given = " and ".join(flag(name) for name in needed if flag(name) not in missing)
            raise InputError(
                f"{given}: found no {' and no '.join(missing)}, expected --bulk, --fractions and "
                "--lineages together"
            )


# ------------------------------------------------------------------------------------ figures


def within_type_variance_ratio(real, real_codes, made, made_codes):
    """Variance within cell types, made over real; 1 is best. real, made: (N, P) PCs.

    For each type with at least three cells on either side, the variance summed over PCs.

    Returns:
        dict: type code -> ratio.
    """
    ratios = {}
    for k in np.unique(real_codes):
        r, m = real[real_codes == k], made[made_codes == k]
        if min(len(r), len(m)) > 2:
            ratios[int(k)] = m.var(axis=0, ddof=1).sum() / r.var(axis=0, ddof=1).sum()
    return ratios


def random_forest_auroc(real, made, seed, n_trees=300):
    """Cross-validated AUROC of a random forest told to tell real from made; 0.5 is best."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    X = np.vstack([real, made])
    y = np.repeat([0, 1], [len(real), len(made)])
    forest = RandomForestClassifier(n_trees, random_state=seed, n_jobs=-1)
    # Shuffled: cells may come sorted by type, and a fold of one type alone reads far below 0.5.
    folds = StratifiedKFold(min(5, len(real), len(made)), shuffle=True, random_state=seed)
    score = cross_val_predict(forest, X, y, cv=folds, method="predict_proba")
    return roc_auc_score(y, score[:, 1])


def pairwise_discrepancy(real, made, kernel):
    """E k(X, X') + E k(Y, Y') - 2 E k(X, Y), unbiased: no point is paired with itself.

    real (N, P), made (M, P). kernel: all pairwise distances (N + M, N + M) -> its value at each.
    """
    from sklearn.metrics import pairwise_distances

    k = kernel(pairwise_distances(np.vstack([real, made])))
    n, m = len(real), len(made)
    rr, mm, rm = k[:n, :n], k[n:, n:], k[:n, n:]
    return (
        (rr.sum() - np.trace(rr)) / (n * (n - 1))
        + (mm.sum() - np.trace(mm)) / (m * (m - 1))
        - 2 * rm.mean()
    )


def mmd2(real, made):
    """Unbiased squared maximum mean discrepancy, Gaussian kernel of median width; 0 is best.

    Gretton et al., JMLR 2012, equation 3. real (N, P), made (M, P).
    """
    return pairwise_discrepancy(real, made, lambda d: np.exp(-(d**2) / np.median(d[d > 0] ** 2)))


def energy_distance(real, made):
    """Unbiased energy distance 2 E|X-Y| - E|X-X'| - E|Y-Y'|; 0 is best. real (N, P), made (M, P).

    Székely and Rizzo, J. Statistical Planning and Inference 2013.
    """
    return pairwise_discrepancy(real, made, lambda d: -d)


def correlation_rmse(real, made):
    """Root mean squared difference of gene-gene Pearson correlations; 0 is best.

    real (N, P), made (M, P) log-expression of the same genes; a constant gene correlates with none.
    """
    upper = np.triu_indices(real.shape[1], 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        r, m = (np.nan_to_num(np.corrcoef(a, rowvar=False))[upper] for a in (real, made))
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


def nnls_proportions(bulk, profiles):
    """Proportions by non-negative least squares on mean count profiles, the field's baseline.

    bulk (S, G) and profiles (K, G) are counts of cells of their natural depth, so that weights
    are cell numbers. Returns (S, K), rows summing to 1.
    """
    weights = np.stack([scipy.optimize.nnls(profiles.T, b / b.sum())[0] for b in bulk])
    return weights / weights.sum(axis=1, keepdims=True)


class CellFigures:
    """Figures of made cells against the held-out real ones, in a space fitted on all real cells.

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
        real.X = real.X.astype(np.float32)
        scanpy.pp.normalize_total(real, target_sum=1e4)
        scanpy.pp.log1p(real)
        scanpy.pp.highly_variable_genes(real, n_top_genes=min(1000, real.n_vars))
        self.genes = np.flatnonzero(real.var["highly_variable"])
        correlated = choose_genes(cells, min(200, cells.n_vars))
        self.correlated = cells.var_names.get_indexer(correlated)
        self.markers = find_markers(real[~held_out], codes[~held_out])

        log = self.log(cells.X)
        self.pca = PCA(min(20, *log.shape), random_state=0).fit(log)
        self.all_pcs, self.held_out = self.pca.transform(log), held_out
        self.codes, self.n_trees = codes[held_out], n_trees
        self.real = self.describe(cells.X[np.flatnonzero(held_out)])
        # What copying must be compared with: real cells that nothing was trained on.
        self.expected_share = trained_on_share(
            self.real["pcs"], self.all_pcs, ~held_out, skip_self=True
        )

    def log(self, X, genes=None):
        """log1p of counts per 10,000 at some genes, by default the variable ones (N, P)."""
        total = library_size(X)
        part = X[:, self.genes if genes is None else genes].toarray().astype(np.float64)
        return np.log1p(part / np.maximum(total, 1)[:, None] * 1e4)

    def describe(self, X):
        log = self.log(X)
        return dict(
            log=log,
            pcs=self.pca.transform(log),
            correlated=self.log(X, self.correlated),
            markers={k: self.log(X, genes) for k, genes in self.markers.items()},
            library=library_size(X),
        )

    def compare(self, X, codes, seed, trained_on=False):
        """All figures of made cells: counts X (M x G) and type codes (M).

        trained_on: they are training cells themselves.

        Returns:
            list of (figure, type code, value); the code is None where the figure is of all cells.
        """
        made, real = self.describe(X), self.real
        zeros = np.abs((made["log"] == 0).mean(axis=0) - (real["log"] == 0).mean(axis=0))
        share = trained_on_share(made["pcs"], self.all_pcs, ~self.held_out, skip_self=trained_on)
        auroc_pcs, auroc_genes = (
            random_forest_auroc(real[space], made[space], seed, self.n_trees)
            for space in ("pcs", "log")
        )
        whole = {
            "random-forest AUROC, PCs": auroc_pcs,
            "random-forest AUROC, genes": auroc_genes,
            "MMD2, PCs": mmd2(real["pcs"], made["pcs"]),
            "gene-gene correlation RMSE": correlation_rmse(real["correlated"], made["correlated"]),
            "zero-fraction error": zeros.mean(),
            "library-size KS": scipy.stats.ks_2samp(real["library"], made["library"]).statistic,
            "macro-F1, generated to real": macro_f1(made["pcs"], codes, real["pcs"], self.codes),
            "nearest neighbour trained on, excess": share - self.expected_share,
        }
        rows = [(figure, None, value) for figure, value in whole.items()]
        by_type = {
            "within-type variance ratio": within_type_variance_ratio(
                real["pcs"], self.codes, made["pcs"], codes
            )
        }
        for k in np.unique(self.codes):
            r, m = self.codes == k, codes == k
            if min(r.sum(), m.sum()) < 3:
                continue
            own = {"energy distance": energy_distance(real["pcs"][r], made["pcs"][m])}
            if k in self.markers:
                a, b = real["markers"][k][r], made["markers"][k][m]
                own["marker mean error"] = np.abs(a.mean(axis=0) - b.mean(axis=0)).mean()
                expressing = np.abs((a > 0).mean(axis=0) - (b > 0).mean(axis=0))
                own["marker fraction error"] = expressing.mean()
            if min((~r).sum(), (~m).sum()) > 2:
                # Difference of means of log-expression, type against the rest, each gene.
                change = (
                    log[own_type].mean(axis=0) - log[~own_type].mean(axis=0)
                    for log, own_type in ((real["log"], r), (made["log"], m))
                )
                own["fold-change correlation"] = np.corrcoef(*change)[0, 1]
            for figure, value in own.items():
                by_type.setdefault(figure, {})[int(k)] = value
        for figure, values in by_type.items():
            # The mean of the types, so that one type with a few odd cells does not decide it.
            rows += [(figure, None, np.mean(list(values.values())))]
            rows += [(figure, k, value) for k, value in values.items()]
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


# ---------------------------------------------------------------------------------- baselines


def draw_cell_type_nb(X, codes, wanted, rng):
    """Cells of independent genes, negative binomial with the moments of their cell type.

    θ = mean² / (variance - mean), Poisson where the variance is not above the mean. Library size
    is whatever comes of it.

    Args:
        X: training counts (N x G). codes (N). wanted: types of the cells to draw (M).

    Returns:
        CSR int32 (M x G).
    """
    made = np.zeros((len(wanted), X.shape[1]), dtype=np.int32)
    for k in np.unique(wanted):
        own = X[np.flatnonzero(codes == k)].toarray().astype(np.float64)
        rows = np.flatnonzero(wanted == k)
        if len(own):
            mean, extra = own.mean(axis=0), own.var(axis=0) - own.mean(axis=0)
            theta = np.clip(mean**2 / np.maximum(extra, 1e-12), 1e-6, 1e6)
            rate = rng.gamma(theta, np.maximum(mean, 1e-12) / theta, (len(rows), len(mean)))
            made[rows] = rng.poisson(rate)
    return sp.csr_matrix(made)


def train_published(cfg, weights, decoder_card):
    """scDecoder by the published recipe, on the same mixture and split: prior pairing, MSE + L1.

    Returns:
        The decoder, in eval mode.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name in (*MIXTURE_FILES, "scGMVAE_model.pt"):
            if (weights / name).exists():
                shutil.copy(weights / name, folder)
        settings = train_decoder.Settings(
            data=cfg.data,
            labels=cfg.labels,
            weights=Path(folder),
            seed=decoder_card["seed"],
            device=cfg.device,
            held_out=decoder_card["held_out_fraction"],
            pairing="prior",
            loss="mse_l1",
            n_hidden=700,
            epochs=40,
        )
        with contextlib.redirect_stdout(io.StringIO()):
            train_decoder.main(settings)
        decoder, card = load_model(
            Path(folder) / "scDecoder_model.pt", scDecoder, pick_device(cfg.device)
        )
    if set(card["held_out"]) != set(decoder_card["held_out"]):
        raise InputError(
            f"{weights}: scDecoder_model.pt and the baseline hold out different cells; expected "
            "scGMVAE_model.pt of the same run beside it, or --no-baselines"
        )
    return decoder


def train_scvi(cells, train, codes, seed):
    """scVI (Lopez et al., Nature Methods 2018), 10 latent dimensions, 400 epochs.

    Returns:
        A function: types of the cells to draw (M) -> CSR int32 (M x G), with z from the Gaussian of
        each type's posterior means and library sizes from its training cells.
    """
    import scvi

    scvi.settings.seed = seed
    reference = cells[train].copy()
    reference.X = reference.X.astype(np.float32)
    scvi.model.SCVI.setup_anndata(reference)
    model = scvi.model.SCVI(reference, n_latent=10)
    model.train(max_epochs=400, accelerator="cpu", enable_progress_bar=False)
    latent, library = model.get_latent_representation(), library_size(reference.X)
    own_codes, rng = codes[train], np.random.default_rng(seed)

    def draw(wanted):
        z = np.zeros((len(wanted), latent.shape[1]), np.float32)
        size = np.zeros((len(wanted), 1), np.float32)
        for k in np.unique(wanted):
            own, rows = own_codes == k, wanted == k
            z[rows] = rng.normal(
                latent[own].mean(axis=0), latent[own].std(axis=0), (rows.sum(), z.shape[1])
            )
            size[rows, 0] = rng.choice(library[own], rows.sum())
        with torch.inference_mode():
            out = model.module.generative(
                torch.from_numpy(z),
                torch.from_numpy(np.log(size)),
                torch.zeros(len(wanted), 1, dtype=torch.long),
            )
            return sp.csr_matrix(out["px"].sample().numpy().astype(np.int32))

    return draw


# --------------------------------------------------------------------------------- measurement


def draw_real(codes, wanted, pool, rng):
    """Indices of real cells from ``pool``, as many of each type as ``wanted`` has if there are."""
    drawn = []
    for k, n in zip(*np.unique(wanted, return_counts=True), strict=True):
        own = pool[codes[pool] == k]
        drawn.append(rng.permutation(own)[:n])
    return np.concatenate(drawn)


def read_generated(path, cells, cell_types):
    """Read an .h5ad of generated cells; counts (M x G) in the order of the data's genes, codes (M).

    Raises:
        InputError: unreadable, no ``cell_type``, a type that the model does not know, or values
            that are not counts.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; bulk2sc.py makes it")
    made = read_counts(path)
    if "cell_type" not in made.obs:
        raise InputError(f"{path}: has no column cell_type, expected cells by bulk2sc.py")
    codes = pd.Index(cell_types).get_indexer(made.obs["cell_type"].astype(str))
    if (codes < 0).any():
        unknown = made.obs["cell_type"].astype(str)[codes < 0].iloc[0]
        raise InputError(f"{path}: cell type {unknown} is not one of the model's")
    X, _ = align_genes(made.X, made.var_names, list(cells.var_names), path)
    return X, codes


def new_cells(decoder, k, generator, log_factor=None, sample=None):
    """Counts (N x G), CSR, of new cells of types k (N) by the mixture itself; no bulk moves it."""
    mu, var = decoder.mu[k], decoder.var[k]
    return decode_cells(decoder, mu, var, k, generator, log_factor=log_factor, sample=sample)[0]


def draw_test_bulks(X, codes, n_types, n, n_cells, rng):
    """Sums of n_cells cells, proportions from Dirichlet(1): counts (n x G), proportions (n x K).

    A type that has no cell in X (N x G), codes (N), is in no bulk.
    """
    has_cells = np.isin(np.arange(n_types), codes)
    expected = np.zeros((n, n_types))
    expected[:, has_cells] = rng.dirichlet(np.ones(has_cells.sum()), n)
    return draw_pseudobulks(X, codes, expected, n_cells, rng)


def calibrate_to(bulk, decoder, encoder, genes):
    """log_factor (S, G) of bulks (S x G, CSR) in the decoder's genes, and pi (S, K), as tensors.

    genes: ``(decoder's, encoder's)``.
    """
    X, present = align_genes(bulk, *genes, "the encoder", report=False)
    device = decoder.mu.device
    _, _, pi, _ = encode_bulks(encoder, X, present, device)
    factor = calibration(bulk.toarray(), expected_bulk(decoder, pi), np.ones(bulk.shape[1], bool))
    return torch.from_numpy(factor).to(device), pi


def measure_sums(cells, codes, held_out, decoder, encoder, genes, cfg, rng, n=10):
    """Rows (method, figure, None, value): cells of held-out pseudobulks, added up again.

    genes: ``(decoder's, encoder's)``. 1,000 cells for each of n pseudobulks of Dirichlet(1).
    """
    X, _ = align_genes(cells.X, cells.var_names, genes[0], "the decoder", report=False)
    X_test, codes_test = X[np.flatnonzero(held_out)], codes[held_out]
    bulk, _ = draw_test_bulks(X_test, codes_test, len(decoder.mu), n, cfg.cells_per_bulk, rng)
    factor, pi = calibrate_to(sp.csr_matrix(bulk), decoder, encoder, genes)
    generator = torch.Generator(decoder.mu.device).manual_seed(cfg.seed)
    k = draw_types(pi, 1000, generator)
    sample = torch.arange(n, device=k.device).repeat_interleave(1000)
    rows = []
    for method, log_factor in (("bulk2sc", None), ("calibrated", factor)):
        made = new_cells(decoder, k, generator, log_factor, sample)
        sums = np.zeros(bulk.shape)
        add_to_sums(sums, made, sample.cpu().numpy())
        agreement = sum_agreement(bulk, sums, np.ones(bulk.shape[1], bool))
        rows += [(method, "sum of cells against bulk, Pearson", None, agreement.mean())]
    return rows


def measure_cells(cells, codes, held_out, decoder, card, encoder, encoder_card, weights, cfg, rng):
    """Rows (method, figure, type code or None, value) of every method of the table."""
    test, train = np.flatnonzero(held_out), np.flatnonzero(~held_out)
    wanted = codes[test]
    figures = CellFigures(cells, held_out, codes, cfg.n_trees)
    generator = torch.Generator(decoder.mu.device).manual_seed(cfg.seed)

    def from_decoder(decoder, log_factor=None):
        k = torch.as_tensor(wanted, device=decoder.mu.device)
        X = new_cells(decoder, k, generator, log_factor, torch.zeros_like(k))
        X, _ = align_genes(X, card["genes"], list(cells.var_names), "the decoder", report=False)
        return X, wanted

    # Half of the training cells, kept out of the space that the figures are read in.
    kept = np.ones(cells.n_obs, dtype=bool)
    unseen = train[split_cells(codes[train], 0.5, cfg.seed)]
    kept[unseen] = False

    methods = {"bulk2sc": lambda: from_decoder(decoder)}
    if cfg.generated is not None:
        made, made_codes = read_generated(cfg.generated, cells, card["cell_types"])
        everyone = np.arange(len(made_codes))
        short = {
            card["cell_types"][k]: f"{(made_codes == k).sum()} of {n}"
            for k, n in zip(*np.unique(wanted, return_counts=True), strict=True)
            if (made_codes == k).sum() < n
        }
        if short:
            print(f"{cfg.generated}: fewer cells than are held out: {short}")

        def from_file():
            chosen = draw_real(made_codes, wanted, everyone, rng)
            if len(chosen) < 2:
                raise InputError(
                    f"{cfg.generated}: found {len(chosen)} cells of the held-out types"
                )
            return made[chosen], made_codes[chosen]

        methods["bulk2sc"] = from_file

    def real_cells():
        chosen = draw_real(codes, wanted, train, rng)
        return cells.X[chosen], codes[chosen]

    if cfg.generated is None:
        genes = card["genes"], encoder_card["genes"]
        X, _ = align_genes(cells.X[test], cells.var_names, genes[0], "the decoder", report=False)
        bulk = sp.csr_matrix(X.sum(axis=0))
        log_factor, _ = calibrate_to(bulk, decoder, encoder, genes)
        methods["calibrated"] = lambda: from_decoder(decoder, log_factor)
    methods["other real cells"] = real_cells
    if cfg.baselines:
        methods["cell-type NB"] = lambda: (
            draw_cell_type_nb(cells.X[train], codes[train], wanted, rng),
            wanted,
        )
        published = train_published(cfg, weights, card)
        methods["published recipe"] = lambda: from_decoder(published)
        if importlib.util.find_spec("scvi"):
            draw = train_scvi(cells, train, codes, card["seed"])
            methods["scVI"] = lambda: (draw(wanted), wanted)
    rows = []
    for at in trange(cfg.n_draws, desc=f"cells of {weights}", unit="draw"):
        for method, draw_cells in methods.items():
            is_real = method == "other real cells"
            compared = figures.compare(*draw_cells(), at, trained_on=is_real)
            rows += [(method, *row) for row in compared]
    if len(np.unique(codes[unseen])) > 1:
        without = CellFigures(cells[kept].copy(), held_out[kept], codes[kept], cfg.n_trees)
        compared = without.compare(cells.X[unseen], codes[unseen], cfg.seed)
        # The unseen cells are no neighbours of themselves, nor trained on in any sense.
        rows += [
            ("unseen real cells", *row) for row in compared if not row[0].startswith("nearest")
        ]
    return rows


# --------------------------------------------------------------------------------- proportions


def read_rows(path):
    """A csv as text under the names of its first line; a line with more fields is an error."""
    table = read_table(path, header=None, encoding="utf-8-sig")
    rows = table.iloc[1:].set_axis([str(name).strip() for name in table.iloc[0]], axis=1)
    return rows[(rows != "").any(axis=1)]  # spreadsheets leave lines of commas


def read_lineages(path, cell_types):
    """Lineage of each cell type (K) by a csv cell_type,lineage; None where it has none.

    Names are cleaned as labels are. Types left out are reported.

    Raises:
        InputError: unreadable, other columns, a type with two lineages, no type of the model, or
            fewer than two lineages.
    """
    table = read_rows(path)
    if sorted(table.columns) != ["cell_type", "lineage"]:
        found = some(table.columns)
        raise InputError(f"{path}: found the columns {found}, expected cell_type and lineage")
    table = table.map(clean_label).dropna(subset="cell_type").drop_duplicates()
    twice = table["cell_type"][table["cell_type"].duplicated()]
    if len(twice):
        raise InputError(f"{path}: cell types with two different lineages ({some(twice)})")
    given = dict(zip(table["cell_type"], table["lineage"], strict=True))
    unknown = [name for name in given if name not in cell_types]
    if len(unknown) == len(given):
        raise InputError(
            f"{path}: none of its {len(given)} cell types ({some(given)}) is one of the model's "
            f"({some(cell_types)})"
        )
    if unknown:
        print(f"{path}: {len(unknown)} cell types that the model does not know ({some(unknown)})")
    lineage_of = [given.get(name) for name in cell_types]
    left_out = [name for name, own in zip(cell_types, lineage_of, strict=True) if own is None]
    if left_out:
        print(f"{path}: {len(left_out)} cell types without a lineage left out ({some(left_out)})")
    if len(lineages := lineages_in(lineage_of)) < 2:
        raise InputError(f"{path}: found {len(lineages)} lineages, expected two or more")
    return lineage_of


def lineages_in(lineage_of):
    """Names of the lineages (L) of :func:`read_lineages`, in natural order."""
    return natural_order(own for own in lineage_of if own is not None)


def read_fractions(path, lineages, lineage_file):
    """Measured fractions (samples x lineages) of a csv: first column sample, then lineages.

    They may be of any scale, percentages too, as only ratios within a sample are used. Columns that
    are none of the lineages are left out and reported.

    Raises:
        InputError: unreadable, a lineage or a name is missing or there twice, a value is no number
            of 0 or more, or a sample has nothing of these lineages.
    """
    table = read_rows(path)
    samples, table = table.iloc[:, 0].astype(str).str.strip(), table.iloc[:, 1:]
    missing = [name for name in lineages if name not in table]
    if missing:
        raise InputError(
            f"{path}: has no column {some(missing)}, which {lineage_file} names as lineage; found "
            f"{some(table.columns, 8)}"
        )
    for what, names in (("columns", table.columns), ("samples", pd.Index(samples))):
        if names.has_duplicates:
            raise InputError(f"{path}: {what} there twice ({some(names[names.duplicated()])})")
    left_out = [name for name in table if name not in lineages]
    if left_out:
        print(f"{path}: {len(left_out)} columns that are no lineage left out ({some(left_out)})")
    text = table[lineages].set_axis(samples)
    values = text.apply(pd.to_numeric, errors="coerce").astype(float)
    wrong = ~(np.isfinite(values) & (values >= 0)).to_numpy()
    if wrong.any():
        i, j = (int(at[0]) for at in np.nonzero(wrong))
        raise InputError(
            f"{path}: found {text.iat[i, j]!r} (sample {values.index[i]}, {lineages[j]}), expected "
            "a number, 0 or more"
        )
    empty = values.index[values.sum(axis=1) == 0]
    if len(empty):
        raise InputError(
            f"{path}: {len(empty)} samples ({some(empty)}) have nothing of {some(lineages, 8)}"
        )
    return values


def to_lineages(proportions, names, lineages):
    """Proportions (S x K) summed to lineages and renormalised over these (S x L).

    names: lineage of each column (K), None or another name where it is left out. A row that has
    nothing of any lineage becomes even.
    """
    member = np.array([[name == lineage for lineage in lineages] for name in names], float)
    summed = proportions @ member
    total = summed.sum(axis=1, keepdims=True)
    return np.where(total > 0, summed / np.where(total > 0, total, 1), 1 / len(lineages))


def shift_platform(bulk, rng):
    """Expected counts of bulks (S x G) as other platforms or donors would measure them.

    Each 20 bulks in turn share a platform: factors exp(0.6 t) of genes, t of Student's t with 4
    degrees of freedom, the logarithm cut at ±4; and a tenth of the genes, drawn anew for each
    platform, is lost: it reads 0 and no one is told. Rows sum to 200,000; Poisson noise is left to
    the caller. The Bulk Encoder trains on another model of noise, log-normal, with a sd of each
    bulk's own and no gene lost, and without a platform that bulks share.
    """
    n_platforms, n_genes = -(-len(bulk) // BULKS_PER_PLATFORM), bulk.shape[1]
    t = rng.standard_t(4, (n_platforms, n_genes))
    factors = np.exp(np.clip(0.6 * t, -4, 4))
    factors[rng.random(factors.shape).argsort(axis=1) < round(0.1 * n_genes)] = 0
    shifted = bulk * factors.repeat(BULKS_PER_PLATFORM, axis=0)[: len(bulk)]
    return shifted / shifted.sum(axis=1, keepdims=True) * SHIFT_DEPTH


def proportion_figures(true, predicted, where):
    """dict: name of figure -> value, over all entries; true, predicted (S, K or L).

    where: the end of the names, as in ``BEST``.
    """
    error = predicted - true
    values = {
        "RMSE": np.sqrt(np.mean(error**2)),
        "CCC": concordance(true, predicted),
        "MAE": np.abs(error).mean(),
    }
    return {f"proportions {measure}{where}": value for measure, value in values.items()}


def predict_proportions(encoder, bulk, present, profiles):
    """Proportions (S x K) of bulks (S x G) by each method, all on the genes that are present (G).

    profiles: mean counts of training cells (K x G). Returns a dict: method -> array.
    """
    _, _, pi, _ = encode_bulks(encoder, sp.csr_matrix(bulk), present, encoder.mu.device)
    return {
        "bulk2sc": pi.cpu().numpy(),
        "NNLS": nnls_proportions(bulk[:, present], profiles[:, present]),
    }


def measure_proportions(cells, codes, held_out, encoder, card, lineage_of, cfg, rng):
    """Rows (method, figure, None, value) on pseudobulks of held-out cells, plain and shifted.

    card: the encoder's. lineage_of: of each type (K), or None.
    """
    genes, n_types = card["genes"], len(card["cell_types"])
    X, present = align_genes(cells.X, cells.var_names, genes, "the encoder", report=False)
    X_test, codes_test = X[np.flatnonzero(held_out)], codes[held_out]
    profiles = mean_counts(X[np.flatnonzero(~held_out)], codes[~held_out], n_types)
    rows = []
    for where in [""] * cfg.n_draws + [", shift"] * cfg.n_draws:
        bulk, true = draw_test_bulks(
            X_test, codes_test, n_types, cfg.n_pseudobulks, cfg.cells_per_bulk, rng
        )
        if where:
            bulk = rng.poisson(shift_platform(bulk, rng))
        for method, predicted in predict_proportions(encoder, bulk, present, profiles).items():
            figures = proportion_figures(true, predicted, where)
            if lineage_of is not None:
                lineages = lineages_in(lineage_of)
                told = true[:, [own is not None for own in lineage_of]].any(axis=1)
                pair = (to_lineages(p[told], lineage_of, lineages) for p in (true, predicted))
                figures |= proportion_figures(*pair, f"{where}, lineages")
            rows += [(method, figure, None, value) for figure, value in figures.items()]
    return rows


def measure_real_bulk(cells, codes, held_out, encoder, card, lineage_of, fractions, cfg):
    """Rows (method, figure, None, value) on the real bulks of --bulk; nothing is drawn.

    card: the encoder's. lineage_of: of each type (K). fractions: of :func:`read_fractions`.

    Raises:
        InputError: as :func:`data.read_bulk`; or no sample is in both files.
    """
    genes, lineages = card["genes"], list(fractions.columns)
    bulk, present, samples = read_bulk(cfg.bulk, genes, card.get("gene_ids"))
    at = fractions.index.get_indexer([str(name).strip() for name in samples])
    if (at < 0).all():
        raise InputError(
            f"{cfg.fractions}: none of its samples ({some(fractions.index)}) is in {cfg.bulk} "
            f"({some(samples)})"
        )
    n = np.sum(at >= 0)
    print(
        f"{cfg.bulk}: {n} samples with measured fractions, {len(samples) - n} without; "
        f"{len(fractions) - n} of {cfg.fractions} are not in it"
    )
    bulk = bulk[np.flatnonzero(at >= 0)]
    check_filled(bulk, [name for name, i in zip(samples, at, strict=True) if i >= 0], cfg.bulk)
    X, _ = align_genes(cells.X, cells.var_names, genes, "the encoder", report=False)
    profiles = mean_counts(X[np.flatnonzero(~held_out)], codes[~held_out], len(lineage_of))
    true = to_lineages(fractions.to_numpy()[at[at >= 0]], lineages, lineages)
    rows = []
    for method, pi in predict_proportions(encoder, bulk.toarray(), present, profiles).items():
        predicted = to_lineages(pi, lineage_of, lineages)
        figures = proportion_figures(true, predicted, ", real bulk")
        correlation = np.corrcoef(true.ravel(), predicted.ravel())[0, 1]
        figures["proportions Pearson, real bulk"] = correlation
        rows += [(method, figure, None, value) for figure, value in figures.items()]
    return rows


# ------------------------------------------------------------------------------------ tables


def load_weights(weights, cells, cell_types, device, fewest=2):
    """Both models of a folder and their cards, checked against the data, and the split (N).

    fewest: held-out cells that there must be.
    """
    decoder_file, encoder_file = weights / "scDecoder_model.pt", weights / "bulkEncoder_model.pt"
    decoder, decoder_card = load_model(decoder_file, scDecoder, device)
    encoder, encoder_card = load_model(encoder_file, BulkEncoder, device)
    for file, card in ((decoder_file, decoder_card), (encoder_file, encoder_card)):
        check_cell_types(file, card, cell_types)
    check_mixture(encoder_file, encoder, decoder.mu, decoder.var, decoder_file)
    held_out = apply_split(cells, decoder_card["held_out"], decoder_file)
    if held_out.sum() < fewest:
        raise InputError(f"{decoder_file}: no cells were held out, so nothing can be measured")
    return decoder, decoder_card, encoder, encoder_card, held_out


def summarise(table, n_weights):
    """Mean and std of each figure: over trainings if there are several, else over draws.

    table: columns weights, method, figure, cell_type, value. Returns columns figure, best,
    cell_type, method, mean, std, n.
    """
    keys = ["figure", "cell_type", "method"]
    if n_weights > 1:
        table = table.groupby([*keys, "weights"], sort=False, as_index=False)["value"].mean()
    table = table.groupby(keys, sort=False)["value"].agg(["mean", "std", "count"]).reset_index()
    order = {figure: i for i, figure in enumerate(BEST)}
    # Figures of all cells first, then each type; within them the order of the methods stays.
    table = table.sort_values(
        ["cell_type", "figure"],
        key=lambda c: c.map(order) if c.name == "figure" else c,
        kind="stable",
    )
    table.insert(1, "best", table["figure"].map(BEST))
    return table.rename(columns={"count": "n"}).reset_index(drop=True)


def shown(table):
    """A table of mean ± std as it is printed: figures with their best values x methods.

    table: of :func:`summarise`, figures of all cell types together.
    """
    text = [
        f"{m:.4f}" + ("" if np.isnan(s) else f" ± {s:.4f}")
        for m, s in zip(table["mean"], table["std"], strict=True)
    ]
    wide = table.assign(text=text).pivot(index="figure", columns="method", values="text")
    figures = [f for f in BEST if f in wide.index]
    wide = wide.loc[figures, list(dict.fromkeys(table["method"]))].fillna("")
    wide.index = [f"{f} ({BEST[f]:g})" for f in figures]
    return wide.to_string()


def main(cfg):
    device = pick_device(cfg.device)
    cells = load_cells(cfg)
    codes, cell_types = codes_of(cells)
    lineage_of = fractions = None
    if cfg.lineages is not None:
        lineage_of = read_lineages(cfg.lineages, cell_types)
    if cfg.fractions is not None:
        fractions = read_fractions(cfg.fractions, lineages_in(lineage_of), cfg.lineages)
    folders = [cfg.weights, *cfg.more_weights]
    loaded = [load_weights(folder, cells, cell_types, device) for folder in folders]
    rows = []
    for folder, models in zip(folders, loaded, strict=True):
        decoder, card, encoder, encoder_card, held_out = models
        measured = []
        if cfg.bulk is not None:  # first, so that a file that cannot be used is found in seconds
            measured += measure_real_bulk(
                cells, codes, held_out, encoder, encoder_card, lineage_of, fractions, cfg
            )
        rng = seed_everything(cfg.seed)
        measured += measure_cells(
            cells, codes, held_out, decoder, card, encoder, encoder_card, folder, cfg, rng
        )
        if cfg.generated is None:
            genes = card["genes"], encoder_card["genes"]
            for _ in range(cfg.n_draws):
                measured += measure_sums(cells, codes, held_out, decoder, encoder, genes, cfg, rng)
        measured += measure_proportions(
            cells, codes, held_out, encoder, encoder_card, lineage_of, cfg, rng
        )
        rows += [(str(folder), *row) for row in measured]
    table = pd.DataFrame(rows, columns=["weights", "method", "figure", "cell_type", "value"])
    # "" is "all types": an empty field in the csv, and a key that groupby keeps.
    table["cell_type"] = table["cell_type"].map(dict(enumerate(cell_types))).fillna("")
    table = summarise(table, len(folders))
    overall = table[table["cell_type"] == ""]
    write_whole(cfg.weights / "evaluation.csv", lambda path: table.to_csv(path, index=False))
    write_evaluation(cfg.weights / "evaluation.png", overall)
    print(
        "figure (best value), mean ± std over "
        + (f"{len(folders)} trainings" if len(folders) > 1 else f"{cfg.n_draws} draws")
    )
    of_proportions = overall["figure"].str.startswith("proportions")
    print(shown(overall[~of_proportions]))
    print(f"\nproportions of {cfg.n_pseudobulks} pseudobulks per draw, beside least squares")
    print(shown(overall[of_proportions]))
    if cfg.baselines and not importlib.util.find_spec("scvi"):
        print("scVI left out: scvi-tools is not installed (pip install scvi-tools)")
    n_cells = ", ".join(str(entry[-1].sum()) for entry in loaded)
    print(f"wrote evaluation.csv and evaluation.png to {cfg.weights}: {n_cells} held-out cells")


if __name__ == "__main__":
    run_script(main, Settings)
