"""Stage 1: scGMVAE, a count VAE whose prior is a Gaussian mixture with one component per cell type.

Takes the place of autoCell (Xu et al., Cell Reports Methods 2023). Three phases, as there:
a plain VAE, a fit of the mixture to its latent, then both together.

    python train_gmvae.py
    python train_gmvae.py --data filtered_feature_bc_matrix --labels barcode_to_celltype.csv
    python train_gmvae.py --data filtered_feature_bc_matrix --n-types 0       # without labels

Writes gmm_mu_c.pt, gmm_var_c.pt (1 x D x K), scGMVAE_model.pt and the loss curves to --weights;
without labels also found_celltypes.csv, the type it found for each cell, which the later
steps then read.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch

from data import (
    TrainingSettings,
    align_genes,
    choose_genes,
    choose_held_out,
    codes_of,
    load_cells,
)
from models import encode_cells, mean_profile, scGMVAE
from plotting import write_losses
from readers.backed import sample_in_memory
from readers.fingerprint import digest
from readers.labels import FOUND_FILE, natural_order, read_labels
from runtime.checkpoint import already_finished
from runtime.device import in_batches, pick_device, seed_everything, to_dense
from runtime.errors import InputError
from runtime.processes import several
from runtime.script import run_script
from runtime.weights import save_mixture, save_model
from runtime.writing import write_whole
from training import Run, two_rate_optimizer

MOST_TYPES = 20  # that the BIC chooses from


@dataclass
class Settings(TrainingSettings):
    n_types: int | None = None
    """Find this many cell types without labels, 0 for as many as the BIC asks for (up to 20).
    Labels are then only compared with. Default: the types are those of the labels."""
    epochs: int = 150
    """Passes over the training cells, all three phases together (autoCell: 400 of batch 128)."""
    vae_epochs: int = 40
    """Of these, passes as a plain VAE (standard normal prior) before the mixture is fitted."""
    batch_size: int = 32
    """Cells per step; small, because a small reference gives few steps."""
    lr: float = 1e-3
    """Peak learning rate of a one-cycle schedule."""
    n_latent: int = 10
    """D, latent dimensions; independent of the number of cell types."""
    n_hidden: int = 256
    """Width of the two hidden layers of encoder and decoder (autoCell: 128)."""
    loss: str = "nb"
    """nb or zinb: negative log-likelihood of the counts under the decoder."""
    kl_start: float = 0.1
    """KL weight at the first epoch; rises to kl_end over the plain-VAE phase."""
    kl_end: float = 0.3
    """KL weight from then on. At 1 variation within a type is left out of z; at 0.1 each cell has a
    place of its own in z, and the decoder then learns the training cells' noise by heart."""
    thin: float = 0.3
    """The encoder sees each cell with a random share of its counts, from this to 1: the same cell
    sequenced less deeply. 1 turns it off."""
    dropout: float = 0.1
    """In the hidden layers; a few hundred cells overfit without it."""
    weight_decay: float = 0.05
    """AdamW's, on the networks only, not on mixture or dispersions."""

    def __post_init__(self):
        super().__post_init__()
        if self.loss not in ("nb", "zinb"):
            raise InputError(f"--loss: found {self.loss}, expected nb or zinb")
        if self.n_types is not None and self.n_types < 0:
            raise InputError(f"--n-types: found {self.n_types}, expected 0 or more")
        if self.n_latent < 1 or self.n_hidden < 1:
            raise InputError("--n-latent, --n-hidden: expected 1 or more")
        if min(self.kl_start, self.kl_end) < 0:
            raise InputError("--kl-start, --kl-end: expected 0 or more")
        if not 0 < self.thin <= 1:
            raise InputError(f"--thin: found {self.thin}, expected more than 0, at most 1")
        if not 0 <= self.vae_epochs <= self.epochs:
            found = f"{self.vae_epochs} of {self.epochs}"
            raise InputError(f"--vae-epochs: found {found} epochs, expected 0 to --epochs")


def choose_mixture(mean, n_types, seed):
    """Component of each cell (N) and weights π (K) by a mixture of Gaussians on the latents.

    Their covariances are full: a type's latents are correlated, and the BIC of diagonal Gaussians
    would fill each type with ever more of them.

    Args:
        mean: posterior means of the training cells (N, D), a tensor.
        n_types: K, at most N; 0 for the one of up to MOST_TYPES with the lowest BIC.
    """
    from sklearn.mixture import GaussianMixture

    mean = mean.cpu().numpy()

    def fit(k):
        return GaussianMixture(k, n_init=3, reg_covar=1e-4, random_state=seed).fit(mean)

    if n_types:
        mixture = fit(n_types)
    else:
        tried = [fit(k) for k in range(1, min(MOST_TYPES, len(mean)) + 1)]
        mixture = min(tried, key=lambda mixture: mixture.bic(mean))
        print(f"\nBIC is lowest with {mixture.n_components} of 1 to {len(tried)} cell types")
    return mixture.predict(mean), mixture.weights_


