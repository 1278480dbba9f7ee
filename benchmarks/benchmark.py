"""How fast cells are made and models are trained, beside the published loops and scVI, in one run.

    python benchmarks/benchmark.py                        # some minutes; generation alone
    python benchmarks/benchmark.py --training             # half an hour more, scVI if installed

Every reading is a process of its own, so that its peak memory is its own, too. Cells are made by a
decoder of random weights, with the library sizes and the spread of expression of PBMC; what the
weights are makes no difference to speed. Writes benchmark.csv, benchmark.png and training.csv to
--out.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import tyro
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from generation import generate_cells  # noqa: E402
from models import scDecoder  # noqa: E402
from runtime.script import silence  # noqa: E402
from runtime.writing import open_cells, write_whole  # noqa: E402

K, D, N_REFERENCE = 8, 10, 906  # cell types, latents and cells, as in PBMC 1K
PUBLISHED_EPOCHS = {"scDecoder": 5000, "Bulk Encoder": 3000}


@dataclass
class Settings:
    n_genes: tuple[int, ...] = (2000, 14688)
    """Genes of a cell."""
    n_cells: tuple[int, ...] = (1000, 10_000, 100_000)
    """Cells to generate."""
    rounds: int = 3
    """Readings of each; the table has their median."""
    training: bool = False
    """Measure training as well: our three stages, the published full-batch epochs, and scVI."""
    data: str = "pbmc68k_reduced"
    """Cells to train on."""
    labels: str | None = None
    """Their types, as in the trainings."""
    out: Path = Path("benchmarks")
    """Folder of benchmark.csv and benchmark.png."""
    only: str = ""
    """One reading (kind, genes, cells), printed as JSON; how this script calls itself."""


# ---------------------------------------------------------------------------------- our models


def random_decoder(n_genes, seed=0):
    """A decoder of random weights: 6,000 counts a cell, genes log-normal with a sd of 2.5."""
    torch.manual_seed(seed)
    decoder = scDecoder(D, 128, n_genes, K, "nb", 0.2, n_components=12).eval()
    profile = torch.randn(n_genes).mul(2.5).softmax(dim=0)
    decoder.start_at(profile, theta=2.0)
    decoder.log_library.copy_(np.log(6000) + 0.4 * torch.linspace(-2, 2, 64).expand(K, -1))
    decoder.type_log_factor.copy_(0.5 * torch.randn(K, n_genes))
    decoder.mu.copy_(torch.randn(K, D))
    return decoder


def generate_chunks(decoder, n_cells, generator):
    """One bulk's cells, chunk by chunk, as ``bulk2sc.py --bulk`` generates them."""
    pi = torch.full((1, K), 1 / K)
    encoded = decoder.mu[None], decoder.var[None], pi  # (1, K, D), (1, K, D), (1, K)
    return generate_cells(decoder, encoded, n_cells, generator)


def generate(n_genes, n_cells):
    """Counts in memory, dropped chunk by chunk. Returns seconds."""
    decoder = random_decoder(n_genes)
    generator = torch.Generator().manual_seed(0)
    for _ in generate_chunks(decoder, 100, generator):
        pass  # compiles the sampler and starts its threads
    start = time.perf_counter()
    for _ in generate_chunks(decoder, n_cells, generator):
        pass
    return time.perf_counter() - start


def generate_file(n_genes, n_cells):
    """Counts into an .h5ad. Returns seconds."""
    import anndata

    decoder = random_decoder(n_genes)
    generator = torch.Generator().manual_seed(0)
    for _ in generate_chunks(decoder, 100, generator):
        pass
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        obs = pd.DataFrame(index=[f"cell_{i}" for i in range(n_cells)])
        genes = [f"gene_{i}" for i in range(n_genes)]
        with open_cells(Path(folder) / "cells.h5ad", genes) as file:
            for cells in generate_chunks(decoder, n_cells, generator):
                file.append(cells.counts)
            file.write_tables(anndata.AnnData(obs=obs))
        return time.perf_counter() - start


