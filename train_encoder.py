"""Stage 3: the Bulk Encoder, from a bulk profile to the mixture and the cell-type proportions.

    python train_encoder.py

Reads gmm_mu_c.pt, gmm_var_c.pt and scDecoder_model.pt from --weights, and draws pseudobulks with
Dirichlet proportions from training cells. Bulks of a quarter of the cells are deconvolved with the
mean profiles of the other three, as a bulk of other cells will be. Writes bulkEncoder_model.pt and
the loss curves there.
"""

from dataclasses import dataclass

from data import TrainingSettings
from runtime.errors import InputError
from runtime.script import flag, lead_with, parse_args, run_script


@lead_with("data", "labels", "weights", "epochs", "batch_size", "lr")
@dataclass
class Settings(TrainingSettings):
    """Stage 3: train the Bulk Encoder, from a bulk profile to proportions and mixture.

    Example: python train_encoder.py --data filtered_feature_bc_matrix --labels celltypes.csv
    """

    n_genes: int = 1000
    """Genes that the Bulk Encoder reads: those that tell the cell types apart best."""
    epochs: int = 600
    """Steps, each on a fresh batch of pseudobulks (published: 3,000 on the same one)."""
    batch_size: int = 64
    """Pseudobulks per step."""
    lr: float = 5e-4
    """Peak learning rate of a one-cycle schedule."""
    n_hidden: int = 700
    """Width of the hidden layer; published shape G -> 700 -> three heads."""
    dropout: float = 0.5
    """In the hidden layer; high, because the network is to correct the deconvolution, not to
    memorise the training cells."""
    weight_decay: float = 1e-2
    """AdamW's."""
    min_cells: int = 50
    """Fewest cells in a training pseudobulk."""
    max_cells: int = 1000
    """Most cells in a training pseudobulk; numbers are drawn evenly on a log scale."""
    min_pool: int = 3
    """Fewest cells of each type that a training pseudobulk draws its cells from."""
    max_pool: int = 20
    """Most such cells. Small pools make a type differ from bulk to bulk, as it will in cells that
    training never saw; numbers are drawn evenly on a log scale."""
    noise: float = 0.6
    """Largest sd of the gene-wise log-normal factor that simulates another platform; the sd of each
    bulk is drawn between 0 and this."""
    lost: float = 0.1
    """Largest share of genes that another platform misses altogether, drawn for each bulk."""
    folds: int = 4
    """Folds of the training cells; bulks of one fold are deconvolved with the means of the others,
    so that gene weights allow for the error of means from few cells. 1 turns it off."""

    def __post_init__(self):
        super().__post_init__()
        for low, high in (("min_cells", "max_cells"), ("min_pool", "max_pool")):
            a, b = getattr(self, low), getattr(self, high)
            if not 1 <= a <= b:
                names = f"{flag(low)}, {flag(high)}"
                raise InputError(f"{names}: found {a} to {b}, expected 1 or more, in order")
        if self.noise < 0:
            raise InputError(f"--noise: found {self.noise}, expected 0 or more")
        if not 0 <= self.lost < 1:
            raise InputError(f"--lost: found {self.lost}, expected 0 or more, below 1")
        if self.folds < 1:
            raise InputError(f"--folds: found {self.folds}, expected 1 or more")
        if self.n_hidden < 1:
            raise InputError(f"--n-hidden: found {self.n_hidden}, expected 1 or more")


if __name__ == "__main__":
    settings = parse_args(Settings)  # before the slow imports, so that --help answers at once

import numpy as np
import torch

from data import (
    align_genes,
    choose_held_out,
    choose_marker_genes,
    codes_of,
    draw_pseudobulks,
    load_cells,
    mean_counts,
)
from generation import bulk_fit, encode_bulks, expected_bulk
from models import BulkEncoder, scDecoder
from readers.backed import sample_in_memory
from readers.fingerprint import digest
from runtime.checkpoint import already_finished
from runtime.device import pick_device, seed_everything
from runtime.processes import distributed
from runtime.weights import check_cell_types, check_mixture, load_mixture, load_model
from training import TrainingRun, two_rate_optimizer

# Full-length RNA-seq differs from 3' counts of the same tissue by about this much: standard
# deviation of the log-ratio of a gene. Training at this noise would only shrink every answer to the
# mean, but a bulk that differs no more than this counts as one of this tissue.
PLATFORM_SD = 1.5

# ------------------------------------------------------------------------------- pseudobulks


