"""Stage 3: the Bulk Encoder, from a bulk profile to the mixture and the cell-type proportions.

    python train_encoder.py

Reads gmm_mu_c.pt, gmm_var_c.pt and scDecoder_model.pt from --weights, and draws pseudobulks with
Dirichlet proportions from training cells. Bulks of a quarter of the cells are deconvolved with the
mean profiles of the other three, as a bulk of other cells will be. Writes bulkEncoder_model.pt and
the loss curves there.

    python train_encoder.py --samples sample --donors donor    # a reference of many samples

With samples a pseudobulk comes from one sample or a mixture of two, and the encoder answers with
the moments of that sample's cells (:mod:`states.moments`) instead of the cell type's.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

from data import TrainingSettings
from runtime.errors import InputError
from runtime.flags import in_groups
from runtime.script import parse_args, run_script


@in_groups(
    {
        "input": "data labels samples donors conditions baseline batch_key",
        "output": "weights",
        "training": "steps batch_size lr resume",
        "model": "n_genes n_state_genes n_hidden",
        "training bulks": "min_cells max_cells noise",
    },
    renamed={"epochs": "steps", "batches": "batch_key"},
    gone={"min_pool": 3, "max_pool": 20, "lost": 0.1, "folds": 4},
)
@dataclass
class Settings(TrainingSettings):
    """Stage 3: train the Bulk Encoder, from a bulk profile to proportions and mixture.

    Example: python train_encoder.py --data filtered_feature_bc_matrix --labels celltypes.csv
    """

    n_genes: int = 1000
    """Genes that the Bulk Encoder reads: those that tell the cell types apart best."""
    n_state_genes: int = 500
    """With --samples, further genes: those that differ most between the samples inside a type."""
    steps: int = 300
    """Training steps, each on a fresh batch of pseudobulks (published: 3,000 on the same one)."""
    batch_size: int = 64
    """Pseudobulks per step."""
    lr: float = 5e-4
    """Peak learning rate, between warm-up and decay."""
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
    noise: float = 0.6
    """Largest sd of the gene-wise log-normal factor that simulates another platform; the sd of each
    bulk is drawn between 0 and this."""

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.min_cells <= self.max_cells:
            found = f"{self.min_cells} to {self.max_cells}"
            raise InputError(
                f"--min-cells, --max-cells: found {found}, expected 1 or more, in order"
            )
        if self.n_state_genes < 0:
            raise InputError(f"--n-state-genes: found {self.n_state_genes}, expected 0 or more")
        if self.noise < 0:
            raise InputError(f"--noise: found {self.noise}, expected 0 or more")
        if self.n_hidden < 1:
            raise InputError(f"--n-hidden: found {self.n_hidden}, expected 1 or more")


if __name__ == "__main__":
    settings = parse_args(Settings)  # before the slow imports, so that --help answers at once

from dataclasses import replace

import numpy as np
import scipy.sparse as sp
import torch

from counts.genes import choose_marker_genes, choose_state_genes
from counts.pseudobulks import draw_pseudobulks
from data import (
    Reference,
    align_genes,
)
from deconvolution.dwls import make_signature
from deconvolution.encode import encode_bulks
from deconvolution.expression import expected_bulk
from deconvolution.fit import bulk_fit
from models import BulkEncoder, scDecoder
from readers.backed import sample_in_memory
from readers.fingerprint import digest
from runtime.checkpoint import already_finished
from runtime.device import pick_device, seed_everything
from runtime.processes import distributed
from runtime.weights import check_cell_types, check_mixture, load_mixture, load_model
from states.pseudobulks import (
    BulkCells,
    concatenate,
    make_folds,
    mean_of_types,
    simulate_bulks,
)
from training import Plan, TrainingRun, two_rate_optimizer

# Full-length RNA-seq differs from 3' counts of the same tissue by about this much: standard
# deviation of the log-ratio of a gene. Training at this noise would only shrink every answer to the
# mean, but a bulk that differs no more than this counts as one of this tissue.
PLATFORM_SD = 1.5
UPDATES = {"n_iterations": 34, "momentum": 0.7}  # of the deconvolution; as far as 100 without
STATE_LOG_WEIGHT = -4.0  # of genes of states in the deconvolution, before training
# Of the training cells. Bulks of one are deconvolved with the means of the others, so that the gene
# weights allow for the error of means from few cells.
N_FOLDS = 4


def reference_fit(model, decoder, reference, genes, rng, n=200):
    """Mean and sd of both measures of :func:`bulk_fit` on pseudobulks of the reference.

    Against these the misfit of a new bulk is measured. Half of the pseudobulks are as the
    reference's platform measures them, half as others: gene-wise log-normal factors of a sd up to
    PLATFORM_SD.

    Args:
        reference: whose held-out cells are summed, or all if there are none. genes: the encoder's
            (G).

    Returns:
        dict: measure -> [mean, sd]; empty when there are too few genes to tell.
    """
    rows = reference.test if len(reference.test) else reference.train
    X, codes = reference.X[rows], reference.codes[rows]
    share = np.bincount(codes, minlength=len(reference.cell_types)) / len(codes)
    proportions = np.zeros((n, len(share)))
    proportions[:, share > 0] = rng.dirichlet(20 * share[share > 0] + 0.1, n)
    bulk, _ = draw_pseudobulks(X, codes, proportions, np.full(n, 500), rng)
    sd = np.where(np.arange(n) % 2, 0, rng.uniform(0, PLATFORM_SD, n))[:, None]
    bulk = bulk * np.exp(sd * rng.standard_normal(bulk.shape))
    bulk = rng.poisson(bulk / bulk.sum(axis=1, keepdims=True) * 1e6)
    X, measured = align_genes(bulk, reference.genes, genes, "the encoder", report=False)
    device = model.mu.device
    *encoded, _ = encode_bulks(model.eval(), X, measured, device)
    expected = expected_bulk(decoder.to(device), encoded[2])
    measures = bulk_fit(bulk, expected, np.ones(bulk.shape[1], bool))
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
        predicted: mu, var (B, K, D) and pi (B, K). target: mu, var (K, D) and pi (B, K). n: bulks
            of the whole batch, if these are a part of it; their share of its mean is returned.
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
        mu, var: (K, D) each. decoder, metadata: scDecoder on the CPU, and the rest of its file.
    """
    mu, var = load_mixture(cfg.weights, len(cell_types))  # (K, D) each
    path = cfg.weights / "scDecoder_model.pt"
    decoder, metadata = load_model(path, scDecoder)
    check_cell_types(path, metadata, cell_types)
    # Which component each type is in mixture files from elsewhere, as stage 2 took them.
    order = list(metadata.get("components", range(len(cell_types))))
    mu, var = mu[order], var[order]
    check_mixture(path, decoder, mu, var, "gmm_mu_c.pt and gmm_var_c.pt")
    return mu, var, decoder, metadata


