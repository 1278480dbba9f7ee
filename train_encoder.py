"""Stage 3: the Bulk Encoder, from a bulk profile to the mixture and the cell-type proportions.

    python train_encoder.py

Reads gmm_mu_c.pt, gmm_var_c.pt and scDecoder_model.pt from --weights, and draws pseudobulks with
Dirichlet proportions from training cells. Those of a quarter of the cells are deconvolved with the
mean profiles of the other three, as a bulk of other cells will be. Writes bulkEncoder_model.pt and
the loss curves there.
"""

from dataclasses import dataclass

import numpy as np
import torch

from data import (
    TrainingSettings,
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
from plotting import write_losses
from readers.backed import sample_in_memory
from readers.fingerprint import digest
from runtime.checkpoint import already_finished
from runtime.device import pick_device, seed_everything
from runtime.errors import InputError
from runtime.processes import several
from runtime.script import flag, run_script
from runtime.weights import check_cell_types, check_mixture, load_mixture, load_model, save_model
from training import Run, two_rate_optimizer

# Full-length RNA-seq differs from 3' counts of the same tissue by about this much, gene by gene
# (standard deviation of the log-ratio). Bulks that differ no more are as usual, though training at
# this noise would only draw every answer to the middle.
PLATFORM_SD = 1.5


@dataclass
class Settings(TrainingSettings):
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
    """In the hidden layer; high, because the network is to correct the deconvolution, not to learn
    the training cells by heart."""
    weight_decay: float = 1e-2
    """AdamW's."""
    min_cells: int = 50
    """Fewest cells in a training pseudobulk."""
    max_cells: int = 1000
    """Most cells in a training pseudobulk; numbers are drawn evenly on a log scale."""
    min_pool: int = 3
    """Fewest cells of each type that a training pseudobulk draws its cells from."""
    max_pool: int = 20
    """Most such cells. Small pools make a type look different from bulk to bulk, as it will look
    in cells that training never saw; numbers are drawn evenly on a log scale."""
    noise: float = 0.6
    """Largest sd of the gene-wise log-normal factor that stands for another platform; each bulk
    draws its own sd between 0 and this."""
    lost: float = 0.1
    """Largest share of genes that another platform does not see at all; each bulk draws its own."""
    folds: int = 4
    """Parts of the training cells; bulks of one part are deconvolved with the means of the others,
    so that the weights of genes allow for how well few cells tell a mean. 1 turns it off."""

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


def draw_proportions(n, present, reference, rng):
    """Expected cell-type proportions (n x K) of training bulks, from sparse to even.

    A third each: Dirichlet(1), which covers the simplex evenly; Dirichlet(0.3), a few types
    dominate; and Dirichlet around the reference's own composition.

    Args:
        n: bulks. present: types that have cells (K, bool). reference: their proportions (K).
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
        clean: neither small pools of cells nor platform factors; how held-out bulks are drawn.

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
    bulk += 1e-9  # a bulk in which no gene of the model is expressed reads as an even one
    depth = log_uniform(3e4, 3e6, (cfg.batch_size, 1), rng)
    counts = rng.poisson(bulk / bulk.sum(axis=1, keepdims=True, dtype=np.float64) * depth)
    return counts.astype(np.float32), pi


def split_folds(codes, n_folds, rng):
    """Fold of each cell (N): every type is spread evenly over the folds."""
    fold = np.zeros(len(codes), int)
    for k in np.unique(codes):
        own = rng.permutation(np.flatnonzero(codes == k))
        fold[own] = (np.arange(len(own)) + rng.integers(n_folds)) % n_folds
    return fold


def encoder_losses(predicted, target, n=None):
    """The three losses, each a mean over all entries.

        L_mu = MSE + L1 (μ̂_k, μ_k),   L_var = MSE + L1 (σ̂_k², σ_k²),   L_pi = MSE (π̂, π)

    Regression: the published variance loss added the L1 of mu.

    Args:
        predicted: mu, var (B, K, D) and pi (B, K). target: mu, var (K, D) and pi (B, K).
        n: bulks in the batch of which these are a part, whose share of the mean is returned;
            default: B, they are the whole batch.
    """
    mu, var, pi = (p - t for p, t in zip(predicted, target, strict=True))

    def mean(error):
        return error.sum() / ((len(error) if n is None else n) * error.shape[1:].numel())

    return {
        "mu": mean(mu**2 + mu.abs()),
        "var": mean(var**2 + var.abs()),
        "pi": mean(pi**2),
    }


def usual_fit(model, decoder, cells, genes, rng, n=200):
    """Mean and standard deviation of both readings of ``bulk2sc.bulk_fit`` on pseudobulks.

    Half of them are as the reference's platform measures them, half as others: gene-wise log-normal
    factors of a sd up to PLATFORM_SD.

    Args:
        cells: AnnData with all genes of the decoder, best held out. genes: the encoder's (G).

    Returns:
        dict: name of the reading -> [mean, standard deviation]; empty when there are too few
        genes to tell.
    """
    codes, cell_types = codes_of(cells)
    share = np.bincount(codes, minlength=len(cell_types)) / len(codes)
    expected = np.zeros((n, len(share)))
    expected[:, share > 0] = rng.dirichlet(20 * share[share > 0] + 0.1, n)
    bulk, _ = draw_pseudobulks(cells.X, codes, expected, np.full(n, 500), rng)
    sd = np.where(np.arange(n) % 2, 0, rng.uniform(0, PLATFORM_SD, n))[:, None]
    bulk = bulk * np.exp(sd * rng.standard_normal(bulk.shape))
    bulk = rng.poisson(bulk / bulk.sum(axis=1, keepdims=True) * 1e6)
    X, present = align_genes(bulk, cells.var_names, genes, "the encoder", report=False)
    device = model.mu.device
    _, _, pi, _ = encode_bulks(model.eval(), X, present, device)
    readings = bulk_fit(bulk, expected_bulk(decoder.to(device), pi), np.ones(bulk.shape[1], bool))
    if np.isnan(readings).all(axis=1).any():
        return {}
    return {
        # Never finer than one gene more or less.
        name: [float(np.nanmean(values)), max(float(np.nanstd(values)), 1 / bulk.shape[1])]
        for name, values in zip(("correlation", "unexplained"), readings, strict=True)
    }


@several
def main(cfg):
    rng = seed_everything(cfg.seed)
    device = pick_device(cfg.device)
    cells = load_cells(cfg)
    codes, cell_types = codes_of(cells)
    mu, var = load_mixture(cfg.weights, len(cell_types))  # (K, D) each
    decoder_file = cfg.weights / "scDecoder_model.pt"
    decoder, card = load_model(decoder_file, scDecoder)
    check_cell_types(decoder_file, card, cell_types)
    order = card.get("components", range(len(cell_types)))  # of foreign files: as stage 2 took them
    mu, var = mu[list(order)], var[list(order)]
    check_mixture(decoder_file, decoder, mu, var, "gmm_mu_c.pt and gmm_var_c.pt")
    held_out, fraction = choose_held_out(cells, codes, cfg, card, decoder_file)
    made_from = digest(
        *(cells.X, list(cells.obs_names), list(cells.var_names), codes, cell_types, held_out),
        *(mu, var, decoder.state_dict()),
    )
    all_held_out = list(cells.obs_names[held_out])
    cells, at = sample_in_memory(cells, codes, rng, "pseudobulks")
    codes, held_out = codes[at], held_out[at]
    genes = choose_marker_genes(cells[~held_out], codes[~held_out], cfg.n_genes)
    X, _ = align_genes(cells.X, cells.var_names, genes, cfg.data)
    X_train, codes_train = X[np.flatnonzero(~held_out)], codes[~held_out]
    X_test, codes_test = X[np.flatnonzero(held_out)], codes[held_out]
    print(
        f"pseudobulks of {len(codes_train):,} training cells, {len(genes):,} genes; "
        f"{len(codes_test):,} cells held out"
    )

    model_file = cfg.weights / "bulkEncoder_model.pt"
    if already_finished(cfg, model_file, BulkEncoder, made_from):
        return

    signature = mean_counts(X_train, codes_train, len(cell_types))
    X_train, X_test = X_train.astype(np.float32), X_test.astype(np.float32)  # once, not every step

    model = BulkEncoder(len(genes), len(cell_types), mu.shape[1], cfg.n_hidden, cfg.dropout)
    model.mu.copy_(mu)
    model.var.copy_(var)
    first = [simulate_bulks(X_train, codes_train, len(cell_types), cfg, rng)[0] for _ in range(20)]
    model.fit_input(torch.from_numpy(np.concatenate(first)), torch.from_numpy(signature).float())
    model = model.to(device)
    optimizer, schedule = two_rate_optimizer(model, [], cfg, cfg.epochs)

    # Of each fold: its cells, their types, and the mean counts of all other cells (K, G).
    fold = split_folds(codes_train, cfg.folds, rng)
    parts = []
    for i in range(cfg.folds):
        own, other = np.flatnonzero(fold == i), np.flatnonzero((fold != i) | (cfg.folds == 1))
        means = mean_counts(X_train[other], codes_train[other], len(cell_types))
        only = np.bincount(codes_train[other], minlength=len(cell_types)) == 0
        means[only] = signature[only]  # a type whose one cell is in this fold
        means = model.scale_signature(torch.from_numpy(means).float()).to(device)
        if len(own):
            parts.append((X_train[own], codes_train[own], means))

    def losses(bulk, true, signature=None, part=slice(None)):
        """The losses of a part of a batch of bulks, as its share of the mean over all."""
        predicted = model(torch.from_numpy(bulk[part]).to(device), signature=signature)
        target = (model.mu, model.var, torch.from_numpy(true[part]).to(device))
        return encoder_losses(predicted, target, len(bulk))

    if len(codes_test):  # the same ones at every reading
        batches = [
            simulate_bulks(X_test, codes_test, len(cell_types), cfg, rng, clean=True)
            for _ in range(4)
        ]
        test_bulks = [np.concatenate(b) for b in zip(*batches, strict=True)]

    run = Run("bulkEncoder", cfg, model, optimizer, schedule, rng, made_from)
    for epoch in run.epochs():
        model.train()
        X_own, codes_own, means = parts[epoch % len(parts)]
        # Every process draws all bulks: a bulk's numbers depend on how many the last one took.
        batch = simulate_bulks(X_own, codes_own, len(cell_types), cfg, rng)
        loss = losses(*batch, means, run.part(cfg.batch_size))
        # The squared error of proportions is a hundred times smaller by its very scale.
        run.descend(loss["mu"] + loss["var"] + 100 * loss["pi"], *loss.values())
        run.look()
        loss = dict(zip(loss, run.total.tolist(), strict=True))  # of the whole batch
        row = None
        if epoch % 25 == 0 or epoch == cfg.epochs:
            row = {"epoch": epoch} | loss
            row |= {f"held_out_{name}": None for name in loss}
            if len(codes_test):
                model.eval()
                with torch.no_grad():
                    test = losses(*test_bulks)
                row |= {f"held_out_{name}": value.item() for name, value in test.items()}
        run.after_epoch(row, **{name: f"{value:.4f}" for name, value in loss.items()})

    if run.rank:  # the first process writes what all have found
        return
    judged = cells[held_out if held_out.any() else ~held_out]
    usual = usual_fit(model, decoder, judged, genes, rng)
    save_model(
        model_file,
        model,
        cfg,
        genes=genes,
        gene_ids=list(cells.var.loc[genes, "gene_ids"]),  # by which bulks may name them
        cell_types=cell_types,
        held_out=all_held_out,
        held_out_fraction=fraction,
        fit=usual,  # what bulks of this reference's types look like, to tell others by
        epoch=cfg.epochs,
        made_from=made_from,
    )
    write_losses(cfg.weights / "bulkEncoder", run.curve)
    run.finished()
    row = run.curve[-1]
    names = [n for n in row if n != "epoch" and row[n] is not None]
    print(
        f"wrote bulkEncoder_model.pt and bulkEncoder_loss.csv/.png to {cfg.weights}: "
        + ", ".join(f"{n.replace('_', ' ')} {row[n]:.5f}" for n in names)
    )


if __name__ == "__main__":
    run_script(main, Settings)
