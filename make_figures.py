"""Every picture of README, remade from a dataset and the weights trained on it.

    python make_figures.py                                         # embedded data, shipped weights
    python make_figures.py --data pbmc1k_v3 --weights w0           # README's own

Writes to --out (figures): the paper's four t-SNE panels, pbmc1k.png (the raw cells, whatever the
dataset), Latent.png, reconstructed.png and generated.png; labels.png, their legend alone;
joint.png, real and generated cells in one t-SNE; proportions.png, sums.png, markers.png, losses.png
and schematic.png.
"""

import contextlib
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

import bulk2sc
from baselines import predict_proportions
from data import (
    DatasetSettings,
    align_genes,
    codes_of,
    draw_test_bulks,
    library_size,
    load_cells,
    log_normalise,
    mean_counts,
)
from generation import CHUNK, calibrate_to, draw_types, load_weights, log_cpm, new_cells
from metrics import concordance, find_markers
from models import encode_cells, scGMVAE
from plotting import (
    write_curves,
    write_joint,
    write_legend,
    write_panel,
    write_points,
    write_schematic,
    write_whole_figure,
)
from runtime.device import pick_device, seed_everything
from runtime.errors import InputError
from runtime.script import run_script
from runtime.weights import load_model

N_NEIGHBORS = 30  # of each real cell, in which generated ones are counted


@dataclass
class Settings(DatasetSettings):
    out: Path = Path("figures")
    """Folder of the pictures."""
    max_cells: int = 3000
    """Most cells in a panel; of more, a random part is shown, and t-SNE stays quick."""
    batch_size: int = 100
    """Reference cells in the bulk that each generated cell comes from, as in bulk2sc.py."""

    def __post_init__(self):
        super().__post_init__()
        if self.max_cells < 10:
            raise InputError(f"--max-cells: found {self.max_cells}, expected 10 or more")
        if self.batch_size < 1:
            raise InputError(f"--batch-size: found {self.batch_size}, expected 1 or more")


def log_cells(X):
    """AnnData of counts (N x G), CSR, log-normalised in float32, which is scanpy's default."""
    import anndata

    return anndata.AnnData(log_normalise(X, dtype=np.float32))


def principal_components(X, n=50):
    """PCs (N, n) of counts (N x G) as usual: log-normalised, 2,000 variable genes, scaled."""
    import scanpy

    cells = log_cells(X)
    if cells.n_vars > 2000:
        scanpy.pp.highly_variable_genes(cells, n_top_genes=2000)
        cells = cells[:, cells.var["highly_variable"]].copy()
    cells.X = cells.X.toarray()
    scanpy.pp.scale(cells, max_value=10)
    cells.X = np.nan_to_num(cells.X)  # genes that no cell of a panel has
    scanpy.pp.pca(cells, n_comps=min(n, cells.n_obs - 1, cells.n_vars - 1), random_state=0)
    return cells.obsm["X_pca"]