def choose_encoder_genes(reference, cfg):
    """The encoder's genes, in the data's order: of types and, with several samples, of states.

    Returns:
        names (G), and a mask (G) of those of types.
    """
    rows = reference.train
    training = Reference(reference.cells[rows])
    cells, codes, batch = training.cells, reference.codes[rows], training.batch
    of_types = set(choose_marker_genes(cells, codes, cfg.n_genes, batch))
    genes, sample = of_types, reference.sample[rows]
    if len(reference.samples) > 1 and cfg.n_state_genes:
        genes = genes | set(choose_state_genes(cells, codes, sample, cfg.n_state_genes, batch))
    genes = [name for name in cells.var_names if name in genes]
    return genes, np.array([name in of_types for name in genes])


def make_bulk_cells(reference, genes, where):
    """BulkCells of the training cells and of the held-out ones, in the encoder's genes."""
    X, _ = reference.counts(genes, where, report=True)
    X = X.astype(np.float32)  # once, rather than at every step
    sample = reference.sample if len(reference.samples) > 1 else None
    shape = reference.codes, len(reference.cell_types), sample
    every = BulkCells(X, *shape, batch=reference.batch)
    testing = every.take(reference.test)
    testing.mixed = False
    return every.take(reference.train), testing


def describe_types(cells, training, rows):
    """What the encoder's file says of the types in all genes: mRNA content and signature.

    cells: AnnData (N) with all genes. training: BulkCells of its ``rows``.

    Returns:
        dict: ``content``, mean counts of a cell of each type (K), of batches at one depth for all;
        and ``signature``, the fields of :class:`deconvolution.dwls.Signature`.
    """
    X = sp.csr_matrix(cells.X[rows])
    mean = mean_of_types(replace(training, X=X))  # (K, G)
    several = training.batch is not None
    signature = make_signature(mean, X, training.codes, list(cells.var_names), several)
    return {"content": mean.sum(axis=1).tolist(), "signature": vars(signature)}


