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
from runtime.errors import InputError
from runtime.flags import flag, in_groups
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
        if self.max_cells < 10:
            raise InputError(f"--max-cells: found {self.max_cells}, expected 10 or more")
        if self.batch_size < 1:
            raise InputError(f"--batch-size: found {self.batch_size}, expected 1 or more")
        needs = {"donors": "samples", "conditions": "samples"}
        needs |= dict.fromkeys(("contrast", "state_genes", "states_only"), "conditions")
        for name, needed in needs.items():
            if getattr(self, name) and not getattr(self, needed):
                raise InputError(f"{flag(name)}: found no {flag(needed)}, which it needs")


if __name__ == "__main__":
    settings = parse_args(Settings)  # before the slow imports, so that --help answers at once

import contextlib
import io
import tempfile

import anndata
import numpy as np
import pandas as pd
import scanpy
import scipy.sparse as sp
import torch
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors

import bulk2sc
from data import (
    HOUSEKEEPING,
    align_genes,
    codes_of,
    draw_test_bulks,
    library_size,
    load_cells,
    log_normalise,
    mean_counts,
)
from deconvolution.proportions import normal_interval
from deconvolution.published import nnls_proportions
from evaluation.metrics import concordance
from generation import (
    CHUNK,
    calibrate_to,
    draw_types,
    encode_samples,
    load_weights,
    log_cpm,
    new_cells,
)
from models import BulkEncoder, encode_cells, scDecoder, scGMVAE
from plots.cells import (
    write_joint,
    write_legend,
    write_markers,
    write_panel,
    write_points,
    write_predictions,
    write_schematic,
    write_state_genes,
)
from plots.states import (
    FEWEST_CELLS,
    count_cells,
    describe_mixing,
    find_donor,
    generate_donor,
    pick_genes,
    shown_types,
    state_table,
)
from plots.training import write_curves
from runtime.device import pick_device, seed_everything
from runtime.weights import load_model
from runtime.writing import check_writable

FEWEST_TO_COMPARE = 3  # cells of a type that markers of others are compared with
FEWEST_FOR_MARKERS = 10  # cells of a type with markers; with fewer, chance chooses them
LEAST_FRACTION = 0.1  # of a type's cells that have counts of its marker
LEAST_RATIO = 1.3  # of its mean log-expression there to that in any other type
LEAST_T = 2.0  # Welch's t against the nearest type: not by chance alone
N_NEIGHBORS = 30  # of each real cell, among which generated ones are counted
MIN_HELD_OUT = 10  # held-out cells below which training cells are shown instead


@dataclass
class Reference:
    """The reference cells in the decoder's genes, and the models trained on them."""

    X: sp.csr_matrix
    """Counts (N x G)."""
    codes: np.ndarray
    """Cell types (N)."""
    cell_types: list[str]
    """Their names (K)."""
    held_out: np.ndarray
    """Mask of the cells that no training has seen (N)."""
    obs: pd.DataFrame
    """Sample, donor and condition of the cells, as far as the settings give them (N rows)."""
    genes: list[str]
    """Names (G)."""
    encoder_genes: list[str]
    decoder: scDecoder
    encoder: BulkEncoder
    gmvae: tuple[scGMVAE, dict] | None
    """scGMVAE and its card, if the weights have one."""
    cards: tuple[dict, dict]
    """Of the encoder and of the decoder."""

    def __post_init__(self):
        self.names = np.array(self.cell_types)[self.codes]  # (N)
        everything = np.ones(len(self.codes), bool)
        self.train = ~self.held_out if (~self.held_out).any() else everything


def load_reference(cfg, device):
    cells = load_cells(cfg)
    codes, cell_types = codes_of(cells)
    loaded = load_weights(cfg.weights, cells, cell_types, device, fewest=0)
    decoder, card, encoder, encoder_card, held_out = loaded
    gmvae_file = cfg.weights / "scGMVAE_model.pt"
    gmvae = load_model(gmvae_file, scGMVAE, device) if gmvae_file.exists() else None
    genes, encoder_genes = card["genes"], encoder_card["genes"]
    X, _ = align_genes(cells.X, cells.var_names, genes, cfg.data, report=False)
    obs, models = cells.obs, (decoder, encoder, gmvae)
    cards = encoder_card, card
    return Reference(X, codes, cell_types, held_out, obs, genes, encoder_genes, *models, cards)


