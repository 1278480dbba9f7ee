"""Stage 1: scGMVAE, a count VAE whose prior is a Gaussian mixture with one component per cell type.

Takes the place of autoCell (Xu et al., Cell Reports Methods 2023). Three phases, as there:
a plain VAE, a fit of the mixture to its latent, then both together.

    python train_gmvae.py
    python train_gmvae.py --data filtered_feature_bc_matrix --labels barcode_to_celltype.csv

Writes gmm_mu_c.pt, gmm_var_c.pt (1 x D x K), scGMVAE_model.pt and the loss curves to --weights.
"""

from dataclasses import dataclass

import numpy as np
import torch
from tqdm import trange

from data import (
    InputError,
    TrainingSettings,
    align_genes,
    choose_genes,
    choose_held_out,
    codes_of,
    load_cells,
    run_script,
)
from models import (
    mean_profile,
    pick_device,
    save_mixture,
    save_model,
    scGMVAE,
    seed_everything,
    to_dense,
    two_rate_optimizer,
)
from plotting import write_losses


@dataclass
class Settings(TrainingSettings):
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
        if self.n_latent < 1 or self.n_hidden < 1:
            raise InputError("--n-latent, --n-hidden: expected 1 or more")
        if min(self.kl_start, self.kl_end) < 0:
            raise InputError("--kl-start, --kl-end: expected 0 or more")
        if not 0 < self.thin <= 1:
            raise InputError(f"--thin: found {self.thin}, expected more than 0, at most 1")
        if not 0 <= self.vae_epochs <= self.epochs:
            found = f"{self.vae_epochs} of {self.epochs}"
            raise InputError(f"--vae-epochs: found {found} epochs, expected 0 to --epochs")


def main(cfg):
    rng = seed_everything(cfg.seed)
    device = pick_device(cfg.device)
    cells = load_cells(cfg)
    codes, cell_types = codes_of(cells)
    held_out, fraction = choose_held_out(cells, codes, cfg)
    genes = choose_genes(cells[~held_out], cfg.n_genes)
    X, _ = align_genes(cells.X, cells.var_names, genes, cfg.data)
    train, test = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    print(f"{len(train):,} training cells, {len(test):,} held out, {len(genes):,} genes")

    model = scGMVAE(
        len(genes), len(cell_types), cfg.n_latent, cfg.n_hidden, cfg.loss, cfg.dropout
    ).to(device)
    model.decoder.start_at(mean_profile(X[train]).to(device))
    # Mixture and dispersions lag behind the network at its own rate, and then cells drawn from the
    # prior come out worse than cells drawn from posteriors.
    fast = [model.mu, model.log_var, model.decoder.log_theta]
    steps = -(-len(train) // cfg.batch_size)
    optimizer, schedule = two_rate_optimizer(model, fast, cfg, cfg.epochs * steps, fused=False)

    def losses(rows, joint):
        """Reconstruction and KL of cells, each (B,); once joint, the prior is the cell's type."""
        x = to_dense(X, rows, device)  # (B, G)
        k = torch.as_tensor(codes[rows], device=device) if joint else None  # (B,)
        seen = x
        if model.training and cfg.thin < 1:
            share = cfg.thin + (1 - cfg.thin) * torch.rand(len(rows), 1, device=device)
            seen = torch.binomial(x, share.expand_as(x))
        mean, var = model.encode(seen)  # (B, D)
        z = mean + var.sqrt() * torch.randn_like(mean)
        return model.decoder.loss(x, z, x.sum(dim=1)), model.kl(mean, var, k)

    @torch.no_grad()
    def over_cells(function, rows):
        """Apply a function that returns two tensors to all cells, in batches, in eval mode."""
        model.eval()
        parts = [function(r) for r in np.array_split(rows, -(-len(rows) // cfg.batch_size))]
        return [torch.cat(p) for p in zip(*parts, strict=True)]

    def fit_mixture():
        mean, var = over_cells(lambda rows: model.encode(to_dense(X, rows, device)), train)
        model.fit_mixture(mean, var, torch.as_tensor(codes[train], device=device))

    curve = []
    for epoch in (bar := trange(1, cfg.epochs + 1, desc="scGMVAE", unit="epoch")):
        joint = epoch > cfg.vae_epochs
        if epoch == cfg.vae_epochs + 1:
            fit_mixture()
        # Warm-up: at full weight from the start the KL empties the latent before it is of use.
        beta = cfg.kl_end
        if not joint:
            beta = cfg.kl_start + (cfg.kl_end - cfg.kl_start) * (epoch - 1) / cfg.vae_epochs
        model.train()
        total = np.zeros(2)
        for rows in np.array_split(rng.permutation(train), steps):
            reconstruction, kl = losses(rows, joint)
            loss = (reconstruction + beta * kl).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += reconstruction.sum().item(), kl.sum().item()
        row = dict(
            zip(("epoch", "reconstruction", "kl"), (epoch, *total / len(train)), strict=True)
        )
        row |= dict(held_out_reconstruction=None, held_out_kl=None)
        if len(test) and (epoch % 10 == 0 or epoch == cfg.epochs):
            measured = over_cells(lambda rows, joint=joint: losses(rows, joint), test)
            row["held_out_reconstruction"], row["held_out_kl"] = (m.mean().item() for m in measured)
        curve.append(row)
        bar.set_postfix(reconstruction=f"{row['reconstruction']:.1f}", kl=f"{row['kl']:.2f}")

    # Cells will be drawn from the mixture alone, so it must hold the final posteriors exactly.
    fit_mixture()
    save_model(
        cfg.weights / "scGMVAE_model.pt",
        model,
        cfg,
        genes=genes,
        cell_types=cell_types,
        held_out=list(cells.obs_names[held_out]),
        held_out_fraction=fraction,
        epoch=cfg.epochs,
    )
    save_mixture(cfg.weights, model.mu, model.var)
    write_losses(cfg.weights / "scGMVAE", curve)
    print(
        f"wrote scGMVAE_model.pt, gmm_mu_c.pt, gmm_var_c.pt and scGMVAE_loss.csv/.png to "
        f"{cfg.weights}: reconstruction {row['reconstruction']:.1f}, KL {row['kl']:.2f} per cell"
    )


if __name__ == "__main__":
    run_script(main, Settings)