def draw_proportions(n, present, reference, rng):
    """Expected cell-type proportions (n x K) of training bulks, from sparse to even.

    A third each: Dirichlet(1), which covers the simplex evenly; Dirichlet(0.3), a few types
    dominate; and Dirichlet around the reference's own composition.

    Args:
        n: number of bulks. present: mask of the types that have cells (K). reference: their
            proportions in the reference (K).
    """
    K = len(present)
    alphas = np.stack([np.ones(K), np.full(K, 0.3), 10 * reference + 0.1])[:, present]
    proportions = np.zeros((n, K))
    for i, kind in enumerate(rng.integers(3, size=n)):
        proportions[i, present] = rng.dirichlet(alphas[kind])
    return proportions


def log_uniform(low, high, size, rng):
    """Numbers drawn evenly on a log scale."""
    return np.exp(rng.uniform(np.log(low), np.log(high), size))


def simulate_bulks(X, codes, n_types, cfg, rng, clean=False):
    """Draw a batch of bulks: composition, cells, platform factor and sequencing depth all vary.

    Args:
        X: counts (N x G), CSR. codes: cell types (N).
        clean: no small pools of cells and no platform factors, as held-out bulks are drawn.

    Returns:
        bulk (B, G) float32 counts and the proportions of the cells in it (B, K) float32.
    """
    reference = np.bincount(codes, minlength=n_types) / len(codes)
    proportions = draw_proportions(cfg.batch_size, reference > 0, reference, rng)
    n_cells = log_uniform(cfg.min_cells, cfg.max_cells, cfg.batch_size, rng).astype(int)
    pool = log_uniform(cfg.min_pool, cfg.max_pool, cfg.batch_size, rng).astype(int)
    bulk, pi = draw_pseudobulks(X, codes, proportions, n_cells, rng, None if clean else pool)
    if not clean:
        sd = rng.uniform(0, cfg.noise, (cfg.batch_size, 1))
        bulk = bulk * np.exp(sd * rng.standard_normal(bulk.shape))
        bulk *= rng.random(bulk.shape) >= rng.uniform(0, cfg.lost, (cfg.batch_size, 1))
    bulk += 1e-9  # so that a bulk without any expressed gene of the model becomes a flat one
    depth = log_uniform(3e4, 3e6, (cfg.batch_size, 1), rng)
    counts = rng.poisson(bulk / bulk.sum(axis=1, keepdims=True, dtype=np.float64) * depth)
    return counts.astype(np.float32), pi


def split_folds(codes, n_folds, rng):
    """Fold of each cell (N): every type is spread evenly over the folds."""
    fold = np.zeros(len(codes), int)
    for k in np.unique(codes):
        in_type = rng.permutation(np.flatnonzero(codes == k))
        fold[in_type] = (np.arange(len(in_type)) + rng.integers(n_folds)) % n_folds
    return fold


def reference_fit(model, decoder, cells, genes, rng, n=200):
    """Mean and sd of both measures of :func:`generation.bulk_fit` on pseudobulks of the reference.

    Against these the misfit of a new bulk is measured. Half of the pseudobulks are as the
    reference's platform measures them, half as others: gene-wise log-normal factors of a sd up to
    PLATFORM_SD.

    Args:
        cells: AnnData with all genes of the decoder, held out if there are such. genes: the
            encoder's (G).

    Returns:
        dict: measure -> [mean, sd]; empty when there are too few genes to tell.
    """
    codes, cell_types = codes_of(cells)
    share = np.bincount(codes, minlength=len(cell_types)) / len(codes)
    proportions = np.zeros((n, len(share)))
    proportions[:, share > 0] = rng.dirichlet(20 * share[share > 0] + 0.1, n)
    bulk, _ = draw_pseudobulks(cells.X, codes, proportions, np.full(n, 500), rng)
    sd = np.where(np.arange(n) % 2, 0, rng.uniform(0, PLATFORM_SD, n))[:, None]
    bulk = bulk * np.exp(sd * rng.standard_normal(bulk.shape))
    bulk = rng.poisson(bulk / bulk.sum(axis=1, keepdims=True) * 1e6)
    X, present = align_genes(bulk, cells.var_names, genes, "the encoder", report=False)
    device = model.mu.device
    _, _, pi, _ = encode_bulks(model.eval(), X, present, device)
    measures = bulk_fit(bulk, expected_bulk(decoder.to(device), pi), np.ones(bulk.shape[1], bool))
    if np.isnan(measures).all(axis=1).any():
        return {}
    return {
        # One gene more or less is the finest difference that counts.
        name: [float(np.nanmean(values)), max(float(np.nanstd(values)), 1 / bulk.shape[1])]
        for name, values in zip(("correlation", "unexplained"), measures, strict=True)
    }


