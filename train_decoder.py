"""Stage 2: scDecoder (genVAE in the paper), from the mixture's latent to counts of every gene.

    python train_decoder.py
    python train_decoder.py --pairing prior --loss mse_l1      # the published recipe

Reads gmm_mu_c.pt, gmm_var_c.pt and scGMVAE_model.pt from --weights; with the two mixture files
alone (from autoCell, say) it pairs by prior. Writes scDecoder_model.pt and the loss curves there.

    python train_decoder.py --components "T cells" "B cells" "NK cells"   # of foreign mixture files
"""

import sys
from dataclasses import dataclass

import numpy as np
import torch

from data import (
    TrainingSettings,
    align_genes,
    choose_held_out,
    choose_marker_genes,
    codes_of,
    library_size,
    load_cells,
    mean_counts,
)
from models import LIKELIHOODS, encode_cells, mean_profile, scDecoder, scGMVAE
from plotting import write_losses
from readers.backed import sample_in_memory
from readers.fingerprint import digest
from runtime.checkpoint import already_finished
from runtime.device import in_batches, pick_device, seed_everything, to_dense
from runtime.errors import InputError, some
from runtime.processes import several
from runtime.script import run_script
from runtime.weights import check_cell_types, check_mixture, load_mixture, load_model, save_model
from training import Run, two_rate_optimizer


@dataclass
class Settings(TrainingSettings):
    epochs: int = 160
    """Passes over the training cells."""
    batch_size: int = 32
    """Cells per step; small, because a small reference gives few steps."""
    lr: float = 1e-3
    """Peak learning rate of a one-cycle schedule (published: 5e-3, constant)."""
    n_hidden: int = 128
    """h of the shape D -> h/2 -> h -> G. With the published 700, each gene has more weights than a
    small reference has cells, and takes the noise of the training cells for structure."""
    pairing: str = "auto"
    """Where a training cell's z comes from. posterior: q(z|x) of that very cell; prior: its cell
    type's N(mu_k, sigma_k^2), as published, which leaves no variation within a type; auto:
    posterior if scGMVAE_model.pt is there, else prior."""
    loss: str = "nb"
    """nb or zinb (negative log-likelihood of the counts), or mse_l1 (published)."""
    components: tuple[str, ...] = ()
    """Cell type of each component of mixture files that come without scGMVAE_model.pt, in their
    order. Default: the cell types in natural order."""
    n_components: int = 12
    """Gaussians that z of one cell type is drawn from, together of mean mu_k and variance
    sigma_k^2. With 1, as published, rarer kinds of cells inside a type are lost."""
    dropout: float = 0.2
    """In the hidden layers; not used by mse_l1."""
    weight_decay: float = 0.05
    """AdamW's, on the network only, not on the dispersions."""

    def __post_init__(self):
        super().__post_init__()
        if self.pairing not in ("auto", "posterior", "prior"):
            raise InputError(f"--pairing: found {self.pairing}, expected auto, posterior or prior")
        if self.loss not in LIKELIHOODS:
            raise InputError(f"--loss: found {self.loss}, expected {', '.join(LIKELIHOODS)}")
        if self.n_hidden < 2:
            raise InputError(f"--n-hidden: found {self.n_hidden}, expected 2 or more")
        if self.n_components < 1:
            raise InputError(f"--n-components: found {self.n_components}, expected 1 or more")


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
    X = cells[:, genes].X
    share = torch.from_numpy(mean_counts(X, codes, codes.max() + 1))
    return torch.log1p(1e4 * share / share.sum(dim=1, keepdim=True).clamp(min=1e-9))


