"""Stage 2: scDecoder (genVAE in the paper), from the mixture's latent to counts of every gene.

    python train_decoder.py
    python train_decoder.py --pairing prior --loss mse_l1      # the published recipe

Reads gmm_mu_c.pt, gmm_var_c.pt and scGMVAE_model.pt from --weights; with the two mixture files
alone (from autoCell, say) it pairs by prior. Writes scDecoder_model.pt and the loss curves there.

    python train_decoder.py --components "T cells" "B cells" "NK cells"   # of foreign mixture files
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

from data import TrainingSettings
from runtime.errors import InputError
from runtime.flags import in_groups
from runtime.script import parse_args, run_script


@in_groups(
    {
        "input": "data labels samples donors conditions baseline batch_key components",
        "output": "weights",
        "training": "pairing loss epochs batch_size lr resume",
        "model": "n_hidden n_components",
    }
)
@dataclass
class Settings(TrainingSettings):
    """Stage 2: train scDecoder, from the latent to the counts of every gene.

    Example: python train_decoder.py --data filtered_feature_bc_matrix --labels celltypes.csv
    """

    epochs: int | None = None
    """Passes over the training cells. Default: by the number of cells, and fewer for a reference
    of 2,000 or more once the loss of 500 cells that are set aside no longer falls."""
    batch_size: int | None = None
    """Cells per step. Default: 32, and more from 4,000 training cells on, up to 256."""
    lr: float = 4e-3
    """Peak learning rate, of batches of 32; the default of larger ones is higher (published: 5e-3,
    constant, of one batch)."""
    n_hidden: int = 128
    """h of the shape D -> h/2 -> h -> G. With the published 700, each gene has more weights than a
    small reference has cells, and fits their noise."""
    pairing: Literal["auto", "posterior", "prior"] = "auto"
    """Where a training cell's z comes from. posterior: q(z|x) of that very cell; prior: its cell
    type's N(mu_k, sigma_k^2), as published, which leaves no variation within a type; auto:
    posterior if scGMVAE_model.pt is there, else prior."""
    loss: Literal["nb", "zinb", "mse_l1"] = "nb"
    """Negative log-likelihood of the counts (nb, zinb), or the published regression (mse_l1)."""
    components: tuple[str, ...] = ()
    """Cell type of each component of mixture files that come without scGMVAE_model.pt, in their
    order. Default: the cell types in natural order."""
    n_components: int = 12
    """Gaussians that z of one cell type is drawn from; together they have mean mu_k and variance
    sigma_k^2. With 1, as published, rarer kinds of cells inside a type are lost."""
    dropout: float = 0.2
    """In the hidden layers; not used by mse_l1."""
    weight_decay: float = 0.05
    """AdamW's, on the network only, not on the dispersions."""

    def __post_init__(self):
        super().__post_init__()
        if self.n_hidden < 2:
            raise InputError(f"--n-hidden: found {self.n_hidden}, expected 2 or more")
        if self.n_components < 1:
            raise InputError(f"--n-components: found {self.n_components}, expected 1 or more")


if __name__ == "__main__":
    settings = parse_args(Settings)  # before the slow imports, so that --help answers at once

from functools import partial

import numpy as np
import torch

from counts.genes import choose_marker_genes
from data import Reference, library_size, log_normalise, mean_counts
from distributions.fits import mean_profile
from models import encode_cells, scDecoder, scGMVAE
from readers.backed import RowsInMemory, sample_in_memory
from readers.fingerprint import digest
from runtime.checkpoint import already_finished
from runtime.device import in_batches, pick_device, seed_everything, to_sparse
from runtime.errors import some
from runtime.processes import distributed
from runtime.weights import check_cell_types, check_mixture, load_mixture, load_model
from states.weights import choose_baseline, fit_states, group_cells
from training import (
    TrainingRun,
    cells_of_curve,
    plan_training,
    split_validation,
    two_rate_optimizer,
)

PASSES = 30  # over the cells of a small reference

# ------------------------------------------------------------------ mixture files from elsewhere


