"""Remake the pictures in figures/ from a dataset and the weights trained on it.

    python make_figures.py                                         # embedded data, shipped weights
    python make_figures.py --data pbmc1k_v3 --weights w0           # those in figures/
    python make_figures.py --samples sample --donors donor --conditions condition --states-only

Writes to --out (figures), as .png or by --format: the paper's four t-SNE panels, pbmc1k.png (the
raw cells, whatever the dataset), Latent.png, reconstructed.png and generated.png; labels.png, their
legend alone; joint.png, real and generated cells in one t-SNE; proportions.png, sums.png,
markers.png, losses.png and schematic.png. With samples and conditions, of a held-out donor under
both: states.png, real cells and those generated from the donor's bulks in one t-SNE, and
state_genes.png.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

from data import DatasetSettings
from runtime.flags import check_least, check_needs, in_groups
from runtime.script import parse_args, run_script


@in_groups(
    {
        "input": "data labels weights batch_size",
        "output": "out format max_cells",
        "states of samples": "samples donors conditions contrast state_genes states_only",
    }
)
@dataclass
class Settings(DatasetSettings):
    """Remake the pictures in figures/ from a dataset and the weights trained on it.

    Example: python make_figures.py --data pbmc1k_v3 --weights w0
    """

    out: Path = Path("figures")
    """Folder of the pictures."""
    format: Literal["png", "pdf", "svg"] = "png"
    """File format. In pdf and svg text stays text, and layers of many points are images."""
    max_cells: int = 3000
    """Most cells in a panel; of more, a random part is shown, so that t-SNE stays fast."""
    batch_size: int = 100
    """Reference cells in the bulk that each generated cell comes from, as in bulk2sc.py."""
    donors: str | None = None
    """Donor of each cell, given as --samples is. Default: each sample is a donor of its own."""
    conditions: str | None = None
    """Condition of each cell, given as --samples is. With it, states.png and state_genes.png show
    a held-out donor's cells under two conditions."""
    contrast: tuple[str, str] | None = None
    """The two conditions, A B. Default: the two there are."""
    state_genes: tuple[str, ...] = ()
    """Genes of state_genes.png. Default: ISG15, IFI6, CXCL10, CCL8 and CD14, or if one of them is
    missing the five that differ most between the conditions."""
    states_only: bool = False
    """Make states.png and state_genes.png alone."""

    def __post_init__(self):
        super().__post_init__()
        check_least(self, ["max_cells"], 10)
        check_least(self, ["batch_size"])
        of_conditions = dict.fromkeys(("contrast", "state_genes", "states_only"), "conditions")
        check_needs(self, donors="samples", conditions="samples", **of_conditions)


if __name__ == "__main__":
    settings = parse_args(Settings)  # before the slow imports, so that --help answers at once

import contextlib
import io
import tempfile
from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import scanpy
import scipy.sparse as sp
import torch
from sklearn.neighbors import NearestNeighbors

import bulk2sc
from counts.markers import markers_of_one_type
from counts.pseudobulks import draw_test_bulks
from data import Reference, align_genes, library_size, log_normalise, mean_counts
from deconvolution.encode import calibrate_to, encode_samples
from deconvolution.estimators import nnls_proportions
from deconvolution.fit import log_cpm
from deconvolution.proportions import normal_interval
from evaluation.metrics import concordance
from generation import CHUNK, Model, draw_types, new_cells
from models import encode_cells, scGMVAE
from plots.cells import (
    tsne,
    write_joint,
    write_legend,
    write_markers,
    write_panel,
    write_points,
    write_state_genes,
)
from plots.proportions import write_predictions
from plots.schematic import write_schematic
from plots.states import (
    MIN_CELLS,
    count_cells,
    describe_mixing,
    find_donor,
    generate_donor,
    pick_genes,
    shown_types,
    state_table,
)
from plots.training import write_curves
from readers.bulk import Bulk
from runtime.device import pick_device, seed_everything
from runtime.weights import load_model
from runtime.writing import check_writable

N_NEIGHBORS = 30  # of each real cell, among which generated ones are counted
MIN_HELD_OUT = 10  # held-out cells below which training cells are shown instead


def load_reference(cfg, device):
    """Model of the weights, scGMVAE with its metadata (None if there is none), and Reference."""
    reference, model = Reference.load(cfg), Model.load(cfg.weights, device)
    reference = model.split(reference)
    X, _ = reference.counts(model.genes, cfg.data)
    cells = anndata.AnnData(X, reference.cells.obs, pd.DataFrame(index=model.genes))
    file = cfg.weights / "scGMVAE_model.pt"
    gmvae = load_model(file, scGMVAE, device) if file.exists() else None
    return model, gmvae, replace(reference, cells=cells)