def start_model(cells, of_types, mu, var, cfg, rng):
    """A Bulk Encoder that answers with the mixture and the deconvolution, not trained yet.

    Args:
        cells: BulkCells, the training cells (N). of_types: mask of the genes that tell types apart
            (G); the others, of states, hardly count in the deconvolution. mu, var: (K, D).

    Returns:
        the model, and the mean counts of the cells of each type (K, G).
    """
    signature = mean_of_types(cells)  # (K, G)
    model = BulkEncoder(cells.X.shape[1], *mu.shape, cfg.n_hidden, cfg.dropout, **UPDATES)
    model.mu.copy_(mu)
    model.var.copy_(var)
    model.log_weight.data[torch.from_numpy(~of_types)] = STATE_LOG_WEIGHT
    bulks = concatenate([simulate_bulks(cells, cfg, rng) for _ in range(20)])
    model.fit_input(torch.from_numpy(bulks.counts), torch.from_numpy(signature).float())
    return model, signature


def batch_losses(model, bulks, signature, part=slice(None)):
    """The losses of a part of a batch of bulks, as its share of the mean over the batch.

    Args:
        bulks: Pseudobulks (B). signature: mean counts to deconvolve with (K, G).

    Returns:
        dict: ``mu``, ``var`` and ``pi`` of :func:`encoder_losses`, and ``deconvolved``, which is pi
        of the deconvolution alone, before the network corrects it.
    """
    counts = torch.from_numpy(bulks.counts[part]).to(model.mu.device)
    measured, n = torch.ones_like(model.profile), len(bulks.counts)
    fractions = model.normalise(counts, measured)  # (B, G)
    first = model.deconvolve(fractions, measured, signature)  # (B, K)
    predicted = model.correct(first, fractions, measured)
    target = bulks.target(model, part)
    error = first - target[2]
    deconvolved = (error**2).sum() / (n * error.shape[1])
    return encoder_losses(predicted, target, n) | {"deconvolved": deconvolved}


@torch.no_grad()
def held_out_losses(model, test):
    """The three losses on Pseudobulks of held-out cells, in eval mode; None without any."""
    names = ("mu", "var", "pi")
    if test is None:
        return {f"held_out_{name}": None for name in names}
    model.eval()
    predicted = model(torch.from_numpy(test.counts).to(model.mu.device))
    losses = encoder_losses(predicted, test.target(model))
    return {f"held_out_{name}": losses[name].item() for name in names}