# ---------------------------------------------------------------------------------- training


def encoder_losses(predicted, target, n=None):
    """The three losses, each a mean over all entries.

        L_mu = MSE + L1 (μ̂_k, μ_k),   L_var = MSE + L1 (σ̂_k², σ_k²),   L_pi = MSE (π̂, π)

    Regression: the published variance loss added the L1 of mu.

    Args:
        predicted: mu, var (B, K, D) and pi (B, K). target: mu, var (K, D) and pi (B, K).
        n: bulks of the whole batch, if these are a part of it; their share of its mean is returned.
    """
    mu, var, pi = (p - t for p, t in zip(predicted, target, strict=True))

    def mean(error):
        return error.sum() / ((len(error) if n is None else n) * error.shape[1:].numel())

    return {
        "mu": mean(mu**2 + mu.abs()),
        "var": mean(var**2 + var.abs()),
        "pi": mean(pi**2),
    }


def read_mixture(cfg, cell_types):
    """The mixture in the order of the cell types, and scDecoder, which was trained on it.

    Returns:
        mu, var: (K, D) each. decoder, card: scDecoder on the CPU, and the rest of its file.
    """
    mu, var = load_mixture(cfg.weights, len(cell_types))  # (K, D) each
    path = cfg.weights / "scDecoder_model.pt"
    decoder, card = load_model(path, scDecoder)
    check_cell_types(path, card, cell_types)
    # Which component each type is in mixture files from elsewhere, as stage 2 took them.
    order = list(card.get("components", range(len(cell_types))))
    mu, var = mu[order], var[order]
    check_mixture(path, decoder, mu, var, "gmm_mu_c.pt and gmm_var_c.pt")
    return mu, var, decoder, card


def start_model(X, codes, mu, var, cfg, rng):
    """A Bulk Encoder that answers with the mixture and the deconvolution, not trained yet.

    Args:
        X: counts of the training cells (N x G), float32. codes: types (N). mu, var: (K, D).
    """
    n_types = len(mu)
    signature = mean_counts(X, codes, n_types)  # (K, G)
    model = BulkEncoder(X.shape[1], n_types, mu.shape[1], cfg.n_hidden, cfg.dropout)
    model.mu.copy_(mu)
    model.var.copy_(var)
    bulks = [simulate_bulks(X, codes, n_types, cfg, rng)[0] for _ in range(20)]
    bulks = torch.from_numpy(np.concatenate(bulks))
    model.fit_input(bulks, torch.from_numpy(signature).float())
    return model, signature


def make_folds(X, codes, model, signature, cfg, rng):
    """Folds of the training cells: counts, types, and the mean counts of all other cells.

    Args:
        X: counts (N x G). codes: types (N). signature: mean counts of all cells (K x G).

    Returns:
        list of ``(X, codes, means)``: (n x G), (n), (K, G) on the model's device.
    """
    fold = split_folds(codes, cfg.folds, rng)
    folds = []
    for i in range(cfg.folds):
        inside, outside = fold == i, (fold != i) | (cfg.folds == 1)
        means = mean_counts(X[np.flatnonzero(outside)], codes[outside], len(signature))
        lost = np.bincount(codes[outside], minlength=len(signature)) == 0
        means[lost] = signature[lost]  # a type whose only cell is in this fold
        means = model.scale_signature(torch.from_numpy(means).float()).to(model.mu.device)
        if inside.any():
            folds.append((X[np.flatnonzero(inside)], codes[inside], means))
    return folds


def batch_losses(model, bulk, proportions, signature=None, part=slice(None)):
    """The three losses of a part of a batch of bulks, as its share of the mean over the batch.

    Args:
        bulk: (B, G). proportions: true ones (B, K). signature: mean counts to deconvolve with
            (K, G), by default the model's.
    """
    device = model.mu.device
    predicted = model(torch.from_numpy(bulk[part]).to(device), signature=signature)
    target = (model.mu, model.var, torch.from_numpy(proportions[part]).to(device))
    return encoder_losses(predicted, target, len(bulk))


@torch.no_grad()
def held_out_losses(model, bulks):
    """The three losses on held-out bulks and their proportions, in eval mode; None without any."""
    names = ("mu", "var", "pi")
    if bulks is None:
        return {f"held_out_{name}": None for name in names}
    model.eval()
    losses = batch_losses(model, *bulks)
    return {f"held_out_{name}": losses[name].item() for name in names}