def save(cfg, name, write, *arguments):
    """Write a picture by one of plotting's functions."""
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


def tsne(points, seed):
    """t-SNE (N, 2) of points (N, D); perplexity 30, or a third of their number if that is less."""
    perplexity = min(30, (len(points) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(points)


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
        gmvae: scGMVAE and its card; None draws z from each cell's type instead.
    """
    device = decoder.mu.device
    k = torch.as_tensor(codes, device=device)
    mean, var = decoder.mu[k], decoder.var[k]  # (N, D)
    if gmvae is not None:
        model, card = gmvae
        X_model, _ = align_genes(X, genes, card["genes"], "scGMVAE", report=False)
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


def make_panels(reference, cfg, rng, generator):
    """The paper's four t-SNE panels, each with an embedding of its own, and their legend."""
    rows = rng.permutation(len(reference.codes))[: cfg.max_cells]
    X, codes, names = reference.X[rows], reference.codes[rows], reference.names[rows]
    decoder = reference.decoder
    k = torch.as_tensor(codes, device=decoder.mu.device)
    z = decoder.sample_latent(decoder.mu[k], decoder.var[k], k, generator).cpu().numpy()
    rebuilt = reconstruct(X, codes, decoder, reference.gmvae, reference.genes, generator)
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
    names = np.tile(reference.names[test], 2)
    origins = np.repeat([origin, "generated"], len(test))
    embedding = tsne(points, cfg.seed)
    save(cfg, "joint", write_joint, embedding, names, reference.cell_types, origins, caption)
    return share


def make_dots(reference, test, generated, cfg):
    """Marker genes in real cells, and in as many generated ones of the same types."""
    train, types = reference.train, reference.cell_types
    log = log_cells(reference.X[train]).X
    markers = choose_markers(log, reference.codes[train], len(types), reference.genes)
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


def choose_markers(log, codes, n_types, genes, most=2):
    """Genes that mark one cell type alone: the most specific ones, up to ``most`` for each type.

    A gene is ranked by Welch's t of the type's cells against those of the type that comes nearest,
    so it is above every other type. None is a gene that HOUSEKEEPING names, or one that most cells
    of most types have, as housekeeping genes are.

    Args:
        log: log-normalised counts (N x G), CSR. codes: cell types (N), 0 to n_types - 1. genes:
            names (G).

    Returns:
        list (K) of gene indices; empty for a type of too few cells, or without such a gene.
    """
    size = np.bincount(codes, minlength=n_types)
    one_hot = sp.csr_matrix((np.ones(len(codes)), (codes, np.arange(len(codes)))))
    one_hot.resize((n_types, len(codes)))
    n = np.maximum(size, 1)[:, None]
    mean, square, fraction = (
        (one_hot @ part).toarray() / n for part in (log, log.multiply(log).tocsr(), log > 0)
    )  # (K, G) each
    error = np.maximum(square - mean**2, 1e-6) / np.maximum(n - 1, 1)
    there = size >= FEWEST_TO_COMPARE
    if there.sum() < 2:
        return [[] for _ in range(n_types)]
    housekeeping = np.array([bool(HOUSEKEEPING.match(name)) for name in genes])
    common = (fraction[there] > 0.5).mean(axis=0) > 0.5
    allowed = ~housekeeping & ~common
    markers = []
    for k in range(n_types):
        others = there.copy()
        others[k] = False
        t = (mean[k] - mean[others]) / np.sqrt(error[k] + error[others])  # (K', G)
        above = mean[k] >= LEAST_RATIO * mean[others].max(axis=0)
        often = fraction[k] >= LEAST_FRACTION
        score = np.where(allowed & above & often, t.min(axis=0), -np.inf)
        best = np.argsort(-score, kind="stable")[:most] if size[k] >= FEWEST_FOR_MARKERS else []
        markers.append([i for i in best if score[i] > LEAST_T])
    return markers


# ------------------------------------------------------------------------------------- pseudobulks


def make_proportions(reference, bulk, true, cfg):
    """Predicted against true proportions (S, K) of pseudobulks (S, G)."""
    genes = reference.encoder_genes
    X, read = align_genes(reference.X, reference.genes, genes, "the encoder", report=False)
    train = reference.train
    profiles = mean_counts(X[train], reference.codes[train], len(reference.cell_types))
    columns = pd.Index(reference.genes).get_indexer(genes)
    models = reference.encoder, reference.cards[0], reference.decoder, reference.cards[1]
    measured, names = np.ones(bulk.shape[1], bool), [str(i) for i in range(len(bulk))]
    answer = encode_samples(models, bulk, measured, names, "pseudobulks", "reference")
    pi, sd = (part.cpu().numpy().astype(float) for part in (answer.cells, answer.sd))
    low, high = normal_interval(pi, sd)
    other = nnls_proportions(bulk[:, columns[read]], profiles[:, read])
    inside = 100 * np.mean((low <= true) & (true <= high))
    ours, theirs = (f"CCC {concordance(true, values):.2f}" for values in (pi, other))
    texts = f"bulk2sc: {ours}; 90 % intervals hold {inside:.0f} % of the truths", f"NNLS: {theirs}"
    arguments = true, (pi, low, high), other, reference.cell_types, texts
    save(cfg, "proportions", write_predictions, *arguments)


def make_sums(reference, bulk, generator, cfg):
    """A pseudobulk (1, G) against the sums of cells generated for it, plain and calibrated."""
    decoder, genes = reference.decoder, (reference.genes, reference.encoder_genes)
    log_factor, pi = calibrate_to(sp.csr_matrix(bulk), decoder, reference.encoder, genes)
    panels = {
        f"{mode}: Pearson {np.corrcoef(*pair)[0, 1]:.3f}": pair
        for mode, pair in sum_points(bulk, decoder, pi, log_factor, generator).items()
    }
    axes = ("pseudobulk, log2(CPM + 1)", "sum of 1,000 generated cells, log2(CPM + 1)")
    save(cfg, "sums", write_points, panels, axes)


def sum_points(bulk, decoder, pi, log_factor, generator, n_cells=1000):
    """log2(CPM + 1) of a bulk (1, G) and of the sums of generated cells, plain and calibrated.

    pi (1, K), log_factor (1, G): as :func:`generation.calibrate_to` gives them.

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


def make_state_pictures(reference, cfg):
    """states.png and state_genes.png; without a donor to show, a line was printed that says so."""
    found = find_donor(reference.obs, reference.held_out, cfg)
    if found is None:
        return
    genes = pick_genes(cfg.state_genes, reference, found.conditions)
    cells = generate_donor(found, reference, cfg)
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
        few = f"no cell type of donor {donor} has {FEWEST_CELLS} cells under both conditions"
        print(f"state_genes.{cfg.format} left out: {few if genes else 'no gene differs'}")
        return
    table = state_table(cells, pd.Index(reference.genes).get_indexer(genes), types)
    names = {reference.cell_types[k]: n_cells[:, k] for k in types}
    save(cfg, "state_genes", write_state_genes, table, genes, names, cells.found.conditions, donor)


# ---------------------------------------------------------------------------------- all together


def make_reference_pictures(reference, cfg, rng):
    """Every picture that needs neither samples nor conditions."""
    decoder, codes = reference.decoder, reference.codes
    device = decoder.mu.device
    generator = torch.Generator(device).manual_seed(cfg.seed)
    make_panels(reference, cfg, rng, generator)

    # From here on cells that no training has seen, if there are enough.
    enough = reference.held_out.sum() >= MIN_HELD_OUT
    pool = np.flatnonzero(reference.held_out) if enough else np.arange(len(codes))
    test = rng.permutation(pool)[: cfg.max_cells]
    generated = new_cells(decoder, torch.as_tensor(codes[test], device=device), generator)
    origin = "real, never trained on" if enough else "real, trained on"
    share = make_joint(reference, test, generated, origin, cfg)
    make_dots(reference, test, generated, cfg)

    rows, n_types = np.sort(test), len(reference.cell_types)
    bulk, true = draw_test_bulks(reference.X[rows], codes[rows], n_types, 100, 500, rng)
    make_proportions(reference, bulk, true, cfg)
    make_sums(reference, bulk[:1], generator, cfg)

    make_curves(cfg, decoder.config["likelihood"])
    save(cfg, "schematic", write_schematic)
    print(f"generated cells among the {N_NEIGHBORS} nearest neighbours of a real one: {share:.2f}")


def main(cfg):
    check_writable(cfg.out)
    rng = seed_everything(cfg.seed)
    reference = load_reference(cfg, pick_device(cfg.device))
    make_state_pictures(reference, cfg)
    if not cfg.states_only:
        make_reference_pictures(reference, cfg, rng)


if __name__ == "__main__":
    run_script(main, settings)