def type_names(reference):
    """Name of the type of each cell (N)."""
    return np.array(reference.cell_types)[reference.codes]


def save(cfg, name, write, *arguments):
    """Write a picture by a function of plots/."""
    path = cfg.out / f"{name}.{cfg.format}"
    write(path, *arguments)
    print(f"wrote {path}")


# --------------------------------------------------------------------------------- embeddings


def log_cells(X):
    """AnnData of counts (N x G), CSR, log-normalised in float32, which is scanpy's default."""
    return anndata.AnnData(log_normalise(X, dtype=np.float32))


def principal_components(X, n=50):
    """PCs (N, n) of counts (N x G): log-normalised, 2,000 variable genes, scaled."""
    cells = log_cells(X)
    if cells.n_vars > 2000:
        scanpy.pp.highly_variable_genes(cells, n_top_genes=2000)
        cells = cells[:, cells.var["highly_variable"]].copy()
    cells.X = cells.X.toarray()
    scanpy.pp.scale(cells, max_value=10)
    cells.X = np.nan_to_num(cells.X)  # genes without a count in these cells
    scanpy.pp.pca(cells, n_comps=min(n, cells.n_obs - 1, cells.n_vars - 1), random_state=0)
    return cells.obsm["X_pca"]


def nearest_neighbors(points):
    """Indices (N, N_NEIGHBORS) of the nearest others of each point (N, D)."""
    n = min(N_NEIGHBORS, len(points) - 1)
    return NearestNeighbors(n_neighbors=n).fit(points).kneighbors(return_distance=False)


def mixing(points, generated):
    """Share of generated cells among each real cell's neighbours, mean over the real cells.

    points: PCs of real and generated cells together (N, D). generated: mask (N).
    """
    return generated[nearest_neighbors(points)][~generated].mean()


# --------------------------------------------------------------------------------- paper's panels


@torch.inference_mode()
def reconstruct(X, codes, decoder, gmvae, genes, generator):
    """Counts (N x G) of cells decoded from their own posteriors, at their own library sizes.

    Args:
        X: counts (N x G), CSR, in the decoder's ``genes``. codes: cell types (N).
        gmvae: scGMVAE and its metadata; None draws z from each cell's type instead.
    """
    device = decoder.mu.device
    k = torch.as_tensor(codes, device=device)
    mean, var = decoder.mu[k], decoder.var[k]  # (N, D)
    if gmvae is not None:
        model, metadata = gmvae
        X_model, _ = align_genes(X, genes, metadata["genes"], "scGMVAE", report=False)
        mean, var = (part.to(device) for part in encode_cells(model, X_model))
    z = mean + var.sqrt() * torch.randn(mean.shape, generator=generator, device=device)  # (N, D)
    library = torch.as_tensor(library_size(X), device=device, dtype=torch.float32)
    blocks = [
        decoder.sample_rows(z[rows], library[rows], k[rows], generator)
        for rows in torch.arange(len(codes), device=device).split(CHUNK)
    ]
    return sp.vstack(blocks, format="csr")


def generate(cfg, n_cells, n_reference):
    """What bulk2sc.py generates from the same data and weights.

    Returns:
        counts (N x G), CSR, and cell types (N).
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        names = ("data", "labels", "weights", "seed", "device")
        shared = {name: getattr(cfg, name) for name in names}
        out, batch_size = Path(folder) / "g.h5ad", min(cfg.batch_size, n_reference)
        bulk2sc.main(bulk2sc.Settings(**shared, out=out, n_cells=n_cells, batch_size=batch_size))
        generated = anndata.read_h5ad(out)
    return generated.X, generated.obs["cell_type"].to_numpy()


def make_panels(model, gmvae, reference, cfg, rng, generator):
    """The paper's four t-SNE panels, each with an embedding of its own, and their legend."""
    rows = rng.permutation(len(reference.codes))[: cfg.max_cells]
    X, codes = reference.X[rows], reference.codes[rows]
    names, decoder = type_names(reference)[rows], model.decoder
    k = torch.as_tensor(codes, device=decoder.mu.device)
    z = decoder.sample_latent(decoder.mu[k], decoder.var[k], k, generator).cpu().numpy()
    rebuilt = reconstruct(X, codes, decoder, gmvae, model.genes, generator)
    generated, generated_names = generate(cfg, len(rows), len(reference.codes))
    for name, title, points, point_names in (
        ("pbmc1k", "raw cells", principal_components(X), names),
        ("Latent", "latent z, drawn for each cell's type", z, names),
        ("reconstructed", "reconstructed cells", principal_components(rebuilt), names),
        (
            "generated",
            "cells generated from bulk",
            principal_components(generated),
            generated_names,
        ),
    ):
        embedding = tsne(points, cfg.seed)
        title = f"{title} (n = {len(points):,})"
        save(cfg, name, write_panel, embedding, point_names, reference.cell_types, title)
    save(cfg, "labels", write_legend, reference.cell_types)


