"""Stage 1: scGMVAE, a count VAE whose prior is a Gaussian mixture with one component per cell type.

It takes the place of autoCell (Xu et al., Cell Reports Methods 2023) and trains in the same three
phases: a plain VAE, a fit of the mixture to its latent, then both together.

    python train_gmvae.py
    python train_gmvae.py --data filtered_feature_bc_matrix --labels barcode_to_celltype.csv
    python train_gmvae.py --data filtered_feature_bc_matrix --n-types 0       # without labels

Writes gmm_mu_c.pt, gmm_var_c.pt (1 x D x K), scGMVAE_model.pt and the loss curves to --weights.
Without labels it also writes found_celltypes.csv, the type of each cell, which later stages read.
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
        "input": "data labels samples donors conditions baseline batch_key n_types",
        "output": "weights",
        "training": "held_out held_out_donors epochs batch_size lr resume",
        "model": "n_genes n_latent n_hidden loss",
    },
    gone={"kl_start": 0.1, "thin": 0.3},
)
@dataclass
class Settings(TrainingSettings):
    """Stage 1: train scGMVAE, the latent space of cells and its Gaussian mixture of cell types.

    Example: python train_gmvae.py --data filtered_feature_bc_matrix --labels celltypes.csv
    """

    n_types: int | None = None
    """Find this many cell types without labels, 0 for as many as the BIC asks for (up to 20).
    Labels only serve for comparison then. Default: the types are those of the labels."""
    epochs: int | None = None
    """Passes over the training cells, all three phases together (autoCell: 400 of batch 128).
    Default: by the number of cells, and fewer for a reference of 2,000 or more once the loss of 500
    cells that are set aside no longer falls."""
    vae_epochs: int | None = None
    """The first of these train a plain VAE (standard normal prior), then the mixture is fitted.
    Default: a quarter of them."""
    batch_size: int | None = None
    """Cells per step. Default: 32, and more from 4,000 training cells on, up to 256."""
    lr: float = 2e-3
    """Peak learning rate, of batches of 32; the default of larger ones is higher."""
    n_latent: int = 10
    """D, latent dimensions; independent of the number of cell types."""
    n_hidden: int = 256
    """Width of the two hidden layers of encoder and decoder (autoCell: 128)."""
    loss: Literal["nb", "zinb"] = "nb"
    """Negative log-likelihood of the counts under the decoder."""
    kl_end: float = 0.3
    """KL weight, which rises to this over the plain-VAE phase and then stays. At 1 the latent loses
    the variation within a type. At 0.1 each cell has a place of its own in it, and the decoder
    overfits the training cells' noise."""
    dropout: float = 0.1
    """In the hidden layers; a few hundred cells overfit without it."""
    weight_decay: float = 0.05
    """AdamW's, on the networks only, not on mixture or dispersions."""

    def __post_init__(self):
        super().__post_init__()
        if self.n_types is not None and self.n_types < 0:
            raise InputError(f"--n-types: found {self.n_types}, expected 0 or more")
        if self.n_latent < 1 or self.n_hidden < 1:
            raise InputError("--n-latent, --n-hidden: expected 1 or more")
        if self.kl_end < 0:
            raise InputError(f"--kl-end: found {self.kl_end}, expected 0 or more")
        if self.vae_epochs is not None:
            if self.epochs is None:
                raise InputError("--vae-epochs: found no --epochs, expected both or neither")
            if not 0 <= self.vae_epochs <= self.epochs:
                found = f"{self.vae_epochs} of {self.epochs}"
                raise InputError(f"--vae-epochs: found {found} epochs, expected 0 to --epochs")


if __name__ == "__main__":
    settings = parse_args(Settings)  # before the slow imports, so that --help answers at once

from functools import partial

import numpy as np
import pandas as pd
import torch

from counts.genes import choose_genes
from data import Reference, report_names
from distributions.fits import mean_profile
from models import encode_cells, scGMVAE
from readers.backed import RowsInMemory, sample_in_memory
from readers.fingerprint import digest
from readers.labels import FOUND_FILE, natural_order, read_labels
from runtime.checkpoint import already_finished
from runtime.device import in_batches, pick_device, seed_everything, to_sparse
from runtime.processes import distributed
from runtime.weights import save_mixture
from runtime.writing import check_writable, write_whole
from training import (
    TrainingRun,
    cells_of_curve,
    plan_training,
    split_validation,
    two_rate_optimizer,
)