def order_components(components, cell_types):
    """Component of each cell type (K): where the type stands in --components.

    Raises:
        InputError: --components are not the cell types, each once.
    """
    if not components:
        return list(range(len(cell_types)))
    unknown = [name for name in components if name not in cell_types]
    if unknown:
        raise InputError(
            f"--components: {some(unknown)} not among the cell types, which are "
            f"{some(cell_types, len(cell_types))}"
        )
    if sorted(components) != sorted(cell_types):
        raise InputError(
            f"--components: found {len(components)} ({len(set(components))} different), expected "
            f"each of the {len(cell_types)} cell types once"
        )
    return [components.index(name) for name in cell_types]


def type_profiles(cells, codes):
    """Log-normalised mean expression of the types (K, G) in 1,000 genes that tell them apart."""
    genes = choose_marker_genes(cells, codes, 1000)
    means = mean_counts(cells[:, genes].X, codes, codes.max() + 1)
    return torch.from_numpy(log_normalise(means))


def check_components(mu, var, order, profile, cell_types):
    """Report how well the mixture's geometry follows the cell types'; warn if another order fits.

    Types with similar expression should lie close together in the latent. So distances between the
    μ_k are compared with distances between the types' profiles, by Pearson correlation over all
    pairs: in the given order, and in the best order that a quadratic assignment finds. Three types
    or fewer have too few distances for that.

    Args:
        mu, var: (K, D), as in the files. order: the component that each type is taken to be (K).
        profile: log-normalised means of the types (K, G). cell_types: their names (K).
    """
    from scipy.optimize import quadratic_assignment

    K = len(mu)
    if K < 4:
        print("too few cell types to check their order by distances")
        return
    scaled = mu / var.mean(dim=0).sqrt()
    pairs = np.triu_indices(K, 1)
    latent, expressed = (torch.cdist(x, x).numpy() for x in (scaled, profile))

    def agreement(order):
        return np.corrcoef(latent[np.ix_(order, order)][pairs], expressed[pairs])[0, 1]

    def search(seed):
        options = {"maximize": True, "rng": np.random.default_rng(seed)}
        return quadratic_assignment(expressed, latent, method="2opt", options=options).col_ind

    given = agreement(order)
    best = max((search(seed) for seed in range(20)), key=agreement)
    print(f"distances between components follow those between cell types: correlation {given:.2f}")
    if agreement(best) > given + 0.2:
        names = [cell_types[i] for i in np.argsort(best)]
        print(
            f"warning: in another order of the components it is {agreement(best):.2f}: "
            f"--components {' '.join(repr(name) for name in names)}",
            file=sys.stderr,
        )


def take_components(cfg, mu, var, cells, codes, cell_types, rng):
    """The component of each cell type (K) in mixture files without scGMVAE; says so, and checks it.

    Args:
        mu, var: (K, D), as in the files. cells: the training cells, AnnData or backed. codes: their
            types (n). cell_types: names (K). rng: NumPy generator.
    """
    order = order_components(cfg.components, cell_types)
    names = "; ".join(f"{k} = {cell_types[i]}" for k, i in enumerate(np.argsort(order)))
    print(f"mixture files without scGMVAE_model.pt, components taken as cell types: {names}")
    sample, rows = sample_in_memory(cells, codes, rng, "marker genes")
    check_components(mu, var, order, type_profiles(sample, codes[rows]), cell_types)
    return order


# ---------------------------------------------------------------------------------- training


def load_gmvae(cfg, mu, var, cell_types, device):
    """scGMVAE of stage 1 and its metadata, checked against labels and mixture; or None twice.

    Raises:
        InputError: it is of other cell types or another mixture, or missing though asked for.
    """
    path = cfg.weights / "scGMVAE_model.pt"
    if cfg.pairing != "posterior" and not path.exists():
        return None, None
    gmvae, metadata = load_model(path, scGMVAE, device)
    check_cell_types(path, metadata, cell_types)
    check_mixture(path, gmvae, mu, var, "gmm_mu_c.pt and gmm_var_c.pt")
    if cfg.components:
        raise InputError(
            f"--components: {path} says which component is which cell type; expected none"
        )
    return gmvae, metadata