# ------------------------------------------------------------------- real beside generated cells


def make_joint(reference, test, generated, origin, cfg):
    """Real and generated cells in one t-SNE.

    Args:
        test: indices of the real cells (M). generated: counts of as many, of the same types.
        origin: what the legend calls the real ones.

    Returns:
        their :func:`mixing`.
    """
    points = principal_components(sp.vstack([reference.X[test], generated]))
    share = mixing(points, np.repeat([False, True], len(test)))
    caption = (
        f"generated cells among the {N_NEIGHBORS} nearest neighbours\n"
        f"of a real cell: {100 * share:.0f} % (50 % if they were alike)"
    )
    names = np.tile(type_names(reference)[test], 2)
    origins = np.repeat([origin, "generated"], len(test))
    embedding = tsne(points, cfg.seed)
    save(cfg, "joint", write_joint, embedding, names, reference.cell_types, origins, caption)
    return share


def make_dots(reference, test, generated, cfg):
    """Marker genes in real cells, and in as many generated ones of the same types."""
    train, types = reference.train, reference.cell_types
    log = log_cells(reference.X[train]).X
    markers = markers_of_one_type(log, reference.codes[train], len(types), reference.genes)
    if not any(markers):
        print(f"markers.{cfg.format} left out: no gene is specific to a cell type")
        return
    columns = np.concatenate([np.array(own, int) for own in markers])
    codes = reference.codes[test]
    shown = np.unique(codes)  # (T)
    parts = [log_cells(X).X.tocsc()[:, columns].toarray() for X in (reference.X[test], generated)]
    tables = [
        np.array([[value(part[codes == k]).mean(axis=0) for k in shown] for part in parts])
        for value in (np.asarray, lambda part: part > 0)
    ]
    genes = np.array(reference.genes)
    named = {name: list(genes[own]) for name, own in zip(types, markers, strict=True)}
    save(cfg, "markers", write_markers, tables, named, [types[k] for k in shown])


# ------------------------------------------------------------------------------------- pseudobulks


def make_proportions(model, reference, bulk, true, cfg):
    """Predicted against true proportions (S, K) of pseudobulks (S, G)."""
    genes, train = model.encoder_genes, reference.train
    X, read = reference.counts(genes, "the encoder", train)
    profiles = mean_counts(X, reference.codes[train], len(reference.cell_types))
    columns = pd.Index(model.genes).get_indexer(genes)
    measured, names = np.ones(bulk.shape[1], bool), [str(i) for i in range(len(bulk))]
    encoded = encode_samples(model, Bulk(bulk, measured, names, "pseudobulks"), "reference")
    pi, sd = (part.cpu().numpy().astype(float) for part in (encoded.cells, encoded.sd))
    low, high = normal_interval(pi, sd)
    other = nnls_proportions(bulk[:, columns[read]], profiles[:, read])
    inside = 100 * np.mean((low <= true) & (true <= high))
    ours, theirs = (f"CCC {concordance(true, values):.2f}" for values in (pi, other))
    texts = f"bulk2sc: {ours}; 90 % intervals hold {inside:.0f} % of the truths", f"NNLS: {theirs}"
    arguments = true, (pi, low, high), other, reference.cell_types, texts
    save(cfg, "proportions", write_predictions, *arguments)


def make_sums(model, bulk, generator, cfg):
    """A pseudobulk (1, G) against the sums of cells generated for it, plain and calibrated."""
    log_factor, pi = calibrate_to(sp.csr_matrix(bulk), model)
    panels = {
        f"{mode}: Pearson {np.corrcoef(*pair)[0, 1]:.3f}": pair
        for mode, pair in sum_points(bulk, model.decoder, pi, log_factor, generator).items()
    }
    axes = ("pseudobulk, log2(CPM + 1)", "sum of 1,000 generated cells, log2(CPM + 1)")
    save(cfg, "sums", write_points, panels, axes)


