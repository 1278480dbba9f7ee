"""Generated cells against held-out real ones, beside simple baselines; proportions likewise.

    python evaluate.py
    python evaluate.py --data filtered_feature_bc_matrix --weights my_weights
    python evaluate.py --weights w0 --more-weights w1 w2       # mean ± std over three trainings
    python evaluate.py --bulk samples.csv --fractions measured.csv --lineages lineages.csv

Every metric is read on cells that no training has seen. Columns of the table:

- bulk2sc: z ~ N(mu_k, sigma_k^2) -> scDecoder, as many cells of each type as are held out
- calibrated: the same with bulk2sc.py --calibrate, to the sum of the held-out cells
- other real cells: training cells in the place of generated ones
- unseen real cells: the half of the training cells that the metrics' space was not fitted on
- cell-type NB: each gene negative binomial with its cell type's training mean and variance
- published recipe: scDecoder with --pairing prior --loss mse_l1, trained here
- scVI: if scvi-tools is installed, trained here

Predicted proportions have a table of their own beside NNLS, non-negative least squares: on
pseudobulks of held-out cells, the same after a simulated change of platform, and real bulks whose
proportions were measured.

Writes evaluation.csv (with every cell type on its own as well) and evaluation.png to --weights.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from tqdm import trange

from baselines import draw_cell_type_nb, predict_proportions, train_published, train_scvi
from data import (
    DatasetSettings,
    align_genes,
    codes_of,
    draw_test_bulks,
    load_cells,
    mean_counts,
    split_cells,
)
from generation import (
    add_to_sums,
    calibrate_to,
    check_filled,
    draw_types,
    load_weights,
    new_cells,
    sum_agreement,
)
from metrics import METRICS, CellMetrics, proportion_metrics, to_lineages
from plotting import write_evaluation
from readers.bulk import read_bulk
from readers.counts import read_counts
from readers.lineages import lineages_in, read_fractions, read_lineages
from runtime.device import pick_device, seed_everything
from runtime.errors import InputError, some
from runtime.script import flag, run_script
from runtime.writing import write_whole

BULKS_PER_PLATFORM = 20  # of those under a simulated shift
SHIFT_DEPTH = 2e5  # their counts


@dataclass
class Settings(DatasetSettings):
    more_weights: tuple[Path, ...] = ()
    """Further weights folders, of other seeds; metrics are then mean and std over trainings."""
    generated: Path | None = None
    """An .h5ad of generated cells to measure, as bulk2sc.py writes it; default: generate them."""
    n_draws: int = 3
    """Times the cells and the pseudobulks are drawn from each training."""
    n_pseudobulks: int = 100
    """Pseudobulks of held-out cells per draw, proportions from Dirichlet(1)."""
    cells_per_bulk: int = 500
    """Cells in each pseudobulk."""
    n_trees: int = 300
    """Trees of each random forest, the slowest of the metrics."""
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
    generated = read_counts(path)
    if "cell_type" not in generated.obs:
        raise InputError(f"{path}: has no column cell_type, expected cells by bulk2sc.py")
    codes = pd.Index(cell_types).get_indexer(generated.obs["cell_type"].astype(str))
    if (codes < 0).any():
        unknown = generated.obs["cell_type"].astype(str)[codes < 0].iloc[0]
        raise InputError(f"{path}: cell type {unknown} is not one of the model's")
    X, _ = align_genes(generated.X, generated.var_names, list(cells.var_names), path)
    return X, codes


def measure_sums(cells, codes, held_out, decoder, encoder, genes, cfg, rng, n=10):
    """Rows (method, metric, None, value): cells of held-out pseudobulks, added up again.

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
        generated = new_cells(decoder, k, generator, log_factor, sample)
        sums = np.zeros(bulk.shape)
        add_to_sums(sums, generated, sample.cpu().numpy())
        agreement = sum_agreement(bulk, sums, np.ones(bulk.shape[1], bool))
        rows += [(method, "sum of cells against bulk, Pearson", None, agreement.mean())]
    return rows


def measure_cells(cells, codes, held_out, decoder, card, encoder, encoder_card, weights, cfg, rng):
    """Rows (method, metric, type code or None, value) of every method of the table."""
    test, train = np.flatnonzero(held_out), np.flatnonzero(~held_out)
    wanted = codes[test]
    cell_metrics = CellMetrics(cells, held_out, codes, cfg.n_trees)
    generator = torch.Generator(decoder.mu.device).manual_seed(cfg.seed)

    def from_decoder(decoder, log_factor=None):
        k = torch.as_tensor(wanted, device=decoder.mu.device)
        X = new_cells(decoder, k, generator, log_factor, torch.zeros_like(k))
        X, _ = align_genes(X, card["genes"], list(cells.var_names), "the decoder", report=False)
        return X, wanted

    # Half of the training cells, kept out of the space that the metrics are read in.
    kept = np.ones(cells.n_obs, dtype=bool)
    left_out = train[split_cells(codes[train], 0.5, cfg.seed)]
    kept[left_out] = False

    methods = {"bulk2sc": lambda: from_decoder(decoder)}
    if cfg.generated is not None:
        generated, generated_codes = read_generated(cfg.generated, cells, card["cell_types"])
        everyone = np.arange(len(generated_codes))
        short = {
            card["cell_types"][k]: f"{(generated_codes == k).sum()} of {n}"
            for k, n in zip(*np.unique(wanted, return_counts=True), strict=True)
            if (generated_codes == k).sum() < n
        }
        if short:
            print(f"{cfg.generated}: fewer cells than are held out: {short}")

        def from_file():
            chosen = draw_real(generated_codes, wanted, everyone, rng)
            if len(chosen) < 2:
                raise InputError(
                    f"{cfg.generated}: found {len(chosen)} cells of the held-out types"
                )
            return generated[chosen], generated_codes[chosen]

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
            compared = cell_metrics.compare(*draw_cells(), at, trained_on=is_real)
            rows += [(method, *row) for row in compared]
    if len(np.unique(codes[left_out])) > 1:
        without = CellMetrics(cells[kept].copy(), held_out[kept], codes[kept], cfg.n_trees)
        compared = without.compare(cells.X[left_out], codes[left_out], cfg.seed)
        # No cell here was trained on, so that share says nothing.
        rows += [
            ("unseen real cells", *row) for row in compared if not row[0].startswith("nearest")
        ]
    return rows


