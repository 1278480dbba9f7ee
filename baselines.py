"""What bulk2sc is measured beside: for cells, and for cell types' expression in samples.

Estimators of proportions are in deconvolution.py.
"""

import contextlib
import io
import shutil
import tempfile
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch

from data import library_size
from deconvolution import bayesprism_fixed_point, positive_shares
from models import scDecoder
from runtime.device import pick_device
from runtime.errors import InputError
from runtime.weights import MIXTURE_FILES, load_model

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


# --------------------------------------------------------- expression of cell types in samples


def bayesprism_expression(bulk, states, type_of, in_theta, n_iterations=100):
    """Counts of each cell type in each bulk: the Z of BayesPrism (Chu et al., Nature Cancer 2022).

        Z_smg = x_sg θ_sm φ_mg / Σ_m' θ_sm' φ_m'g

    over cell states m, then summed to cell types; θ of
    :func:`deconvolution.bayesprism_fixed_point`.

    Args:
        bulk: counts or CPM (S, G). states: summed counts of the training cells of each state
            (M, G); states without counts are left out. type_of: cell type of each state (M).
        in_theta: mask of the genes that θ is estimated from (G). n_iterations: of θ.

    Returns:
        (S, K, G) float64, K one more than the last of the types; rows of zeros for a type without
        a state.
    """
    n_types = type_of.max() + 1
    used = states.sum(axis=1) > 0
    states, type_of = states[used], type_of[used]
    phi = positive_shares(states)  # (M, G)
    share = phi[:, in_theta].sum(axis=1, keepdims=True)  # (M, 1) of a state's counts in these genes
    theta = bayesprism_fixed_point(bulk[:, in_theta], phi[:, in_theta] / share, n_iterations)
    theta = theta / share.T  # of the counts of all genes, up to a factor that ratio takes back
    ratio = bulk / np.maximum(theta @ phi, 1e-300)  # (S, G)
    Z = np.zeros((len(bulk), n_types, bulk.shape[1]))
    for k in np.unique(type_of):
        Z[:, k] = ratio * (theta[:, type_of == k] @ phi[type_of == k])
    return Z


def one_factor_expression(bulk, measured, shares, profiles):
    """Counts of each cell type in each bulk if every gene changes by one factor in all types.

        x_skg = r_sk p_kg f_sg,   f_sg = b_sg / Σ_k r_sk p_kg

    with the true shares r of the types in the counts, which no method can have for a bulk. One
    count per million is added to p, as a gene that the reference lacks has no factor otherwise.

    Args:
        bulk: b (S, G). measured: mask (G); other genes get 0. shares: r (S, K), positive, rows
            summing to 1. profiles: fractions p of the counts of each type (K, G).

    Returns:
        (S, K, G) float64.
    """
    profiles = profiles + 1e-6
    factor = np.where(measured, bulk, 0.0) / (shares @ profiles)  # (S, G)
    return shares[:, :, None] * profiles * factor[:, None]