def sum_points(bulk, decoder, pi, log_factor, generator, n_cells=1000):
    """log2(CPM + 1) of a bulk (1, G) and of the sums of generated cells, plain and calibrated.

    pi (1, K), log_factor (1, G): as :func:`~deconvolution.encode.calibrate_to` gives them.

    Returns:
        dict: mode -> (bulk, sum), two arrays (G).
    """
    measured = np.ones(bulk.shape[1], bool)
    k = draw_types(pi, n_cells, generator)
    points = {}
    for mode, factor in (("as generated", None), ("--calibrate uniform", log_factor)):
        total = np.asarray(new_cells(decoder, k, generator, factor).sum(axis=0))  # (1, G)
        points[mode] = tuple(log_cpm(part, measured, pseudocount=1)[0] for part in (bulk, total))
    return points


# ------------------------------------------------------------------------------------------ losses


def make_curves(cfg, loss):
    """The loss curves of the trainings, as far as the weights folder has them.

    loss: of scDecoder, which says the unit.
    """
    curves = {}
    for stage in ("scGMVAE", "scDecoder", "bulkEncoder"):
        file = cfg.weights / f"{stage}_loss.csv"
        if file.is_file():
            curves[stage] = pd.read_csv(file)
        else:
            print(f"{file}: no such file, so {stage} is left out of losses.{cfg.format}")
    if curves:
        save(cfg, "losses", write_curves, curves, loss)


# ------------------------------------------------------------- a donor's cells under two conditions


def make_state_pictures(model, reference, cfg):
    """states.png and state_genes.png; without a donor to show, a line was printed that says so."""
    found = find_donor(reference.cells.obs, reference.held_out, cfg)
    if found is None:
        return
    genes = pick_genes(cfg.state_genes, reference, found.conditions)
    cells = generate_donor(found, model, reference, cfg)
    make_states(reference, cells, cfg)
    make_state_genes(reference, cells, genes, cfg)


def make_states(reference, cells, cfg):
    """Real and generated cells of both conditions in one t-SNE; prints their mixing.

    cells: DonorCells.
    """
    points = principal_components(sp.vstack([cells.real, cells.generated]))
    caption = describe_mixing(nearest_neighbors(points), cells)
    names, types = np.tile(np.array(reference.cell_types)[cells.codes], 2), reference.cell_types
    save(cfg, "states", write_joint, tsne(points, cfg.seed), names, types, cells.origins, caption)
    print(caption)


def make_state_genes(reference, cells, genes, cfg):
    """Genes in the donor's cell types under both conditions. genes: names (P)."""
    n_cells, donor = count_cells(cells, len(reference.cell_types)), cells.found.donor
    types = shown_types(n_cells)
    if not len(types) or not genes:
        few = f"no cell type of donor {donor} has {MIN_CELLS} cells under both conditions"
        print(f"state_genes.{cfg.format} left out: {few if genes else 'no gene differs'}")
        return
    table = state_table(cells, pd.Index(reference.genes).get_indexer(genes), types)
    names = {reference.cell_types[k]: n_cells[:, k] for k in types}
    save(cfg, "state_genes", write_state_genes, table, genes, names, cells.found.conditions, donor)


# ---------------------------------------------------------------------------------- all together


def make_reference_pictures(model, gmvae, reference, cfg, rng):
    """Every picture that needs neither samples nor conditions."""
    decoder, codes, device = model.decoder, reference.codes, model.device
    generator = torch.Generator(device).manual_seed(cfg.seed)
    make_panels(model, gmvae, reference, cfg, rng, generator)

    # From here on cells that no training has seen, if there are enough.
    enough = reference.held_out.sum() >= MIN_HELD_OUT
    pool = reference.test if enough else np.arange(len(codes))
    test = rng.permutation(pool)[: cfg.max_cells]
    generated = new_cells(decoder, torch.as_tensor(codes[test], device=device), generator)
    origin = "real, never trained on" if enough else "real, trained on"
    share = make_joint(reference, test, generated, origin, cfg)
    make_dots(reference, test, generated, cfg)

    rows, n_types = np.sort(test), len(reference.cell_types)
    bulk, true = draw_test_bulks(reference.X[rows], codes[rows], n_types, 100, 500, rng)
    make_proportions(model, reference, bulk, true, cfg)
    make_sums(model, bulk[:1], generator, cfg)

    make_curves(cfg, decoder.config["likelihood"])
    save(cfg, "schematic", write_schematic)
    print(f"generated cells among the {N_NEIGHBORS} nearest neighbours of a real one: {share:.2f}")


def main(cfg):
    check_writable(cfg.out)
    rng = seed_everything(cfg.seed)
    model, gmvae, reference = load_reference(cfg, pick_device(cfg.device))
    make_state_pictures(model, reference, cfg)
    if not cfg.states_only:
        make_reference_pictures(model, gmvae, reference, cfg, rng)


if __name__ == "__main__":
    run_script(main, settings)