MOST_TYPES = 20  # that the BIC chooses from
MOST_IN_MIXTURE = 20_000  # cells that types are found in; a random sample if there are more
PASSES = 100  # over the cells of a small reference
VAE_SHARE = 1 / 4  # of the epochs, for the plain VAE
KL_START = 0.1  # weight of the KL at the first epoch
THIN = 0.3  # least share of a cell's counts that the encoder sees, as if sequenced less deeply


# --------------------------------------------------------------------------------- cell types


def print_types(size, names):
    """Print the cell types with their numbers of cells; warn of names that are nearly the same.

    size: cells of each type (K). names: of the types (K).
    """
    order = np.argsort(-size, kind="stable")
    print("cell types: " + ", ".join(f"{names[k]} {size[k]:,}" for k in order))
    plain = ["".join(name.lower().split()) for name in names]
    if alike := [repr(names[k]) for k in order if plain.count(plain[k]) > 1]:
        print(
            f"warning: cell types {', '.join(alike)} differ in case or blanks alone, and are "
            "trained as different types",
            file=sys.stderr,
        )


class LabelledTypes:
    """Cell types given by the labels: component k of the mixture is cell type k.

    Attributes:
        codes: type of each cell (N). names: of the types (K).
    """

    def __init__(self, reference, cfg):
        self.codes, self.names = reference.codes, reference.cell_types
        print_types(np.bincount(self.codes, minlength=len(self.names)), self.names)

    def resume(self, kept):
        """Nothing to take from a checkpoint: the labels have been read again."""

    def kl(self, model, mean, var, rows):
        """KL of each cell (B) to the Gaussian of its type; rows: which cells these are (B)."""
        return model.kl(mean, var, torch.as_tensor(self.codes[rows], device=mean.device))

    def fit(self, run, train, mean, var):
        """Set the mixture to the posteriors of the training cells, the same in all processes."""
        self.fit_mixture(run.model, train, mean, var)
        run.group.broadcast(run.model.mu.data, run.model.log_var.data)

    def fit_mixture(self, model, train, mean, var):
        """Set the mixture to the posteriors (n, D) of the training cells, indices ``train`` (n)."""
        model.fit_mixture(mean, var, torch.as_tensor(self.codes[train], device=mean.device))

    def settle(self, model, train, X):
        """Nothing to settle: all types of the labels stay."""

    def save(self, folder, barcodes):
        """Remove what an earlier run without labels found: these weights have other types."""
        (folder / FOUND_FILE).unlink(missing_ok=True)