def limit(n_genes, n_cells):
    """What the pipeline cannot beat: its matrix products and its sampler's kernel, alone.

    Both on as many threads as there are, over the same blocks. Returns seconds.
    """
    from concurrent.futures import ThreadPoolExecutor

    from runtime import sampler

    decoder = random_decoder(n_genes)
    n_threads = torch.get_num_threads()
    h = torch.rand(sampler.BLOCK, 128)
    W = decoder.out.weight.detach()
    factor = (decoder.out.bias + decoder.type_log_factor).detach().numpy()
    theta = decoder.theta.detach().expand(K, -1).contiguous().numpy()
    codes = np.arange(sampler.BLOCK) % K
    library = np.full(sampler.BLOCK, 6000.0)
    cells, none = np.arange(sampler.BLOCK, dtype=np.uint64), np.empty((0, n_genes), np.float32)
    logits = (h @ W.T).numpy()

    def kernel(_):
        start = time.perf_counter()
        own = logits.copy()
        copied = time.perf_counter()
        sampler.sample_block(own, factor, codes, none, codes, library, theta, np.uint64(1), cells)
        return time.perf_counter() - copied, copied - start

    kernel(0)
    n_blocks = max(4, n_cells // sampler.BLOCK)
    torch.set_num_threads(1)

    def timed(function):
        with ThreadPoolExecutor(
            n_threads, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            start = time.perf_counter()
            found = list(pool.map(function, range(n_blocks)))
            return time.perf_counter() - start, found

    product, _ = timed(lambda _: torch.mm(h, W.T).shape)  # a product is dropped as soon as made
    draws, parts = timed(kernel)
    copies = sum(copy for _, copy in parts) / n_threads  # no part of the limit
    return (product + draws - copies) * n_cells / (n_blocks * sampler.BLOCK)


# ------------------------------------------------------------------------- the published loops


def published_encoder(n_genes):
    """G -> 700 -> three heads, as published."""
    return nn.Sequential(nn.Linear(n_genes, 700), nn.ReLU(), nn.Linear(700, 2 * K * D + K))


def published_decoder(n_genes):
    """D -> 350 -> 700 -> G, as published."""
    sizes = [(D, 350), (350, 700), (700, n_genes)]
    return nn.Sequential(*(layer for a, b in sizes for layer in (nn.Linear(a, b), nn.ReLU())))


def published_generation(n_genes, n_cells):
    """For each cell: the whole dataset through the encoder, with gradients kept, then one z.

    Of at most 20 cells, as each costs the same. Returns seconds for all.
    """
    torch.manual_seed(0)
    encoder, decoder = published_encoder(n_genes), published_decoder(n_genes)
    X = torch.poisson(torch.full((N_REFERENCE, n_genes), 0.4))
    n = min(n_cells, 20)
    made = []
    start = time.perf_counter()
    for _ in range(n):
        out = encoder(X)
        mu, var = out[:, : K * D].mean(dim=0), out[:, K * D : 2 * K * D].abs().mean(dim=0)
        z = mu + var.sqrt() * torch.randn(K * D)
        made.append(decoder(z[:D]))
    return (time.perf_counter() - start) * n_cells / n


def published_training(data, labels):
    """Full-batch epochs of scDecoder and Bulk Encoder. Returns seconds for the published numbers.

    Of five epochs each, as each costs the same; autoCell, its first stage, is not in it. Its
    squared errors are no likelihood.
    """
    cells, _ = reference(data, labels)
    X = torch.from_numpy(cells.X.toarray().astype(np.float32))
    total = 0.0
    for name, network, given, target in (
        ("scDecoder", published_decoder(X.shape[1]), torch.randn(len(X), D), X),
        ("Bulk Encoder", published_encoder(X.shape[1]), X.sum(0)[None], torch.zeros(1, 168)),
    ):
        optimizer = torch.optim.Adam(network.parameters(), 5e-3)
        start = time.perf_counter()
        for _ in range(5):
            error = network(given) - target
            loss = (error**2).sum() + error.abs().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        total += (time.perf_counter() - start) * PUBLISHED_EPOCHS[name] / 5
    return total, None


# ------------------------------------------------------------------------------------ training


def reference(data, labels):
    """Cells to train on, and the fifth of them that is held out; the same ones for all."""
    from data import DatasetSettings, codes_of, load_cells, split_cells

    with silence():
        cells = load_cells(DatasetSettings(data=data, labels=labels))
    held_out = split_cells(codes_of(cells)[0], 0.2, seed=0)
    return cells[~held_out].copy(), cells[held_out].copy()


def our_training(data, labels):
    """The three scripts as they are, start-up and all.

    Returns seconds and the mean held-out log-likelihood of a cell (:func:`our_elbo`).
    """
    with tempfile.TemporaryDirectory() as folder:
        more = ["--labels", labels] if labels else []
        start = time.perf_counter()
        for script in ("train_gmvae.py", "train_decoder.py", "train_encoder.py"):
            command = [sys.executable, ROOT / script, "--data", data, "--weights", folder, *more]
            subprocess.run(list(map(str, command)), check=True, capture_output=True)
        return time.perf_counter() - start, our_elbo(Path(folder), *reference(data, labels))


@torch.inference_mode()
def our_elbo(weights, training, held_out, n=10):
    """Mean over held-out cells of a lower bound of ln p(x, y | l), l the cell's library size.

        E_q[ ln p(x | z, y, l) + ln p(z | y) - ln q(z | x) ] + ln p(y)

    with p(z | y) the shape of type y that cells are generated from, and p(y) its share of the
    training cells. n: draws of z.
    """
    from data import align_genes, codes_of
    from models import encode_cells, nb_log_prob, scGMVAE
    from runtime.weights import load_model

    gmvae, card = load_model(weights / "scGMVAE_model.pt", scGMVAE)
    decoder, own = load_model(weights / "scDecoder_model.pt", scDecoder)
    if set(own["held_out"]) != set(held_out.obs_names):
        raise ValueError("the models hold out other cells")
    decoder.eval()
    y = torch.from_numpy(codes_of(held_out)[0])  # (N)
    share = np.bincount(codes_of(training)[0], minlength=len(own["cell_types"])) / training.n_obs
    x = torch.from_numpy(held_out.X.toarray().astype(np.float32))  # (N, G)
    seen, _ = align_genes(held_out.X, held_out.var_names, card["genes"], "the reference")
    mean, var = encode_cells(gmvae, seen, 256)  # (N, D)
    q = torch.distributions.Normal(mean, var.sqrt())
    mu, sd = decoder.mu[y], decoder.var[y].sqrt()  # (N, D)
    prior = torch.distributions.MixtureSameFamily(  # of (z - mu) / sd
        torch.distributions.Categorical(decoder.shape_weight[y]),
        torch.distributions.Independent(
            torch.distributions.Normal(decoder.shape_mean[y], decoder.shape_sd[y]), 1
        ),
    )
    theta, total = decoder.type_theta()[y], 0.0
    torch.manual_seed(0)
    for _ in range(n):
        z = q.sample()
        expected, _ = decoder(z, x.sum(dim=1), decoder.type_log_factor[y])  # (N, G)
        ln_p_z = prior.log_prob((z - mu) / sd) - sd.log().sum(dim=1)  # (N)
        total += nb_log_prob(x, expected, theta).sum(dim=1) + ln_p_z - q.log_prob(z).sum(dim=1)
    return float((total / n + torch.from_numpy(np.log(share))[y]).mean())


def scvi_training(data, labels, every=20):
    """scVI's defaults, 10 latent dimensions, 400 epochs.

    Returns seconds, without those of the readings; the mean held-out bound on ln p(x | l); and
    that bound every so many epochs, with the seconds until then.
    """
    import lightning
    import scvi

    scvi.settings.seed = 0
    training, held_out = reference(data, labels)
    for cells in (training, held_out):
        cells.X = cells.X.astype(np.float32)
    start = time.perf_counter()
    scvi.model.SCVI.setup_anndata(training)
    model = scvi.model.SCVI(training, n_latent=10)
    curve, read = [], 0.0  # read: seconds that readings took

    class Reading(lightning.pytorch.Callback):
        def on_train_epoch_end(self, trainer, module):
            nonlocal read
            if (trainer.current_epoch + 1) % every == 0:
                at = time.perf_counter()
                model.is_trained_ = True
                bound = np.mean([scvi_elbo(model, held_out) for _ in range(10)])
                model.module.train()
                curve.append((at - start - read, float(bound)))
                read += time.perf_counter() - at

    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    model.train(max_epochs=400, accelerator="cpu", train_size=1.0, callbacks=[Reading()], **quiet)
    return time.perf_counter() - start - read, curve[-1][1], curve


def scvi_elbo(model, cells):
    """Mean over cells of scVI's bound on ln p(x | l), at full weight of the KL, one draw of z."""
    own = model.get_elbo(cells, return_mean=True)
    return -abs(float(own))  # its sign is not the same in all versions


def scvi_generation(n_genes, n_cells):
    """scVI's decoder, untrained, and the draw of its counts, 128 cells at a time. Seconds."""
    import anndata
    import scvi

    rng = np.random.default_rng(0)
    cells = anndata.AnnData(rng.poisson(0.4, (200, n_genes)).astype(np.float32))
    scvi.model.SCVI.setup_anndata(cells)
    module = scvi.model.SCVI(cells, n_latent=D).module.eval()
    n = min(n_cells, 2048)
    start = time.perf_counter()
    with torch.inference_mode():
        for _ in range(0, n, 128):
            library = torch.full((128, 1), float(np.log(6000)))
            batch = torch.zeros(128, 1, dtype=torch.long)
            module.generative(torch.randn(128, D), library, batch)["px"].sample()
    return (time.perf_counter() - start) * n_cells / n


# -------------------------------------------------------------------------------------- table

GENERATION = {
    "bulk2sc, in memory": generate,
    "bulk2sc, into .h5ad": generate_file,
    "limit: matrix product and sampler": limit,
    "published loop": published_generation,
    "scVI decoder": scvi_generation,
}
TRAINING = {
    "bulk2sc, three stages": our_training,
    "published, 5,000 and 3,000 full-batch epochs": published_training,
    "scVI, 400 epochs": scvi_training,
}


def measure(cfg, kind, *where):
    """One reading in a process of its own: what it returned, and its peak memory in GB.

    None if it fails.
    """
    only = json.dumps([kind, *where])
    command = [sys.executable, __file__, "--only", only]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"{kind}: {done.stderr.strip().splitlines()[-1]}")
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure_here(only):
    """The reading that :func:`measure` asked for."""
    kind, *where = json.loads(only)
    found = (GENERATION | TRAINING)[kind](*where)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = max(peak, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    print(json.dumps([found, peak / 1e6]))


def main(cfg):
    import importlib.util

    missing = {} if importlib.util.find_spec("scvi") else {"scVI decoder", "scVI, 400 epochs"}
    if missing:
        print("scvi-tools is not installed: its rows are left out")
    rows = []
    for _ in range(cfg.rounds):  # all kinds in turn, so that a slow minute meets each of them
        for n_genes in cfg.n_genes:
            for n_cells in cfg.n_cells:
                for kind in (kind for kind in GENERATION if kind not in missing):
                    if found := measure(cfg, kind, n_genes, n_cells):
                        rows.append((kind, n_genes, n_cells, *found))
    trained = measure_training(cfg, missing) if cfg.training else None
    columns = ["what", "genes", "cells", "seconds", "peak GB"]
    table = pd.DataFrame(rows, columns=columns)
    table = table.groupby(columns[:3], sort=False).median().reset_index()
    table["cells/s"] = table["cells"] / table["seconds"]
    cfg.out.mkdir(parents=True, exist_ok=True)
    write_whole(cfg.out / "benchmark.csv", lambda path: table.to_csv(path, index=False))
    print(table.to_string(index=False, float_format="{:.4g}".format))
    draw(cfg.out / "benchmark.png", table)
    for n_genes, own in table.groupby("genes"):
        rate = own.set_index(["what", "cells"])["cells/s"]
        at = max(cfg.n_cells)
        mine = rate["bulk2sc, in memory", at]
        print(
            f"{n_genes:,.0f} genes: {mine / rate['published loop', at]:,.0f} times the published "
            f"loop, {mine / rate['limit: matrix product and sampler', at]:.0%} of the limit, slope "
            f"of log time against log cells {slope(own):.3f}"
        )
    if trained is not None:
        write_whole(cfg.out / "training.csv", lambda path: trained.to_csv(path, index=False))
        print(trained.to_string(index=False, float_format="{:.5g}".format))
    print(f"wrote what was measured to {cfg.out}")


def measure_training(cfg, missing):
    """A table of seconds and held-out log-likelihood of ours, the published loops and scVI."""
    rows, ours = [], None
    for kind in TRAINING:
        if kind in missing or not (reading := measure(cfg, kind, cfg.data, cfg.labels)):
            continue
        (seconds, bound, *curve), peak = reading
        ours = ours or bound
        rows.append((kind, seconds, bound, peak))
        if curve and ours:
            best = max(curve[0], key=lambda point: point[1])
            rows.append((f"{kind}: at its best", *best, peak))
            above = [point for point in curve[0] if point[1] >= ours]
            if above:
                rows.append((f"{kind}: where it is at ours", *above[0], peak))
    return pd.DataFrame(rows, columns=["what", "seconds", "held-out log-likelihood", "peak GB"])


def slope(own):
    """Of log seconds against log cells, of cells in memory; 1 where cost is linear."""
    own = own[own["what"] == "bulk2sc, in memory"].sort_values("cells")
    return np.polyfit(np.log(own["cells"].astype(float)), np.log(own["seconds"]), 1)[0]


def draw(path, table):
    """Seconds against cells, log-log, a panel for each number of genes; the limit is dashed."""
    from plotting import pyplot, write_whole_figure

    colors = ["#D55E00", "#E69F00", "#000000", "#0072B2", "#CC79A7"]
    colors = dict(zip(GENERATION, colors, strict=True))
    panels = table.groupby("genes")
    figure, axes = pyplot().subplots(
        1,
        len(panels),
        figsize=(4.4 * len(panels) + 2.8, 4),
        squeeze=False,
        sharey=True,  # cells of more genes take longer
        layout="constrained",
    )
    for axis, (n_genes, own) in zip(axes[0], panels, strict=True):
        for kind, points in own.groupby("what"):
            style = "--" if kind.startswith("limit") else "o-"
            points = points.sort_values("cells")
            axis.loglog(points["cells"], points["seconds"], style, color=colors[kind], label=kind)
        axis.set_title(f"{n_genes:,.0f} genes", fontsize=11)
        axis.set_xlabel("cells")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("seconds")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside right center")
    write_whole_figure(path, figure)


if __name__ == "__main__":
    settings = tyro.cli(Settings)
    if settings.only:
        measure_here(settings.only)
    else:
        main(settings)