def start_model(X, library, train, codes, mixture, posterior, group, cfg):
    """scDecoder that gives the mean profile for any z, with what cells of each type are drawn by.

    Args:
        X: counts (N x G). library: their totals (N). train: indices of the training cells. codes:
            types (N), a tensor.
        mixture: mu, var (K, D). posterior: mean, var (N, D) of q(z|x), or None for the prior.
        group: of :func:`states.weights.group_cells` (N).

    Returns:
        the model on the CPU, not trained yet; and the group of each part of the types' clouds
        (K, C), or None.
    """
    mu, var = mixture
    shape = (mu.shape[1], cfg.n_hidden, X.shape[1], len(mu), cfg.loss, cfg.dropout)
    model = scDecoder(*shape, n_components=cfg.n_components if posterior else 1)
    # Close to Poisson, as most genes are: rare genes have small gradients, so that from 1 their
    # dispersions never get there, and cells come out with too few genes detected.
    model.start_at(mean_profile(X, train), theta=10.0)
    model.mu.copy_(mu)
    model.var.copy_(var)
    model.fit_library(library[train], codes[train])
    if not posterior:
        return model, None
    given = [part[train] for part in (*posterior, codes)]
    return model, model.fit_shape(*given, cfg.seed, torch.as_tensor(group)[train])


def cell_losses(model, X, library, rows, part, z_mean, z_var):
    """Reconstruction loss of a part of a batch of cells, each (B').

        L = -log p(x | scDecoder(z)),   z = m + √v ε   drawn afresh

    with m, v of the cell's posterior, or of its cell type's prior. Noise is drawn for the whole
    batch, so that it does not depend on the number of processes.

    Args:
        X: counts (N x G). library: their totals (N). rows: of the batch (B). part: slice of it
            that is computed (B'). z_mean, z_var: m and v of all cells (N, D).
    """
    device = model.mu.device
    noise = torch.randn(len(rows), z_mean.shape[1])[part]  # (B', D)
    rows = rows[part]
    x = to_sparse(X, rows, device)  # (B', G)
    z = z_mean[rows] + z_var[rows].sqrt() * noise  # (B', D)
    return model.loss(x, z.to(device), library[rows].to(device))


@torch.no_grad()
def mean_cell_loss(model, X, library, rows, z_mean, z_var, batch_size):
    """Mean reconstruction loss of cells, in eval mode; None without any."""
    if len(rows) == 0:
        return None
    model.eval()
    every = slice(None)
    [losses] = in_batches(
        lambda batch: [cell_losses(model, X, library, batch, every, z_mean, z_var)],
        rows,
        batch_size,
    )
    return losses.mean().item()