class FoundTypes(LabelledTypes):
    """Cell types found in the latent of the plain VAE, without labels.

    Attributes:
        labels: Series (N) to compare with, or None. log_weight: ln π (K) once types are found.
    """

    def __init__(self, reference, cfg):
        self.labels = read_labels(reference.cells, cfg.data, cfg.labels)
        self.codes, self.names = (
            np.zeros(reference.cells.n_obs, int),
            [""] * (cfg.n_types or MOST_TYPES),
        )
        self.n_types, self.seed, self.log_weight = cfg.n_types, cfg.seed, None

    def resume(self, kept):
        """Take the types from a checkpoint, if they had been found by then."""
        if "codes" in kept:
            self.log_weight, self.codes = kept["log_weight"], kept["codes"].numpy()

    def kl(self, model, mean, var, rows):
        """KL of each cell (B) to the whole mixture, as its type is not known."""
        return model.mixture_kl(mean, var, self.log_weight.to(mean.device))[0]

    def fit(self, run, train, mean, var):
        """Find the types in the latent of the training cells, then set the mixture to them."""
        self.find(train, mean)
        codes = torch.from_numpy(self.codes)
        run.group.broadcast(self.log_weight, codes)
        run.progress.kept |= {"log_weight": self.log_weight, "codes": codes}
        super().fit(run, train, mean, var)

    def find(self, train, mean):
        """Set the codes of the training cells and ln π by their posterior means (n, D)."""
        self.codes[train], weight = choose_mixture(mean, self.n_types, self.seed)
        unused = [-np.inf] * (len(self.names) - len(weight))  # components the BIC has no use for
        log_weight = torch.tensor([*np.log(weight), *unused], device=mean.device)
        self.log_weight = log_weight.float()

    def settle(self, model, train, X):
        """Give each cell its likeliest type, name the types, and drop those without training cells.

        Args:
            model: scGMVAE, which keeps the components of these types, in their order.
            train: indices of the training cells. X: counts of all cells (N x G).
        """
        if self.log_weight is None:  # every epoch was the plain VAE's
            self.find(train, encode_cells(model, X, train)[0])
        mean, var = encode_cells(model, X)  # (N, D) each
        responsibility = model.mixture_kl(mean, var, self.log_weight.to(mean.device))[1]  # (N, K)
        likeliest = responsibility[torch.from_numpy(train)].argmax(dim=1)
        size = torch.bincount(likeliest, minlength=len(self.log_weight))
        kept = size.argsort(descending=True, stable=True)[: (size > 0).sum()]  # (K',)
        if n_empty := int(self.log_weight.isfinite().sum()) - len(kept):
            print(
                f"{n_empty} of {n_empty + len(kept)} types ended without a training cell and are "
                "left out"
            )
        codes = responsibility[:, kept].argmax(dim=1).cpu().numpy()  # (N)
        names, table = name_types(codes, self.labels)
        self.names = natural_order(names)
        order = [names.index(name) for name in self.names]
        model.keep_types(kept[order])
        self.codes = np.argsort(order)[codes]
        print(table.iloc[order].set_axis(self.names).to_string(float_format="{:.2f}".format))

    def save(self, folder, barcodes):
        """Write found_celltypes.csv, which the later stages read as labels."""
        path = folder / FOUND_FILE
        names = np.array(self.names)[self.codes]
        table = pd.DataFrame({"barcode": barcodes, "cell_type": names})
        write_whole(path, lambda part: table.to_csv(part, index=False))
        print(f"wrote {path}: {len(self.names)} cell types")


def choose_mixture(mean, n_types, seed):
    """Component of each cell (N) and weights π (K) by a mixture of Gaussians on the latents.

    Covariances are full: the latents of a type are correlated, and with diagonal covariances the
    BIC would split each type into ever more components.

    Args:
        mean: posterior means of the training cells (N, D), a tensor.
        n_types: K, at most N; 0 for the number up to MOST_TYPES with the lowest BIC.
    """
    from sklearn.mixture import GaussianMixture

    mean = mean.cpu().numpy()
    sample = mean
    if len(mean) > MOST_IN_MIXTURE:
        sample = np.random.default_rng(seed).choice(mean, MOST_IN_MIXTURE, replace=False)

    def fit(k):
        return GaussianMixture(k, n_init=3, reg_covar=1e-4, random_state=seed).fit(sample)

    if n_types:
        mixture = fit(n_types)
    else:
        mixtures = [fit(k) for k in range(1, min(MOST_TYPES, len(mean)) + 1)]
        mixture = min(mixtures, key=lambda mixture: mixture.bic(sample))
        print(f"\nBIC is lowest with {mixture.n_components} of 1 to {len(mixtures)} cell types")
    return mixture.predict(mean), mixture.weights_


