"""What bulk2sc is measured beside."""

import contextlib
import io
import shutil
import tempfile
from pathlib import Path

import numpy as np
import scipy.optimize
import scipy.sparse as sp
import scipy.stats
import torch

from data import library_size
from generation import encode_bulks
from models import scDecoder
from runtime.device import pick_device
from runtime.errors import InputError
from runtime.weights import MIXTURE_FILES, load_model


def nnls_proportions(bulk, profiles):
    """Proportions by non-negative least squares on mean count profiles, the field's baseline.

    bulk (S, G) and profiles (K, G) are counts of cells of their natural depth, so that weights
    are cell numbers. Returns (S, K), rows summing to 1.
    """
    weights = np.stack([scipy.optimize.nnls(profiles.T, b / b.sum())[0] for b in bulk])
    return weights / weights.sum(axis=1, keepdims=True)


def predict_proportions(encoder, bulk, present, profiles):
    """Proportions (S x K) of bulks (S x G) by each method, all on the genes that are present (G).

    profiles: mean counts of training cells (K x G). Returns a dict: method -> array.
    """
    _, _, pi, _ = encode_bulks(encoder, sp.csr_matrix(bulk), present, encoder.mu.device)
    return {
        "bulk2sc": pi.cpu().numpy(),
        "NNLS": nnls_proportions(bulk[:, present], profiles[:, present]),
    }


def draw_cell_type_nb(X, codes, wanted, rng):
    """Cells of independent genes, negative binomial with the moments of their cell type.

    θ = mean² / (variance - mean), Poisson where the variance is not above the mean. Library size
    is whatever comes of it.

    Args:
        X: training counts (N x G). codes (N). wanted: types of the cells to draw (M).

    Returns:
        CSR int32 (M x G).
    """
    made = np.zeros((len(wanted), X.shape[1]), dtype=np.int32)
    for k in np.unique(wanted):
        own = X[np.flatnonzero(codes == k)].toarray().astype(np.float64)
        rows = np.flatnonzero(wanted == k)
        if len(own):
            mean, extra = own.mean(axis=0), own.var(axis=0) - own.mean(axis=0)
            theta = np.clip(mean**2 / np.maximum(extra, 1e-12), 1e-6, 1e6)
            rate = rng.gamma(theta, np.maximum(mean, 1e-12) / theta, (len(rows), len(mean)))
            made[rows] = rng.poisson(rate)
    return sp.csr_matrix(made)


def train_published(cfg, weights, decoder_card):
    """scDecoder by the published recipe, on the same mixture and split: prior pairing, MSE + L1.

    Returns:
        The decoder, in eval mode.
    """
    import train_decoder  # run whole, as its script would be

    with tempfile.TemporaryDirectory() as folder:
        for name in (*MIXTURE_FILES, "scGMVAE_model.pt"):
            if (weights / name).exists():
                shutil.copy(weights / name, folder)
        settings = train_decoder.Settings(
            data=cfg.data,
            labels=cfg.labels,
            weights=Path(folder),
            seed=decoder_card["seed"],
            device=cfg.device,
            held_out=decoder_card["held_out_fraction"],
            pairing="prior",
            loss="mse_l1",
            n_hidden=700,
            epochs=40,
        )
        with contextlib.redirect_stdout(io.StringIO()):
            train_decoder.main(settings)
        decoder, card = load_model(
            Path(folder) / "scDecoder_model.pt", scDecoder, pick_device(cfg.device)
        )
    if set(card["held_out"]) != set(decoder_card["held_out"]):
        raise InputError(
            f"{weights}: scDecoder_model.pt and the baseline hold out different cells; expected "
            "scGMVAE_model.pt of the same run beside it, or --no-baselines"
        )
    return decoder


def train_scvi(cells, train, codes, seed):
    """scVI (Lopez et al., Nature Methods 2018), 10 latent dimensions, 400 epochs.

    Returns:
        A function: types of the cells to draw (M) -> CSR int32 (M x G), with z from the Gaussian of
        each type's posterior means and library sizes from its training cells.
    """
    import scvi

    scvi.settings.seed = seed
    reference = cells[train].copy()
    reference.X = reference.X.astype(np.float32)
    scvi.model.SCVI.setup_anndata(reference)
    model = scvi.model.SCVI(reference, n_latent=10)
    model.train(max_epochs=400, accelerator="cpu", enable_progress_bar=False)
    latent, library = model.get_latent_representation(), library_size(reference.X)
    own_codes, rng = codes[train], np.random.default_rng(seed)

    def draw(wanted):
        z = np.zeros((len(wanted), latent.shape[1]), np.float32)
        size = np.zeros((len(wanted), 1), np.float32)
        for k in np.unique(wanted):
            own, rows = own_codes == k, wanted == k
            z[rows] = rng.normal(
                latent[own].mean(axis=0), latent[own].std(axis=0), (rows.sum(), z.shape[1])
            )
            size[rows, 0] = rng.choice(library[own], rows.sum())
        with torch.inference_mode():
            out = model.module.generative(
                torch.from_numpy(z),
                torch.from_numpy(np.log(size)),
                torch.zeros(len(wanted), 1, dtype=torch.long),
            )
            return sp.csr_matrix(out["px"].sample().numpy().astype(np.int32))

    return draw