def train_model(run, optimizer, schedule, X, library, split, z):
    """The training loop.

    Args:
        X: counts (N x G). library: their totals (N). split: indices of the cells to train on, of
            those set aside for early stopping, and of held-out cells. z: mean and variance that the
            latent of each cell is drawn from, (N, D) each.
    """
    model, (fitted, validation, test) = run.model, split
    shown = cells_of_curve(test, run.cfg.seed)
    kept = RowsInMemory(X, np.concatenate([validation, shown]))
    loss_of = partial(mean_cell_loss, model, kept, library, batch_size=run.plan.batch_size)
    for epoch in run.epochs():
        model.train()
        for rows, part in run.batches(fitted, X):
            losses = cell_losses(model, X, library, rows, part, *z)  # (B')
            loss = losses.sum() / len(rows)
            optimizer.zero_grad()
            loss.backward()
            run.all_reduce(loss, losses.sum())
            optimizer.step()
            schedule.step()
        [reconstruction] = run.mean_losses()
        row = {"epoch": epoch, "reconstruction": reconstruction, "held_out_reconstruction": None}
        if epoch % max(1, run.plan.n_epochs // 15) == 0 or epoch == run.n_epochs:
            row["held_out_reconstruction"] = loss_of(shown, *z)
        run.end_epoch(row, loss_of(validation, *z), reconstruction=f"{reconstruction:.1f}")


def fit_types(model, reference, seed):
    """Fit what the trained network does not hold of the types, and say which counts are left out.

    model: scDecoder in eval mode.
    """
    cells, train = reference.cells, reference.train
    # Counts of several donors tell noise from differences.
    shrink = "donor" in cells.obs and cells.obs["donor"].iloc[train].nunique() > 1
    codes = torch.as_tensor(reference.codes[train])
    if n_spikes := model.fit_types(cells[train].X, codes, seed=seed, shrink=shrink):
        print(
            f"{n_spikes:,} counts far above all others of their cell type: left out of its "
            "means and dispersions"
        )


def find_baseline(reference, cfg):
    """Conditions of the training samples that count as the baseline; says which, if not asked for.

    Empty without conditions. Raises InputError: see :func:`states.weights.choose_baseline`.
    """
    obs = reference.cells.obs
    if "condition" not in obs:
        return []
    table = obs.iloc[reference.train].groupby("sample", observed=True).first().astype(str)
    batches = list(table["batch"]) if "batch" in table else ["all"] * len(table)
    baseline = choose_baseline(cfg.baseline, list(table["condition"]), batches)
    if not cfg.baseline:
        print(f"baseline: {', '.join(baseline)}; --baseline chooses another")
    return baseline


def describe_states(model, posterior, reference, group, owner, baseline):
    """What the model's file says of the samples' states: dict with ``states``, if there are any."""
    if owner is None or len(np.unique(reference.sample[reference.train])) == 1:
        return {}
    fitted = fit_states(model, posterior[0], reference, group, owner, baseline)
    return {"states": vars(fitted)}


@distributed
def main(cfg):
    rng = seed_everything(cfg.seed)
    device = pick_device(cfg.device)
    reference = Reference.load(cfg)
    codes, cell_types, genes = reference.codes, reference.cell_types, reference.genes
    order = list(range(len(cell_types)))
    mu, var = load_mixture(cfg.weights, len(cell_types))  # (K, D) each
    gmvae, metadata = load_gmvae(cfg, mu, var, cell_types, device)
    reference.split(cfg, metadata, cfg.weights / "scGMVAE_model.pt")
    cells, train, test = reference.cells, reference.train, reference.test
    by_posterior = gmvae is not None and cfg.pairing != "prior"
    source = "the posterior of each cell" if by_posterior else "the prior of its cell type"
    print(
        f"{len(train):,} training cells, {len(test):,} held out, {len(genes):,} genes; "
        f"z from {source}"
    )
    if gmvae is None:
        order = take_components(cfg, mu, var, cells[train], codes[train], cell_types, rng)
        mu, var = mu[order], var[order]
    baseline, group = find_baseline(reference, cfg), group_cells(reference)
    fitted, validation = split_validation(train, codes, cfg)
    plan = plan_training(cfg, len(fitted), PASSES)
    made_from = digest(
        *(cells.X, list(cells.obs_names), genes, codes, cell_types, reference.held_out, mu, var),
        gmvae.state_dict() if by_posterior else "prior",
        *reference.names,  # type means are shrunk if there are several donors
        baseline,
    )
    if already_finished(cfg, cfg.weights / "scDecoder_model.pt", scDecoder, made_from):
        return

    posterior, codes = None, torch.as_tensor(codes)
    if by_posterior:
        X, _ = reference.counts(metadata["genes"], cfg.data, report=True)
        posterior = [part.cpu() for part in encode_cells(gmvae, X)]  # (N, D) each
    z_mean, z_var = posterior or (mu[codes], var[codes])  # (N, D) each
    library = torch.from_numpy(library_size(cells.X))  # (N)
    model, owner = start_model(cells.X, library, train, codes, (mu, var), posterior, group, cfg)
    model = model.to(device)
    fast = [] if model.log_theta is None else [model.log_theta]
    optimizer, schedule = two_rate_optimizer(model, fast, plan, cfg.weight_decay)
    run = TrainingRun("scDecoder", cfg, plan, model, optimizer, schedule, rng, made_from)
    split = fitted, validation, test
    train_model(run, optimizer, schedule, cells.X, library.float(), split, (z_mean, z_var))
    if run.group.rank:  # the first process writes what all have trained
        return
    if by_posterior:
        fit_types(model.eval(), reference, cfg.seed)
    run.save_results(
        genes=genes,
        gene_ids=list(cells.var["gene_ids"]),  # by which bulks may name them
        **reference.metadata,
        pairing="posterior" if by_posterior else "prior",
        components=order,  # which component of the mixture files each type is
        **describe_states(model.cpu(), posterior, reference, group, owner, baseline),
    )
    print(
        f"wrote scDecoder_model.pt and scDecoder_loss.csv/.png to {cfg.weights}: "
        f"reconstruction {run.progress.curve[-1]['reconstruction']:.1f} per cell"
    )


if __name__ == "__main__":
    run_script(main, settings)