# --------------------------------------------------------------------------------- proportions


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


def measure_proportions(cells, codes, held_out, encoder, card, lineage_of, cfg, rng):
    """Rows (method, metric, None, value) on pseudobulks of held-out cells, plain and shifted.

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
            values = proportion_metrics(true, predicted, where)
            if lineage_of is not None:
                lineages = lineages_in(lineage_of)
                told = true[:, [own is not None for own in lineage_of]].any(axis=1)
                pair = (to_lineages(p[told], lineage_of, lineages) for p in (true, predicted))
                values |= proportion_metrics(*pair, f"{where}, lineages")
            rows += [(method, metric, None, value) for metric, value in values.items()]
    return rows


def measure_real_bulk(cells, codes, held_out, encoder, card, lineage_of, fractions, cfg):
    """Rows (method, metric, None, value) on the real bulks of --bulk; nothing is drawn.

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
        values = proportion_metrics(true, predicted, ", real bulk")
        correlation = np.corrcoef(true.ravel(), predicted.ravel())[0, 1]
        values["proportions Pearson, real bulk"] = correlation
        rows += [(method, metric, None, value) for metric, value in values.items()]
    return rows


# ------------------------------------------------------------------------------------ tables


def summarise(table, n_weights):
    """Mean and std of each metric: over trainings if there are several, else over draws.

    table: columns weights, method, metric, cell_type, value. Returns columns metric, best,
    cell_type, method, mean, std, n.
    """
    keys = ["metric", "cell_type", "method"]
    if n_weights > 1:
        table = table.groupby([*keys, "weights"], sort=False, as_index=False)["value"].mean()
    table = table.groupby(keys, sort=False)["value"].agg(["mean", "std", "count"]).reset_index()
    order = {metric: i for i, metric in enumerate(METRICS)}
    # Metrics of all cells first, then each type; within them the order of the methods stays.
    table = table.sort_values(
        ["cell_type", "metric"],
        key=lambda c: c.map(order) if c.name == "metric" else c,
        kind="stable",
    )
    table.insert(1, "best", table["metric"].map(METRICS))
    return table.rename(columns={"count": "n"}).reset_index(drop=True)


def shown(table):
    """A table of mean ± std as it is printed: metrics with their best values x methods.

    table: of :func:`summarise`, metrics of all cell types together.
    """
    text = [
        f"{m:.4f}" + ("" if np.isnan(s) else f" ± {s:.4f}")
        for m, s in zip(table["mean"], table["std"], strict=True)
    ]
    wide = table.assign(text=text).pivot(index="metric", columns="method", values="text")
    metrics = [name for name in METRICS if name in wide.index]
    wide = wide.loc[metrics, list(dict.fromkeys(table["method"]))].fillna("")
    wide.index = [f"{name} ({METRICS[name]:g})" for name in metrics]
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
    table = pd.DataFrame(rows, columns=["weights", "method", "metric", "cell_type", "value"])
    # "" is "all types": an empty field in the csv, and a key that groupby keeps.
    table["cell_type"] = table["cell_type"].map(dict(enumerate(cell_types))).fillna("")
    table = summarise(table, len(folders))
    overall = table[table["cell_type"] == ""]
    write_whole(cfg.weights / "evaluation.csv", lambda path: table.to_csv(path, index=False))
    write_evaluation(cfg.weights / "evaluation.png", overall)
    print(
        "metric (best value), mean ± std over "
        + (f"{len(folders)} trainings" if len(folders) > 1 else f"{cfg.n_draws} draws")
    )
    of_proportions = overall["metric"].str.startswith("proportions")
    print(shown(overall[~of_proportions]))
    print(f"\nproportions of {cfg.n_pseudobulks} pseudobulks per draw, beside least squares")
    print(shown(overall[of_proportions]))
    if cfg.baselines and not importlib.util.find_spec("scvi"):
        print("scVI left out: scvi-tools is not installed (pip install scvi-tools)")
    n_cells = ", ".join(str(entry[-1].sum()) for entry in loaded)
    print(f"wrote evaluation.csv and evaluation.png to {cfg.weights}: {n_cells} held-out cells")


if __name__ == "__main__":
    run_script(main, Settings)
