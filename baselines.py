"""What bulk2sc is measured beside: least squares for proportions, three other sources of cells."""

import contextlib
import io
import shutil
import tempfile
from pathlib import Path

import numpy as np
import scipy.optimize
import scipy.sparse as sp
import torch

from data import library_size
from generation import encode_bulks
from models import scDecoder
from runtime.device import pick_device
from runtime.errors import InputError
from runtime.weights import MIXTURE_FILES, load_model

# --------------------------------------------------------------------------------- proportions


def nnls_proportions(bulk, profiles):
    """Proportions (S, K) by non-negative least squares on mean count profiles.

        b_s / Σ_g b_sg  ≈  Σ_k w_sk p_k,   w ≥ 0,   rows of w then scaled to sum to 1

    The usual baseline of deconvolution (Abbas et al., PLoS ONE 2009; among the best bulk methods
    of Avila Cobos et al., Nature Communications 2020).

    bulk (S, G) and profiles (K, G): counts. Profiles keep the natural depth of their cells, so that
    weights are numbers of cells.
    """
    weights = np.stack([scipy.optimize.nnls(profiles.T, b / b.sum())[0] for b in bulk])
    return weights / weights.sum(axis=1, keepdims=True)


def predict_proportions(encoder, bulk, present, profiles):
    """Proportions (S, K) of bulks by each method, all on the same genes.

    Args:
        bulk: counts (S, G). present: mask (G) of the genes that were measured.
        profiles: mean counts of the training cells of each type (K, G).

    Returns:
        dict: method -> array.
    """
    _, _, pi, _ = encode_bulks(encoder, sp.csr_matrix(bulk), present, encoder.mu.device)
    return {
        "bulk2sc": pi.cpu().numpy(),
        "NNLS": nnls_proportions(bulk[:, present], profiles[:, present]),
    }


# --------------------------------------------------------------------------------------- cells


def draw_cell_type_nb(X, codes, target, rng):
    """Draw cells of independent genes, negative binomial with the moments of their cell type.

        θ = mean² / (variance - mean);   Poisson where the variance is not above the mean

    These are the marginals of scDesign2 (Sun et al., Genome Biology 2021) without its copula, and
    fitted by moments. Library sizes are whatever the genes add up to.

    Args:
        X: training counts (N x G), CSR. codes: their types (N). target: types of the cells to
            draw (M). rng: numpy Generator.

    Returns:
        CSR int32 (M x G).
    """
    drawn = np.zeros((len(target), X.shape[1]), dtype=np.int32)
    for k in np.unique(target):
        train = X[np.flatnonzero(codes == k)].toarray().astype(np.float64)
        rows = np.flatnonzero(target == k)
        if len(train):
            mean = train.mean(axis=0)
            overdispersion = train.var(axis=0) - mean
            theta = np.clip(mean**2 / np.maximum(overdispersion, 1e-12), 1e-6, 1e6)
            rate = rng.gamma(theta, np.maximum(mean, 1e-12) / theta, (len(rows), len(mean)))
            drawn[rows] = rng.poisson(rate)
    return sp.csr_matrix(drawn)


def train_published(cfg, weights, decoder_card):
    """Train scDecoder by the published recipe, on the same mixture and split.

    z is drawn from its type's Gaussian rather than paired with its cell, and the loss is MSE + L1
    (bulk2sc as published: Cho et al., bioRxiv 2024, doi:10.1101/2024.05.18.594837).

    Args:
        cfg: settings of the evaluation. weights: folder of the mixture. decoder_card: of the
            decoder that it is measured beside.

    Returns:
        scDecoder in eval mode.

    Raises:
        InputError: the mixture was trained on another split than the decoder.
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


class ScVI:
    """scVI (Lopez et al., Nature Methods 2018): 10 latent dimensions, 400 epochs.

    Args:
        cells: AnnData of training counts (N x G). codes: their types (N). seed: of training and
            draws.
    """

    def __init__(self, cells, codes, seed):
        import scvi  # optional

        scvi.settings.seed = seed
        cells = cells.copy()
        cells.X = cells.X.astype(np.float32)
        scvi.model.SCVI.setup_anndata(cells)
        self.model = scvi.model.SCVI(cells, n_latent=10)
        self.model.train(max_epochs=400, accelerator="cpu", enable_progress_bar=False)
        self.latent = self.model.get_latent_representation()  # (N, D)
        self.library, self.codes = library_size(cells.X), codes
        self.rng = np.random.default_rng(seed)

    def draw(self, target):
        """Draw cells of types ``target`` (M): counts, CSR int32 (M x G).

        z comes from the Gaussian of its type's posterior means, the library size from one of its
        type's training cells.
        """
        z = np.zeros((len(target), self.latent.shape[1]), np.float32)
        library = np.zeros((len(target), 1), np.float32)
        for k in np.unique(target):
            in_type, rows = self.codes == k, target == k
            latent = self.latent[in_type]
            z[rows] = self.rng.normal(
                latent.mean(axis=0), latent.std(axis=0), (rows.sum(), z.shape[1])
            )
            library[rows, 0] = self.rng.choice(self.library[in_type], rows.sum())
        with torch.inference_mode():
            generative = self.model.module.generative(
                torch.from_numpy(z),
                torch.from_numpy(np.log(library)),
                torch.zeros(len(target), 1, dtype=torch.long),
            )
            return sp.csr_matrix(generative["px"].sample().numpy().astype(np.int32))