def train_model(run, optimizer, schedule, folds, test, rng):
    """The training loop: a fresh batch of pseudobulks at every step, of each fold in turn.

    Args:
        folds: as :func:`make_folds` gives them. test: Pseudobulks of held-out cells, the same at
            every step, or None. rng: NumPy generator.
    """
    cfg, model = run.cfg, run.model
    for step in run.epochs():
        model.train()
        fold = folds[step % len(folds)]
        # Every process draws all bulks, because each draw depends on the ones before it.
        bulks = simulate_bulks(fold.cells, cfg, rng)  # (B, G), (B, K)
        losses = batch_losses(model, bulks, fold.means, run.part(cfg.batch_size))
        # Squared errors of proportions are a hundred times smaller by their very scale.
        of_proportions = losses["deconvolved"] + (0 if cfg.batch_key else losses["pi"])
        loss = losses["mu"] + losses["var"] + 100 * of_proportions
        optimizer.zero_grad()
        loss.backward()
        run.all_reduce(loss, *losses.values())
        optimizer.step()
        schedule.step()
        run.read_losses()
        totals = dict(zip(losses, run.progress.total.tolist(), strict=True))  # of the whole batch
        row = None
        if step % 25 == 0 or step == cfg.steps:
            row = {"epoch": step} | totals | held_out_losses(model, test)
        run.end_epoch(row, **{name: f"{value:.4f}" for name, value in totals.items()})


@distributed
def main(cfg):
    rng = seed_everything(cfg.seed)
    device = pick_device(cfg.device)
    reference = Reference.load(cfg)
    mu, var, decoder, metadata = read_mixture(cfg, reference.cell_types)
    reference.split(cfg, metadata, cfg.weights / "scDecoder_model.pt")
    barcodes, described = list(reference.cells.obs_names), reference.metadata
    made_from = digest(
        *(reference.X, barcodes, reference.genes, reference.codes, reference.cell_types),
        *(reference.held_out, mu, var, decoder.state_dict(), *reference.names),
    )
    cells, rows = sample_in_memory(reference.cells, reference.codes, rng, "pseudobulks")
    labels = {"codes": reference.codes[rows], "held_out": reference.held_out[rows]}
    reference = replace(reference, cells=cells, **labels)
    train, test = reference.train, reference.test
    genes, of_types = choose_encoder_genes(reference, cfg)
    training, testing = make_bulk_cells(reference, genes, cfg.data)
    print(
        f"pseudobulks of {len(train):,} training cells, {len(genes):,} genes; "
        f"{len(test):,} cells held out"
    )
    if already_finished(cfg, cfg.weights / "bulkEncoder_model.pt", BulkEncoder, made_from):
        return

    model, signature = start_model(training, of_types, mu, var, cfg, rng)
    folds = make_folds(training, model, signature, N_FOLDS, rng)
    model = model.to(device)
    for fold in folds:
        fold.means = fold.means.to(device)
    plan = Plan(cfg.steps, 1, cfg.batch_size, cfg.lr)
    optimizer, schedule = two_rate_optimizer(model, [model.log_weight], plan, cfg.weight_decay)
    test_bulks = None
    if len(test):
        test_bulks = concatenate([simulate_bulks(testing, cfg, rng, clean=True) for _ in range(4)])
    run = TrainingRun("bulkEncoder", cfg, plan, model, optimizer, schedule, rng, made_from)
    train_model(run, optimizer, schedule, folds, test_bulks, rng)
    if run.group.rank:  # the first process writes what all have trained
        return
    n_cells = np.bincount(training.codes, minlength=len(reference.cell_types))
    run.save_results(
        genes=genes,
        gene_ids=list(cells.var.loc[genes, "gene_ids"]),  # by which bulks may name them
        **described,
        fit=reference_fit(model, decoder, reference, genes, rng),
        composition=(n_cells / len(train)).tolist(),
        **describe_types(cells, training, train),
    )
    last = run.progress.curve[-1]
    names = ("mu", "var", "pi", "held_out_mu", "held_out_var", "held_out_pi")
    losses = {name: last[name] for name in names if last[name] is not None}
    print(
        f"wrote bulkEncoder_model.pt and bulkEncoder_loss.csv/.png to {cfg.weights}: "
        + ", ".join(f"{name.replace('_', ' ')} {value:.5f}" for name, value in losses.items())
    )


if __name__ == "__main__":
    run_script(main, settings)
