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
        "input": "data labels samples donors batch_key",
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

    batch_key: str | None = None
    """Dataset or protocol of each cell, given as --samples is. Bulks of one batch are then
    deconvolved with the profiles of the others, so that the encoder learns how platforms differ."""
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
        if self.batch_key and self.samples is None:
            raise InputError("--batch-key: found no --samples, expected samples of batches")
        if self.noise < 0:
            raise InputError(f"--noise: found {self.noise}, expected 0 or more")
        if self.n_hidden < 1:
            raise InputError(f"--n-hidden: found {self.n_hidden}, expected 1 or more")
        if self.n_state_genes < 0:
            raise InputError(f"--n-state-genes: found {self.n_state_genes}, expected 0 or more")


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
from models import BulkEncoder, encode_cells, scDecoder, scGMVAE
from readers.backed import sample_in_memory
from readers.fingerprint import digest
from runtime.checkpoint import already_finished
from runtime.device import pick_device, seed_everything
from runtime.errors import some
from runtime.processes import distributed
from runtime.weights import check_cell_types, check_mixture, load_mixture, load_model
from states.directions import fit_states, group_bulks
from states.moments import SampleMoments, read_samples_metadata, relative_to_batches, sample_moments
from states.pseudobulks import (
    BulkCells,
    Pseudobulks,
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
# How states show in a bulk is learned from bulks of any platform, so that a bulk of another one
# reads as unchanged rather than as some state.
STATE_NOISE = 1.0
UPDATES = {"n_iterations": 34, "momentum": 0.7}  # of the deconvolution; as far as 100 without
STATE_LOG_WEIGHT = -4.0  # of genes of states in the deconvolution, before training
N_STATE_BULKS = 2000  # from which it is learned
# Of the training cells. Bulks of one are deconvolved with the means of the others, so that the gene
# weights allow for the error of means from few cells.
N_FOLDS = 4
FEWEST_CELLS = 20  # of a type in a held-out sample, for its raw moments to be worth a comparison


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
    expected = expected_bulk(decoder.to(device), encoded)
    measures = bulk_fit(bulk, expected, np.ones(bulk.shape[1], bool))
    if np.isnan(measures).all(axis=1).any():
        return {}
    return {
        # One gene more or less is the finest difference that counts.
        name: [float(np.nanmean(values)), max(float(np.nanstd(values)), 1 / bulk.shape[1])]
        for name, values in zip(("correlation", "unexplained"), measures, strict=True)
    }


# ---------------------------------------------------------------------------------- training


def encoder_losses(predicted, target, n=None, known=None):
    """The three losses, each a mean over all entries.

        L_mu = MSE + L1 (μ̂_k, μ_k),   L_var = MSE + L1 (σ̂_k², σ_k²),   L_pi = MSE (π̂, π)

    Regression: the published variance loss added the L1 of mu.

    Args:
        predicted: mu, var (B, K, D) and pi (B, K). target: mu, var (K, D) or (B, K, D), pi (B, K).
        n: bulks of the whole batch, if these are a part of it; their share of its mean is returned.
        known: mask of the types whose moments count (B, K); all if None.
    """
    mu, var, pi = (p - t for p, t in zip(predicted, target, strict=True))

    def mean(error):
        if known is not None and error.dim() == 3:
            return error[known].mean()
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


def read_samples(cfg, reference):
    """What the encoder is to answer for each biological sample, as stage 1 found it.

    Returns:
        SampleMoments (S, K, D) of the training cells, shrunk, and of the held-out cells, raw; None
        twice without samples, or if all cells are of one, whose moments are the mixture's.

    Raises:
        InputError: stage 1 was trained without these samples, or for another mixture.
    """
    sample, names = reference.sample, reference.samples
    if len(names) == 1:
        return None, None
    path = cfg.weights / "scGMVAE_model.pt"
    gmvae, metadata = load_model(path, scGMVAE)
    if "samples" not in metadata:
        raise InputError(f"{path}: trained without --samples, expected stage 1 trained with them")
    check_cell_types(path, metadata, reference.cell_types)
    mixture = load_mixture(cfg.weights, len(reference.cell_types))
    check_mixture(path, gmvae, *mixture, "gmm_mu_c.pt and gmm_var_c.pt")
    known, moments = read_samples_metadata(metadata["samples"])
    trained = {names[s] for s in np.unique(sample[reference.train])}
    if trained != set(known):
        raise InputError(
            f"{path}: trained on {len(known)} samples ({some(known)}), found {len(trained)} in "
            f"--samples {cfg.samples} ({some(sorted(trained))}); expected the same"
        )
    order = [known.index(name) if name in known else -1 for name in names]  # (S)
    # A held-out sample is never drawn from in training, so any numbers will do for it.
    moments = SampleMoments(*(part[order] for part in vars(moments).values()))
    moments.n_cells[[i for i, name in enumerate(names) if name not in known]] = 0
    rows = reference.test
    if len(rows) == 0:
        return moments, None
    X, _ = reference.counts(metadata["genes"], cfg.data, report=True)
    mean, var = (part.numpy() for part in encode_cells(gmvae, X, rows))
    shape = moments.mu.shape[:2]
    return moments, sample_moments(mean, var, reference.codes[rows], sample[rows], shape)


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


def moments_of_states(cfg, reference, mu, var):
    """As :func:`read_samples`; of a reference of several batches, relative to these.

    mu, var: of the mixture (K, D), tensors.
    """
    moments, raw = read_samples(cfg, reference)
    if reference.batch is None:
        return moments, raw
    types = reference.by_sample(reference.batch), mu.numpy(), var.numpy()
    if raw is not None:
        raw = relative_to_batches(raw, *types, moments)
    return relative_to_batches(moments, *types), raw


def make_bulk_cells(reference, genes, moments, raw_moments, where):
    """BulkCells of the training cells and of the held-out ones, in the encoder's genes.

    moments: of the training samples; raw_moments: of the held-out ones.
    """
    X, _ = reference.counts(genes, where, report=True)
    X = X.astype(np.float32)  # once, rather than at every step
    sample = reference.sample if len(reference.samples) > 1 else None
    shape = reference.codes, len(reference.cell_types), sample
    every = BulkCells(X, *shape, moments, batch=reference.batch)
    training, testing = every.take(reference.train), every.take(reference.test)
    testing.moments, testing.mixed = raw_moments, False
    return training, testing


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


@torch.no_grad()
def add_states(model, folds, donor, cfg, rng):
    """The same model with what the samples teach of states, if it can be told.

    Args:
        folds: of :func:`make_folds`; those within a batch, as what other batches differ
            by is no state. donor: code of each sample's donor (S).
    """
    folds = [fold for fold in folds if not fold.other_batches]
    ratios, mu, log_var, shares = [], [], [], []
    measured = torch.ones_like(model.profile)
    for i in range(-(-N_STATE_BULKS // cfg.batch_size)):
        fold = folds[i % len(folds)]
        bulks = simulate_bulks(fold.cells, cfg, rng, noise=STATE_NOISE)
        fractions = model.normalise(torch.from_numpy(bulks.counts), measured)
        first = model.deconvolve(fractions, measured, fold.means)  # (B, K)
        ratios.append(model.ratio_to(first @ fold.means, fractions, measured).numpy())
        mu.append((bulks.mu - model.mu.numpy()) / model.var.sqrt().numpy())
        log_var.append(np.log(bulks.var / model.var.numpy()))
        shares.append(bulks.share)
    parts = (np.concatenate(part).astype(np.float64) for part in (ratios, mu, log_var))
    groups = group_bulks(np.concatenate(shares), donor, rng)
    states, left = fit_states(*parts, groups)
    if states is None:
        why = "of one donor" if np.isnan(left) else "whose states a bulk of another does not tell"
        print(f"samples {why}: the encoder answers with the cell types' moments")
        return model
    print(
        f"{states.weight.shape[1]} directions in which samples differ; in bulks of donors left out "
        f"{left:.0%} of the squared error of mu remains"
    )
    state, config = model.state_dict(), model.config | {"n_state": states.weight.shape[1]}
    model = BulkEncoder(**config)
    model.load_state_dict(state, strict=False)
    states.copy_to(model)
    return model


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
    predicted = model.correct(first, fractions, measured, signature)
    target = bulks.target(model, part)
    error = first - target[2]
    deconvolved = (error**2).sum() / (n * error.shape[1])
    return encoder_losses(predicted, target, n) | {"deconvolved": deconvolved}


@torch.no_grad()
def held_out_losses(model, test):
    """The three losses on held-out bulks (HeldOutBulks), in eval mode; None without any."""
    names = ("mu", "var", "pi")
    if test is None:
        return {f"held_out_{name}": None for name in names}
    model.eval()
    predicted = model(torch.from_numpy(test.bulks.counts).to(model.mu.device))
    losses = encoder_losses(predicted, test.bulks.target(model), known=test.known)
    return {f"held_out_{name}": losses[name].item() for name in names} | test.beside


@dataclass
class HeldOutBulks:
    """Bulks of held-out cells, the same at every step."""

    bulks: Pseudobulks
    known: torch.Tensor | None
    """Mask of the types whose raw moments can be compared with (B, K); None without samples."""
    beside: dict
    """With samples, losses of the constant answer, and of the true moments against the raw ones."""


def simulate_test_bulks(model, cells, cfg, rng):
    """Four batches of bulks of held-out cells; those of a sample are of that sample alone.

    cells: BulkCells, held out, with raw moments if they are of samples.
    """
    bulks = concatenate([simulate_bulks(cells, cfg, rng, clean=True) for _ in range(4)])
    if cells.sample is None:
        return HeldOutBulks(bulks, None, {})
    n_cells = cells.moments.n_cells[bulks.share.argmax(axis=1)]  # (B, K)
    known = torch.from_numpy(n_cells >= min(FEWEST_CELLS, n_cells.max()))
    target = bulks.target(model)
    shape = (len(bulks.counts), *model.mu.shape)
    constant = (model.mu.expand(shape), model.var.expand(shape), target[2].mean(dim=0))
    losses = encoder_losses(constant, target, known=known)
    beside = {f"constant_{name}": value.item() for name, value in losses.items()}
    # The mean of n cells is off by N(0, σ²/n), whose squared and absolute sizes are in closed form.
    error2 = target[1] / torch.from_numpy(np.maximum(n_cells, 1))[:, :, None]
    noise = (error2 + (2 / np.pi * error2).sqrt())[known].mean()
    return HeldOutBulks(bulks, known, beside | {"noise_mu": noise.item()})


def train_model(run, optimizer, schedule, folds, test, rng):
    """The training loop: a fresh batch of pseudobulks at every step, of each fold in turn.

    Args:
        folds: as :func:`make_folds` gives them. test: HeldOutBulks, or None. rng: NumPy
            generator.
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


def report_constant(losses):
    """Print the held-out losses beside the constant answer's, and which head does not beat it."""
    if "constant_mu" not in losses:
        return
    for name in ("mu", "var", "pi"):
        loss, constant = losses[f"held_out_{name}"], losses[f"constant_{name}"]
        noise = f", sampling noise of the target {losses['noise_mu']:.4f}" if name == "mu" else ""
        change = f" ({loss / constant - 1:+.0%})" if constant else ""  # of one type, pi is 1
        print(f"held-out {name}: {loss:.4f}, constant answer {constant:.4f}{change}{noise}")
        if loss >= constant > 0:
            print(
                f"warning: the {name} head does not beat the constant answer on held-out samples",
                file=sys.stderr,
            )


@distributed
def main(cfg):
    rng = seed_everything(cfg.seed)
    device = pick_device(cfg.device)
    reference = Reference.load(cfg)
    mu, var, decoder, metadata = read_mixture(cfg, reference.cell_types)
    reference.split(cfg, metadata, cfg.weights / "scDecoder_model.pt")
    moments, raw_moments = moments_of_states(cfg, reference, mu, var)
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
    training, testing = make_bulk_cells(reference, genes, moments, raw_moments, cfg.data)
    print(
        f"pseudobulks of {len(train):,} training cells, {len(genes):,} genes; "
        f"{len(test):,} cells held out"
    )
    if already_finished(cfg, cfg.weights / "bulkEncoder_model.pt", BulkEncoder, made_from):
        return

    model, signature = start_model(training, of_types, mu, var, cfg, rng)
    folds = make_folds(training, model, signature, N_FOLDS, rng)
    if len(reference.samples) > 1:
        donor = reference.by_sample(reference.codes_in("donor"))
        model = add_states(model, folds, donor, cfg, rng)
    model = model.to(device)
    for fold in folds:
        fold.means = fold.means.to(device)
    plan = Plan(cfg.steps, 1, cfg.batch_size, cfg.lr)
    optimizer, schedule = two_rate_optimizer(model, [model.log_weight], plan, cfg.weight_decay)
    test_bulks = simulate_test_bulks(model, testing, cfg, rng) if len(test) else None
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
    report_constant(last)
    names = ("mu", "var", "pi", "held_out_mu", "held_out_var", "held_out_pi")
    losses = {name: last[name] for name in names if last[name] is not None}
    print(
        f"wrote bulkEncoder_model.pt and bulkEncoder_loss.csv/.png to {cfg.weights}: "
        + ", ".join(f"{name.replace('_', ' ')} {value:.5f}" for name, value in losses.items())
    )


if __name__ == "__main__":
    run_script(main, settings)