def tsne(points, seed):
    """t-SNE (N, 2) of points (N, D) by scikit-learn; perplexity 30, or a third of few points."""
    from sklearn.manifold import TSNE

    perplexity = min(30, (len(points) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(points)


@torch.inference_mode()
def reconstruct(X, codes, decoder, gmvae, genes, generator):
    """Counts (N x G) of cells decoded from their own posteriors, at their own library sizes.

    Without scGMVAE, z is of each cell's type. X: counts (N x G), CSR, in the decoder's ``genes``.
    """
    device = decoder.mu.device
    k = torch.as_tensor(codes, device=device)
    mean, var = decoder.mu[k], decoder.var[k]
    if gmvae is not None:
        model, card = gmvae
        seen, _ = align_genes(X, genes, card["genes"], "scGMVAE", report=False)
        mean, var = (part.to(device) for part in encode_cells(model, seen, CHUNK))
    z = mean + var.sqrt() * torch.randn(mean.shape, generator=generator, device=device)
    library = torch.as_tensor(library_size(X), device=device, dtype=torch.float32)
    blocks = [
        decoder.sample_rows(z[rows], library[rows], k[rows], generator)
        for rows in torch.arange(len(codes), device=device).split(CHUNK)
    ]
    return sp.vstack(blocks, format="csr")


def generate(cfg, n_cells, n_reference):
    """What bulk2sc.py gives for the same data and weights: counts (N x G), CSR, and cell types."""
    import anndata

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        names = ("data", "labels", "weights", "seed", "device")
        shared = {name: getattr(cfg, name) for name in names}
        out, batch_size = Path(folder) / "g.h5ad", min(cfg.batch_size, n_reference)
        bulk2sc.main(bulk2sc.Settings(**shared, out=out, n_cells=n_cells, batch_size=batch_size))
        generated = anndata.read_h5ad(out)
    return generated.X, generated.obs["cell_type"].to_numpy()


def mixing(points, made):
    """Share of generated cells among each real cell's neighbours, mean over the real cells.

    points: PCs of real and generated cells together (N, D). made: which are generated (N).
    """
    from sklearn.neighbors import NearestNeighbors

    n = min(N_NEIGHBORS, len(points) - 1)
    near = NearestNeighbors(n_neighbors=n).fit(points)
    return made[near.kneighbors(return_distance=False)][~made].mean()


def sum_points(bulk, decoder, pi, log_factor, generator, n_cells=1000):
    """log2(CPM + 1) of a bulk (1, G) and of the sums of generated cells, plain and calibrated.

    pi (1, K), log_factor (1, G): as :func:`evaluate.calibrate_to` gives them.

    Returns:
        dict: mode -> (bulk, sum), two arrays (G).
    """
    present = np.ones(bulk.shape[1], bool)
    k = draw_types(pi, n_cells, generator)
    points = {}
    for mode, factor in (("as generated", None), ("--calibrate", log_factor)):
        total = new_cells(decoder, k, generator, factor, torch.zeros_like(k)).sum(axis=0)
        sums = bulk, np.asarray(total)
        points[mode] = tuple(log_cpm(part, present, 1)[0] for part in sums)
    return points


def write_dots(path, real, real_types, made, made_types, markers, genes):
    """Dot plot of marker genes, each cell type's real cells above its generated ones.

    real, made: AnnData, log-normalised, in the same ``genes``. markers: type -> gene indices.
    """
    import anndata
    import scanpy

    cells = anndata.concat({"real": real, "made": made}, index_unique="-")
    cells.var_names = genes
    kinds = [f"{name}, real" for name in real_types] + [f"{name}, generated" for name in made_types]
    order = [f"{name}, {of}" for name in markers for of in ("real", "generated")]
    cells.obs["group"] = pd.Categorical(kinds, categories=[o for o in order if o in set(kinds)])
    shown, seen = {}, set()
    for name, at in markers.items():
        own = [genes[i] for i in at if genes[i] not in seen][:2]
        seen |= set(own)
        if own:
            shown[name] = own
    dots = scanpy.pl.DotPlot(
        cells, [g for own in shown.values() for g in own], "group", standard_scale="var"
    )
    dots.style(cmap="viridis_r", dot_edge_color="0.3", dot_edge_lw=0.3)
    dots.legend(colorbar_title="mean, scaled\nper gene", size_title="cells with\ncounts (%)")
    dots.make_figure()
    dots.ax_dict["mainplot_ax"].set_title("marker genes, real cells above generated ones")
    write_whole_figure(path, dots.fig, bbox_inches="tight")


def main(cfg):
    rng = seed_everything(cfg.seed)
    device = pick_device(cfg.device)
    cells = load_cells(cfg)
    codes, cell_types = codes_of(cells)
    loaded = load_weights(cfg.weights, cells, cell_types, device, fewest=0)
    decoder, card, encoder, encoder_card, held_out = loaded
    gmvae_file = cfg.weights / "scGMVAE_model.pt"
    gmvae = load_model(gmvae_file, scGMVAE, device) if gmvae_file.exists() else None
    genes = card["genes"]
    X, _ = align_genes(cells.X, cells.var_names, genes, cfg.data, report=False)
    generator = torch.Generator(device).manual_seed(cfg.seed)
    types = np.array(cell_types)

    def save(name, write, *arguments):
        write(cfg.out / f"{name}.png", *arguments)
        print(f"wrote {cfg.out / name}.png")

    # The paper's panels, each embedded by itself.
    shown = rng.permutation(len(codes))[: cfg.max_cells]
    X_shown, codes_shown = X[shown], codes[shown]
    k = torch.as_tensor(codes_shown, device=device)
    z = decoder.sample_latent(decoder.mu[k], decoder.var[k], k, generator).cpu().numpy()
    rebuilt = reconstruct(X_shown, codes_shown, decoder, gmvae, genes, generator)
    made, made_types = generate(cfg, len(shown), len(codes))
    for name, title, points, labels in (
        ("pbmc1k", "raw cells", principal_components(X_shown), types[codes_shown]),
        ("Latent", "latent: z of each type's μ, σ²", z, types[codes_shown]),
        ("reconstructed", "reconstructed cells", principal_components(rebuilt), types[codes_shown]),
        ("generated", "cells generated from bulk", principal_components(made), made_types),
    ):
        save(name, write_panel, tsne(points, cfg.seed), labels, cell_types, title)
    save("labels", write_legend, cell_types)

    # Real and generated cells together, on cells that no training saw where there are such.
    unseen = held_out.sum() >= 10
    test = np.flatnonzero(held_out if unseen else np.ones(len(codes), bool))
    test = rng.permutation(test)[: cfg.max_cells]
    k = torch.as_tensor(codes[test], device=device)
    new = new_cells(decoder, k, generator)
    points = principal_components(sp.vstack([X[test], new]))
    is_made = np.repeat([False, True], len(test))
    both = np.tile(types[codes[test]], 2)
    share = mixing(points, is_made)
    at = tsne(points, cfg.seed)
    save("joint", write_joint, at, both, cell_types, is_made, share, N_NEIGHBORS, unseen)

    marker_cells = ~held_out if (~held_out).any() else np.ones(len(codes), bool)
    markers = find_markers(log_cells(X[marker_cells]), codes[marker_cells])
    markers = {cell_types[k]: markers[k] for k in sorted(markers)}
    real, fake = log_cells(X[test]), log_cells(new)
    names = types[codes[test]]
    save("markers", write_dots, real, names, fake, names, markers, genes)

    # Predicted proportions and sums, on pseudobulks of the same cells.
    order = np.sort(test)
    X_encoder, present = align_genes(X, genes, encoder_card["genes"], "the encoder", report=False)
    bulk, true = draw_test_bulks(X[order], codes[order], len(types), 100, 500, rng)
    at = pd.Index(genes).get_indexer(encoder_card["genes"])
    profiles = mean_counts(X_encoder[marker_cells], codes[marker_cells], len(types))
    predicted = predict_proportions(encoder, bulk[:, at], present, profiles)
    panels = {
        f"{method}: CCC {concordance(true, pi):.2f}": (true, pi) for method, pi in predicted.items()
    }
    colors = np.tile(types, len(true))
    axes = ("true proportion", "predicted proportion")
    save("proportions", write_points, panels, axes, colors, cell_types)
    log_factor, pi = calibrate_to(
        sp.csr_matrix(bulk[:1]), decoder, encoder, (genes, encoder_card["genes"])
    )
    panels = {
        f"{mode}: Pearson {np.corrcoef(*pair)[0, 1]:.3f}": pair
        for mode, pair in sum_points(bulk[:1], decoder, pi, log_factor, generator).items()
    }
    save("sums", write_points, panels, ("bulk, log2(CPM + 1)", "sum of 1,000 cells, log2(CPM + 1)"))

    curves = {}
    for stage in ("scGMVAE", "scDecoder", "bulkEncoder"):
        file = cfg.weights / f"{stage}_loss.csv"
        if file.is_file():
            curves[stage] = pd.read_csv(file)
        else:
            print(f"{file}: no such file, so {stage} is left out of losses.png")
    if curves:
        save("losses", write_curves, curves)
    save("schematic", write_schematic)
    print(f"generated cells among the {N_NEIGHBORS} nearest neighbours of a real one: {share:.2f}")


if __name__ == "__main__":
    run_script(main, Settings)