def check_components(mu, var, order, profile, cell_types):
    """Say how well the mixture's geometry is that of the cell types; warn if another order fits.

    Types with like expression lie near each other in any latent worth its name, so distances
    between the μ_k should follow distances between the types' profiles: their Pearson correlation
    over all pairs, as ordered, and in the best order that a quadratic assignment finds. Three types
    or fewer have too few distances to tell.

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

    own = agreement(order)
    orders = [search(seed) for seed in range(20)]
    best = max(orders, key=agreement)
    print(f"distances between components follow those between cell types: correlation {own:.2f}")
    if agreement(best) > own + 0.2:
        names = [cell_types[i] for i in np.argsort(best)]
        print(
            f"warning: in another order of the components it is {agreement(best):.2f}: "
            f"--components {' '.join(repr(name) for name in names)}",
            file=sys.stderr,
        )


@several
def main(cfg):
    rng = seed_everything(cfg.seed)
    device = pick_device(cfg.device)
    cells = load_cells(cfg)
    codes, cell_types = codes_of(cells)
    genes = list(cells.var_names)
    mu, var = load_mixture(cfg.weights, len(cell_types))  # (K, D) each
    gmvae_file = cfg.weights / "scGMVAE_model.pt"
    gmvae, card, order = None, None, list(range(len(cell_types)))
    if cfg.pairing == "posterior" or gmvae_file.exists():
        gmvae, card = load_model(gmvae_file, scGMVAE, device)
        check_cell_types(gmvae_file, card, cell_types)
        check_mixture(gmvae_file, gmvae, mu, var, "gmm_mu_c.pt and gmm_var_c.pt")
    held_out, fraction = choose_held_out(cells, codes, cfg, card, gmvae_file)
    train, test = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    posterior = gmvae is not None and cfg.pairing != "prior"
    print(
        f"{len(train):,} training cells, {len(test):,} held out, {len(genes):,} genes; "
        f"z from {'the posterior of each cell' if posterior else 'the prior of its cell type'}"
    )
    if gmvae is None:
        order = order_components(cfg.components, cell_types)
        names = "; ".join(f"{k} = {cell_types[i]}" for k, i in enumerate(np.argsort(order)))
        print(f"mixture files without scGMVAE_model.pt, components taken as cell types: {names}")
        own, at = sample_in_memory(cells[train], codes[train], rng, "marker genes")
        check_components(mu, var, order, type_profiles(own, codes[train][at]), cell_types)
        mu, var = mu[order], var[order]
    elif cfg.components:
        raise InputError(
            f"--components: {gmvae_file} says which component is which cell type; expected none"
        )

    made_from = digest(
        *(cells.X, list(cells.obs_names), genes, codes, cell_types, held_out, mu, var),
        gmvae.state_dict() if posterior else "prior",
    )
    model_file = cfg.weights / "scDecoder_model.pt"
    if already_finished(cfg, model_file, scDecoder, made_from):
        return

    # Mean and variance that each cell's z is drawn from, (N, D).
    codes = torch.as_tensor(codes)
    z_mean, z_var = mu[codes], var[codes]
    if posterior:
        X, _ = align_genes(cells.X, genes, card["genes"], cfg.data)
        z_mean, z_var = (part.cpu() for part in encode_cells(gmvae, X, cfg.batch_size))

    model = scDecoder(
        mu.shape[1],
        cfg.n_hidden,
        len(genes),
        len(cell_types),
        cfg.loss,
        cfg.dropout,
        n_components=cfg.n_components if posterior else 1,
    ).to(device)
    # Close to Poisson, as most genes are: from 1 the dispersions of rare genes, whose gradient is
    # small, never get there, and cells come out with too few genes detected.
    model.start_at(mean_profile(cells.X, train).to(device), theta=10.0)
    model.mu.copy_(mu)
    model.var.copy_(var)
    library = torch.as_tensor(library_size(cells.X))  # (N,)
    model.fit_library(library[train], codes[train])
    if posterior:
        model.fit_shape(z_mean[train], z_var[train], codes[train], cfg.seed)

    fast = [] if cfg.loss == "mse_l1" else [model.log_theta]  # the regression has none
    steps = -(-len(train) // cfg.batch_size)
    optimizer, schedule = two_rate_optimizer(model, fast, cfg, cfg.epochs * steps)

    def losses(rows, part=slice(None)):
        """Reconstruction loss of a part of a batch of cells (B',), z drawn afresh for all (B)."""
        noise = torch.randn(len(rows), z_mean.shape[1])[part]  # (B', D)
        rows = rows[part]
        x = to_dense(cells.X, rows, device)  # (B', G)
        z = z_mean[rows] + z_var[rows].sqrt() * noise  # (B', D)
        return model.loss(x, z.to(device), x.sum(dim=1))

    run = Run("scDecoder", cfg, model, optimizer, schedule, rng, made_from)
    for epoch in run.epochs():
        model.train()
        for rows, part in run.batches(train, steps, cells.X):
            loss = losses(rows, part)
            run.descend(loss.sum() / len(rows), loss.sum())
        [reconstruction] = (run.total / len(train)).tolist()
        row = dict(epoch=epoch, reconstruction=reconstruction, held_out_reconstruction=None)
        if len(test) and (epoch % 10 == 0 or epoch == cfg.epochs):
            model.eval()
            with torch.no_grad():
                [test_losses] = in_batches(lambda rows: [losses(rows)], test, cfg.batch_size)
            row["held_out_reconstruction"] = test_losses.mean().item()
        run.after_epoch(row, reconstruction=f"{reconstruction:.1f}")

    if run.rank:  # the first process writes what all have found
        return
    model.eval()
    if posterior:
        model.fit_types(cells[train].X, codes[train], seed=cfg.seed)
    save_model(
        model_file,
        model,
        cfg,
        genes=genes,
        gene_ids=list(cells.var["gene_ids"]),  # by which bulks may name them
        cell_types=cell_types,
        held_out=list(cells.obs_names[held_out]),
        held_out_fraction=fraction,
        pairing="posterior" if posterior else "prior",
        components=order,  # which component of the mixture files each type is
        epoch=cfg.epochs,
        made_from=made_from,
    )
    write_losses(cfg.weights / "scDecoder", run.curve)
    run.finished()
    row = run.curve[-1]
    print(
        f"wrote scDecoder_model.pt and scDecoder_loss.csv/.png to {cfg.weights}: "
        f"reconstruction {row['reconstruction']:.1f} per cell"
    )


if __name__ == "__main__":
    run_script(main, Settings)
