"""Other models, trained on the cells that a bulk2sc model was trained on."""

import contextlib
import io
import shutil
import tempfile
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from data import library_size
from models import scDecoder, scGMVAE
from runtime.device import pick_device
from runtime.errors import InputError
from runtime.weights import MIXTURE_FILES, load_model


def train_published(cfg, weights, metadata):
    """Train scDecoder by the published recipe, on the same mixture and split.

    z is drawn from its type's Gaussian rather than paired with its cell, and the loss is MSE + L1
    (bulk2sc as published: Cho et al., bioRxiv 2024, doi:10.1101/2024.05.18.594837).

    Args:
        cfg: settings of the evaluation. weights: folder of the mixture. metadata: of the
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
            seed=metadata["seed"],
            device=cfg.device,
            held_out=metadata["held_out_fraction"],
            pairing="prior",
            loss="mse_l1",
            n_hidden=700,
            epochs=40,
        )
        with contextlib.redirect_stdout(io.StringIO()):
            train_decoder.main(settings)
        decoder, own = load_model(
            Path(folder) / "scDecoder_model.pt", scDecoder, pick_device(cfg.device)
        )
    if set(own["held_out"]) != set(metadata["held_out"]):
        raise InputError(
            f"{weights}: scDecoder_model.pt and the baseline hold out different cells; expected "
            "scGMVAE_model.pt of the same run beside it"
        )
    return decoder


KEPT_SETTINGS = (  # by a training on other cells
    *("n_genes", "n_latent", "n_hidden", "n_components", "loss", "pairing"),
    *("epochs", "vae_epochs", "batch_size", "lr", "kl_end"),
    *("dropout", "weight_decay"),
)


def train_anew(cfg, weights, simulated, codes, metadata):
    """Train scGMVAE and scDecoder on cells that a trained scDecoder drew (parametric bootstrap).

    The new model has the right form by construction. How much worse its cells are is therefore the
    price of a reference of this size (Efron, The Annals of Statistics 1979).

    Args:
        cfg: settings of the evaluation. weights: folder of the model that drew the cells, whose
            settings and share of held-out cells are used again. simulated: its cells, AnnData
            (N x G). codes: their types (N). metadata: of that model.

    Returns:
        ``(decoder, metadata)``: scDecoder in eval mode, and what its file says.

    Raises:
        InputError: scGMVAE_model.pt is missing, or a file has settings that cannot be used.
    """
    import train_decoder  # run whole, as their scripts would be
    import train_gmvae

    _, gmvae_metadata = load_model(weights / "scGMVAE_model.pt", scGMVAE)
    with tempfile.TemporaryDirectory() as folder:
        names = np.array(metadata["cell_types"])[codes]
        obs = pd.DataFrame({"cell_type": names}, index=simulated.obs_names)
        path = Path(folder) / "simulated.h5ad"
        anndata.AnnData(simulated.X, obs, simulated.var[[]]).write_h5ad(path)
        given = dict(data=str(path), labels="cell_type", weights=Path(folder), device=cfg.device)
        fraction = len(metadata["held_out"]) / len(codes)
        given |= dict(seed=metadata["seed"], held_out=fraction)
        for script, of_file in ((train_gmvae, gmvae_metadata), (train_decoder, metadata)):
            same = {n: v for n, v in of_file["settings"].items() if n in KEPT_SETTINGS}
            try:
                settings = script.Settings(**given, **same)
            except TypeError as error:
                raise InputError(f"{weights}: settings of another version ({error})") from error
            with contextlib.redirect_stdout(io.StringIO()):
                script.main(settings)
        file = Path(folder) / "scDecoder_model.pt"
        return load_model(file, scDecoder, pick_device(cfg.device))


class ScVI:
    """scVI (Lopez et al., Nature Methods 2018): 10 latent dimensions, 400 epochs.

    Args:
        cells: AnnData of training counts (N x G). codes: their types (N). seed: of training and
            draws. device: as ``--device`` takes it.
    """

    def __init__(self, cells, codes, seed, device="auto"):
        import scvi  # optional

        scvi.settings.seed = seed
        cells = cells.copy()
        cells.X = cells.X.astype(np.float32)
        scvi.model.SCVI.setup_anndata(cells)
        self.model = scvi.model.SCVI(cells, n_latent=10)
        accelerator = "gpu" if pick_device(device).type == "cuda" else "cpu"
        self.model.train(max_epochs=400, accelerator=accelerator, enable_progress_bar=False)
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
        batch = torch.zeros(len(target), 1, dtype=torch.long)
        given = torch.from_numpy(z), torch.from_numpy(np.log(library)), batch
        with torch.inference_mode():
            px = self.model.module.generative(*(x.to(self.model.device) for x in given))["px"]
            return sp.csr_matrix(px.sample().cpu().numpy().astype(np.int32))