def simulate_test_bulks(X, codes, held_out, cfg, rng):
    """Four batches of bulks of held-out cells and their proportions, the same at every epoch."""
    cells, n_types = np.flatnonzero(held_out), codes.max() + 1
    batches = [
        simulate_bulks(X[cells], codes[cells], n_types, cfg, rng, clean=True) for _ in range(4)
    ]
    return [np.concatenate(parts) for parts in zip(*batches, strict=True)]


def train_model(run, optimizer, schedule, folds, test_bulks, rng):
    """The training loop: a fresh batch of pseudobulks at every epoch, of each fold in turn.

    Args:
        folds: as :func:`make_folds` gives them. test_bulks: held-out bulks and their proportions,
            or None. rng: NumPy generator.
    """
    cfg, model = run.cfg, run.model
    for epoch in run.epochs():
        model.train()
        X, codes, means = folds[epoch % len(folds)]
        # Every process draws all bulks, because each draw depends on the ones before it.
        bulk, proportions = simulate_bulks(X, codes, len(means), cfg, rng)  # (B, G), (B, K)
        losses = batch_losses(model, bulk, proportions, means, run.part(cfg.batch_size))
        # Squared errors of proportions are a hundred times smaller by their very scale.
        loss = losses["mu"] + losses["var"] + 100 * losses["pi"]
        optimizer.zero_grad()
        loss.backward()
        run.all_reduce(loss, *losses.values())
        optimizer.step()
        schedule.step()
        run.read_losses()
        totals = dict(zip(losses, run.progress.total.tolist(), strict=True))  # of the whole batch
        row = None
        if epoch % 25 == 0 or epoch == cfg.epochs:
            row = {"epoch": epoch} | totals | held_out_losses(model, test_bulks)
        run.end_epoch(row, **{name: f"{value:.4f}" for name, value in totals.items()})


@distributed
def main(cfg):
    rng = seed_everything(cfg.seed)
    device = pick_device(cfg.device)
    cells = load_cells(cfg)
    codes, cell_types = codes_of(cells)
    mu, var, decoder, card = read_mixture(cfg, cell_types)
    held_out, fraction = choose_held_out(
        cells, codes, cfg, card, cfg.weights / "scDecoder_model.pt"
    )
    made_from = digest(
        *(cells.X, list(cells.obs_names), list(cells.var_names), codes, cell_types, held_out),
        *(mu, var, decoder.state_dict()),
    )
    held_out_names = list(cells.obs_names[held_out])
    cells, rows = sample_in_memory(cells, codes, rng, "pseudobulks")
    codes, held_out = codes[rows], held_out[rows]
    genes = choose_marker_genes(cells[~held_out], codes[~held_out], cfg.n_genes)
    X, _ = align_genes(cells.X, cells.var_names, genes, cfg.data)
    X = X.astype(np.float32)  # once, rather than at every step
    X_train, codes_train = X[np.flatnonzero(~held_out)], codes[~held_out]
    print(
        f"pseudobulks of {len(codes_train):,} training cells, {len(genes):,} genes; "
        f"{held_out.sum():,} cells held out"
    )
    if already_finished(cfg, cfg.weights / "bulkEncoder_model.pt", BulkEncoder, made_from):
        return

    model, signature = start_model(X_train, codes_train, mu, var, cfg, rng)
    model = model.to(device)
    optimizer, schedule = two_rate_optimizer(model, [], cfg, cfg.epochs)
    folds = make_folds(X_train, codes_train, model, signature, cfg, rng)
    test_bulks = None if not held_out.any() else simulate_test_bulks(X, codes, held_out, cfg, rng)
    run = TrainingRun("bulkEncoder", cfg, model, optimizer, schedule, rng, made_from)
    train_model(run, optimizer, schedule, folds, test_bulks, rng)
    if run.group.rank:  # the first process writes what all have trained
        return
    measured_on = cells[held_out if held_out.any() else ~held_out]
    run.save_results(
        genes=genes,
        gene_ids=list(cells.var.loc[genes, "gene_ids"]),  # by which bulks may name them
        cell_types=cell_types,
        held_out=held_out_names,
        held_out_fraction=fraction,
        fit=reference_fit(model, decoder, measured_on, genes, rng),
    )
    last = run.progress.curve[-1]
    losses = {n: v for n, v in last.items() if n != "epoch" and v is not None}
    print(
        f"wrote bulkEncoder_model.pt and bulkEncoder_loss.csv/.png to {cfg.weights}: "
        + ", ".join(f"{name.replace('_', ' ')} {value:.5f}" for name, value in losses.items())
    )


if __name__ == "__main__":
    run_script(main, settings)