def name_types(codes, labels):
    """Names of the types found without labels (K), and a table of how they match labels.

    Types and labels are assigned one to one, by the most cells in common (Hungarian method). A type
    takes the label's name if that is also the most common label among its cells, else "type k".

    Args:
        codes: type of each cell (N), 0 to K - 1. labels: Series (N) of labels, None where there is
            none; or None.
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics import adjusted_rand_score

    names = [f"type {k + 1}" for k in range(codes.max() + 1)]
    table = pd.DataFrame({"cells": np.bincount(codes)})
    if labels is None or labels.isna().all():
        return names, table
    # The name of a label is reserved for the type that is matched to it.
    names = [f"{name} (found)" if name in set(labels) else name for name in names]
    known = labels.notna().to_numpy()
    shared = pd.crosstab(codes[known], labels[known].to_numpy())
    shared = shared.reindex(range(len(names)), fill_value=0)  # (K, number of labels)
    for k, label in zip(*linear_sum_assignment(-shared.to_numpy()), strict=True):
        if 0 < shared.iloc[k, label] == shared.iloc[k].max():
            names[k] = shared.columns[label]
    table["most common label"] = shared.idxmax(axis=1)
    table["its share"] = shared.max(axis=1) / shared.sum(axis=1).clip(lower=1)
    agreement = adjusted_rand_score(labels[known], codes[known])
    print(f"adjusted Rand index with the labels: {agreement:.2f} ({known.sum():,} labelled cells)")
    return names, table


# ---------------------------------------------------------------------------------- training


def standard_normal_kl(model, mean, var, rows):
    """KL of each cell (B) to N(0, 1), the prior of the plain VAE."""
    return model.kl(mean, var)


def kl_weight(epoch, vae_epochs, cfg):
    """β of an epoch, from 1. At full weight from the start the KL empties the latent."""
    if epoch > vae_epochs:
        return cfg.kl_end
    return KL_START + (cfg.kl_end - KL_START) * (epoch - 1) / vae_epochs


def cell_losses(model, X, rows, part, prior_kl, thin):
    """Reconstruction loss and KL of a part of a batch of cells, each (B').

        L = -log p(x | decoder(z)) + β KL(q(z|x') || prior),   z ~ q(z|x')

    with x' the cell thinned to a random share of its counts while training. Noise is drawn for the
    whole batch, so that it does not depend on the number of processes.

    Args:
        X: counts (N x G). rows: of the batch (B). part: slice of it that is computed (B').
        prior_kl: function of model, mean, var (B', D) and rows (B'). thin: least share of counts.
    """
    x = to_sparse(X, rows, model.mu.device)  # (B, G)
    thinned = x.to_dense()
    library = thinned.sum(dim=1)  # (B)
    if model.training and thin < 1:
        share = thin + (1 - thin) * torch.rand(len(rows), device=x.device)
        kept = torch.binomial(x.values(), share.index_select(0, x.indices()[0]))
        thinned = torch.zeros_like(thinned).index_put_(tuple(x.indices()), kept)
    mean, var = model.encode(thinned[part])  # (B', D)
    noise = torch.randn(len(rows), mean.shape[1], device=x.device)[part]  # (B', D)
    z = mean + var.sqrt() * noise
    x = x if len(mean) == len(rows) else x.narrow_copy(0, part.start, len(mean))  # (B', G)
    return model.decoder.loss(x, z, library[part]), prior_kl(model, mean, var, rows[part])


@torch.no_grad()
def mean_cell_losses(model, X, rows, batch_size, prior_kl):
    """Mean reconstruction loss and KL of cells, in eval mode; None twice without any."""
    if len(rows) == 0:
        return None, None
    model.eval()
    every = slice(None)
    losses = partial(cell_losses, model, X, part=every, prior_kl=prior_kl, thin=1)
    return [loss.mean().item() for loss in in_batches(losses, rows, batch_size)]


def choose_input(reference, cfg, rng):
    """Variable genes of the training cells, and the counts of all cells in them (N x G)."""
    training, codes = reference.cells[~reference.held_out], reference.codes[reference.train]
    if training.n_vars > cfg.n_genes:
        training, _ = sample_in_memory(training, codes, rng, "variable genes")
    genes = choose_genes(training, cfg.n_genes)
    return genes, reference.counts(genes, cfg.data)[0]


def start_model(X, train, n_types, cfg, plan, device):
    """scGMVAE that gives the training cells' mean profile for any z; optimiser and schedule."""
    model = scGMVAE(X.shape[1], n_types, cfg.n_latent, cfg.n_hidden, cfg.loss, cfg.dropout)
    model = model.to(device)
    model.decoder.start_at(mean_profile(X, train).to(device))
    # At the networks' rate mixture and dispersions lag behind, and cells drawn from the prior come
    # out worse than cells drawn from posteriors.
    fast = [model.mu, model.log_var, model.decoder.log_theta]
    return model, *two_rate_optimizer(model, fast, plan, cfg.weight_decay)


def save_stage(run, types, reference, genes, X):
    """Fit the mixture to the final posteriors and write everything that later stages read.

    Args:
        types: LabelledTypes or FoundTypes. genes: of the model (G). X: counts of all cells (N x G).
    """
    cfg, model, train = run.cfg, run.model, reference.train
    types.settle(model, train, X)
    # Cells will be drawn from the mixture alone, so it must hold the final posteriors exactly.
    posterior = encode_cells(model, X, train)
    types.fit_mixture(model, train, *posterior)
    save_mixture(cfg.weights, model.mu, model.var)
    types.save(cfg.weights, list(reference.cells.obs_names))
    run.save_results(
        genes=genes,
        **reference.metadata | {"cell_types": types.names},
    )
    last = run.progress.curve[-1]
    print(
        f"wrote scGMVAE_model.pt, gmm_mu_c.pt, gmm_var_c.pt and scGMVAE_loss.csv/.png to "
        f"{cfg.weights}: reconstruction {last['reconstruction']:.1f}, KL {last['kl']:.2f} per cell"
    )


@distributed
def main(cfg):
    rng = seed_everything(cfg.seed)
    device = pick_device(cfg.device)
    with_labels = cfg.n_types is None
    check_writable(cfg.weights, "--weights")  # rather now than after reading a large file
    reference = Reference.load(cfg, need_labels=with_labels, found=False)
    report_names(reference.cells)
    types = (LabelledTypes if with_labels else FoundTypes)(reference, cfg)
    reference.codes, reference.cell_types = types.codes, types.names
    reference.split(cfg)
    genes, X = choose_input(reference, cfg, rng)
    train, test = reference.train, reference.test
    if (cfg.n_types or 0) > len(train):
        raise InputError(
            f"--n-types: found {cfg.n_types}, expected at most the {len(train)} cells of training"
        )
    print(f"{len(train):,} training cells, {len(test):,} held out, {len(genes):,} genes")
    names, barcodes = reference.genes, list(reference.cells.obs_names)
    fitted, validation = split_validation(train, types.codes, cfg)
    plan = plan_training(cfg, len(fitted), PASSES)
    vae_epochs = round(plan.n_epochs * VAE_SHARE) if cfg.vae_epochs is None else cfg.vae_epochs
    made_from = digest(reference.X, barcodes, names, types.codes, types.names, *reference.names)
    model_file = cfg.weights / "scGMVAE_model.pt"
    if already_finished(cfg, model_file, scGMVAE, made_from):
        return

    model, optimizer, schedule = start_model(X, train, len(types.names), cfg, plan, device)
    shown = cells_of_curve(test, cfg.seed)
    kept = RowsInMemory(X, np.concatenate([validation, shown]))
    losses_of = partial(mean_cell_losses, model, kept, batch_size=plan.batch_size)
    run = TrainingRun("scGMVAE", cfg, plan, model, optimizer, schedule, rng, made_from)
    types.resume(run.progress.kept)
    for epoch in run.epochs():
        if epoch == vae_epochs + 1 and run.progress.step == 0:  # the plain VAE is trained
            types.fit(run, train, *encode_cells(model, X, train))
        prior_kl = types.kl if epoch > vae_epochs else standard_normal_kl
        model.train()
        for rows, part in run.batches(fitted, X):
            reconstruction, kl = cell_losses(model, X, rows, part, prior_kl, THIN)  # (B')
            loss = (reconstruction + kl_weight(epoch, vae_epochs, cfg) * kl).sum() / len(rows)
            optimizer.zero_grad()
            loss.backward()
            run.all_reduce(loss, reconstruction.sum(), kl.sum())
            optimizer.step()
            schedule.step()
        reconstruction, kl = run.mean_losses()
        row = {"epoch": epoch, "reconstruction": reconstruction, "kl": kl}
        row |= {"held_out_reconstruction": None, "held_out_kl": None}
        if epoch % max(1, plan.n_epochs // 15) == 0 or epoch == run.n_epochs:
            losses = losses_of(shown, prior_kl=prior_kl)
            row["held_out_reconstruction"], row["held_out_kl"] = losses
        watched = None
        if len(validation) and epoch > vae_epochs:
            watched = np.dot(losses_of(validation, prior_kl=prior_kl), (1, cfg.kl_end))
        run.end_epoch(row, watched, reconstruction=f"{reconstruction:.1f}", kl=f"{kl:.2f}")

    if run.group.rank:  # the first process writes what all have trained
        return
    save_stage(run, types, reference, genes, X)


if __name__ == "__main__":
    run_script(main, settings)