def name_types(found, labels):
    """Names of the types found without labels (K), and a table of how they match labels.

    Types and labels are assigned one to one, most cells in common (Hungarian method). A type has
    the label's name if that is also the most common label among its cells, else "type k".

    Args:
        found: type of each cell (N), 0 to K - 1. labels: Series (N) of labels, None where there is
            none; or None.
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics import adjusted_rand_score

    names = [f"type {k + 1}" for k in range(found.max() + 1)]
    table = pd.DataFrame({"cells": np.bincount(found)})
    if labels is None or labels.isna().all():
        return names, table
    # A name that is one of the labels is for the type that is matched to it alone.
    names = [f"{name} (found)" if name in set(labels) else name for name in names]
    known = labels.notna().to_numpy()
    shared = pd.crosstab(found[known], labels[known].to_numpy())
    shared = shared.reindex(range(len(names)), fill_value=0)  # (K, number of labels)
    for k, label in zip(*linear_sum_assignment(-shared.to_numpy()), strict=True):
        if 0 < shared.iloc[k, label] == shared.iloc[k].max():
            names[k] = shared.columns[label]
    table["most common label"] = shared.idxmax(axis=1)
    table["its share"] = shared.max(axis=1) / shared.sum(axis=1).clip(lower=1)
    agreement = adjusted_rand_score(labels[known], found[known])
    print(f"adjusted Rand index with the labels: {agreement:.2f} ({known.sum():,} labelled cells)")
    return names, table


def settle_types(model, mean, var, log_weight, train, labels):
    """Give each cell the type it most likely comes from, and keep the types of training cells.

    Args:
        model: scGMVAE, whose other components are dropped. mean, var: posteriors of all cells
            (N, D). log_weight: ln π (K). train: indices of the training cells. labels: as
            :func:`name_types` takes them.

    Returns:
        codes (N) and names of the types, in natural order, which is that of the model from now on.
    """
    likely = model.mixture_kl(mean, var, log_weight)[1]  # (N, K)
    size = torch.bincount(likely[torch.from_numpy(train)].argmax(dim=1), minlength=len(log_weight))
    kept = size.argsort(descending=True, stable=True)[: (size > 0).sum()]  # (K',)
    if lost := int(log_weight.isfinite().sum()) - len(kept):
        print(f"{lost} of {lost + len(kept)} types ended without a training cell and are left out")
    found = likely[:, kept].argmax(dim=1).cpu().numpy()
    names, table = name_types(found, labels)
    cell_types = natural_order(names)
    order = [names.index(name) for name in cell_types]
    model.keep_types(kept[order])
    print(table.iloc[order].set_axis(cell_types).to_string(float_format="{:.2f}".format))
    return np.argsort(order)[found], cell_types


@several
def main(cfg):
    rng = seed_everything(cfg.seed)
    device = pick_device(cfg.device)
    label_free = cfg.n_types is not None
    cells = load_cells(cfg, need_labels=not label_free, found=False)
    if label_free:
        labels = read_labels(cells, cfg.data, cfg.labels)
        codes, cell_types = np.zeros(cells.n_obs, int), [""] * (cfg.n_types or MOST_TYPES)
    else:
        codes, cell_types = codes_of(cells)
    held_out, fraction = choose_held_out(cells, codes, cfg)
    own = cells[~held_out]
    if own.n_vars > cfg.n_genes:
        own, _ = sample_in_memory(own, codes[~held_out], rng, "variable genes")
    genes = choose_genes(own, cfg.n_genes)
    del own  # as large as a buffer
    X, _ = align_genes(cells.X, cells.var_names, genes, cfg.data)
    train, test = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    if label_free and cfg.n_types > len(train):
        found = f"found {cfg.n_types}, expected at most the {len(train)} cells"
        raise InputError(f"--n-types: {found} of training")
    print(f"{len(train):,} training cells, {len(test):,} held out, {len(genes):,} genes")
    made_from = digest(cells.X, *map(list, (cells.obs_names, cells.var_names)), codes, cell_types)
    model_file = cfg.weights / "scGMVAE_model.pt"
    if already_finished(cfg, model_file, scGMVAE, made_from):
        return

    model = scGMVAE(
        len(genes), len(cell_types), cfg.n_latent, cfg.n_hidden, cfg.loss, cfg.dropout
    ).to(device)
    model.decoder.start_at(mean_profile(X, train).to(device))
    # Mixture and dispersions lag behind the network at its own rate, and then cells drawn from the
    # prior come out worse than cells drawn from posteriors.
    fast = [model.mu, model.log_var, model.decoder.log_theta]
    steps = -(-len(train) // cfg.batch_size)
    optimizer, schedule = two_rate_optimizer(model, fast, cfg, cfg.epochs * steps, fused=False)

    log_weight = None  # ln π (K), once types were found without labels

    def losses(rows, joint, part=slice(None)):
        """Reconstruction and KL of a part of a batch of cells, each (B',).

        Once joint, the prior is the cell's type. Noise is drawn for the whole batch.
        """
        x = to_dense(X, rows, device)  # (B, G)
        k = torch.as_tensor(codes[rows[part]], device=device) if joint else None  # (B',)
        seen = x
        if model.training and cfg.thin < 1:
            share = cfg.thin + (1 - cfg.thin) * torch.rand(len(rows), 1, device=device)
            seen = torch.binomial(x, share.expand_as(x))
        x, seen = x[part], seen[part]  # (B', G)
        mean, var = model.encode(seen)  # (B', D)
        z = mean + var.sqrt() * torch.randn(len(rows), mean.shape[1], device=device)[part]
        if joint and log_weight is not None:
            kl, _ = model.mixture_kl(mean, var, log_weight)
        else:
            kl = model.kl(mean, var, k)
        return model.decoder.loss(x, z, x.sum(dim=1)), kl

    def posteriors(rows):
        return encode_cells(model, X, cfg.batch_size, rows)  # (N, D) each

    def fit_mixture():
        model.fit_mixture(*posteriors(train), torch.as_tensor(codes[train], device=device))

    def find_types():
        codes[train], weight = choose_mixture(posteriors(train)[0], cfg.n_types, cfg.seed)
        more = len(cell_types) - len(weight)  # that the BIC has no use for
        return torch.tensor([*np.log(weight), *[-np.inf] * more], device=device).float()

    run = Run("scGMVAE", cfg, model, optimizer, schedule, rng, made_from)
    if "codes" in run.kept:  # resumed after types were found
        log_weight, codes = run.kept["log_weight"].to(device), run.kept["codes"].numpy()
    for epoch in run.epochs():
        joint = epoch > cfg.vae_epochs
        if epoch == cfg.vae_epochs + 1 and run.step == 0:
            if label_free:
                log_weight = find_types()
                run.take_from_first(log_weight, torch.from_numpy(codes))
                run.kept |= {"log_weight": log_weight, "codes": torch.from_numpy(codes)}
            fit_mixture()
            run.take_from_first(model.mu.data, model.log_var.data)
        # Warm-up: at full weight from the start the KL empties the latent before it is of use.
        beta = cfg.kl_end
        if not joint:
            beta = cfg.kl_start + (cfg.kl_end - cfg.kl_start) * (epoch - 1) / cfg.vae_epochs
        model.train()
        for rows, part in run.batches(train, steps, X):
            reconstruction, kl = losses(rows, joint, part)
            loss = (reconstruction + beta * kl).sum() / len(rows)
            run.descend(loss, reconstruction.sum(), kl.sum())
        reconstruction, kl = (run.total / len(train)).tolist()
        row = dict(epoch=epoch, reconstruction=reconstruction, kl=kl)
        row |= dict(held_out_reconstruction=None, held_out_kl=None)
        if len(test) and (epoch % 10 == 0 or epoch == cfg.epochs):
            model.eval()
            with torch.no_grad():
                measured = in_batches(partial(losses, joint=joint), test, cfg.batch_size)
            row["held_out_reconstruction"], row["held_out_kl"] = (m.mean().item() for m in measured)
        run.after_epoch(row, reconstruction=f"{reconstruction:.1f}", kl=f"{kl:.2f}")

    if run.rank:  # the first process writes what all have found
        return
    if label_free:
        log_weight = find_types() if log_weight is None else log_weight
        codes, cell_types = settle_types(
            model, *posteriors(np.arange(cells.n_obs)), log_weight, train, labels
        )
    # Cells will be drawn from the mixture alone, so it must hold the final posteriors exactly.
    fit_mixture()
    save_model(
        model_file,
        model,
        cfg,
        genes=genes,
        cell_types=cell_types,
        held_out=list(cells.obs_names[held_out]),
        held_out_fraction=fraction,
        epoch=cfg.epochs,
        made_from=made_from,
    )
    save_mixture(cfg.weights, model.mu, model.var)
    found_types = cfg.weights / FOUND_FILE
    if label_free:
        table = pd.DataFrame({"barcode": cells.obs_names, "cell_type": np.array(cell_types)[codes]})
        write_whole(found_types, lambda path: table.to_csv(path, index=False))
        print(f"wrote {found_types}: {len(cell_types)} cell types")
    else:  # of an earlier run without labels: no longer what these weights know
        found_types.unlink(missing_ok=True)
    write_losses(cfg.weights / "scGMVAE", run.curve)
    run.finished()
    row = run.curve[-1]
    print(
        f"wrote scGMVAE_model.pt, gmm_mu_c.pt, gmm_var_c.pt and scGMVAE_loss.csv/.png to "
        f"{cfg.weights}: reconstruction {row['reconstruction']:.1f}, KL {row['kl']:.2f} per cell"
    )


if __name__ == "__main__":
    run_script(main, Settings)
