"""Files of weights: saved so that each rebuilds its model alone, checked before they are used."""

import io
import warnings
import zipfile
from pathlib import Path

import torch

from runtime.errors import InputError, is_plain_name, one_line, some
from runtime.script import plain_settings
from runtime.writing import write_whole

FORMAT_VERSION = 2  # 2: scDecoder knows the shape of each type's cloud of cells

MADE_BY = {
    "scGMVAE": "train_gmvae.py",
    "scDecoder": "train_decoder.py",
    "BulkEncoder": "train_encoder.py",
}

MAX_VALUE, MAX_LOG = 1e15, 80  # of a weight, and of one that an exponential is taken of
MIXTURE_FILES = ("gmm_mu_c.pt", "gmm_var_c.pt")


def save_model(path, model, settings, **metadata):
    """Save a model so that the file alone rebuilds it: state, shape, settings and ``metadata``.

    ``metadata`` holds what else it should know: genes, cell_types, held_out (barcodes), epoch.
    Only tensors, numbers, strings, lists and dicts, so ``torch.load(weights_only=True)`` reads it.
    """
    metadata = {
        "format": "bulk2sc",
        "version": FORMAT_VERSION,
        "model": type(model).__name__,
        "config": model.config,
        "state": {name: value.detach().cpu() for name, value in model.state_dict().items()},
        "settings": plain_settings(settings),
        "seed": settings.seed,
        **metadata,
    }
    save_tensors(path, metadata)


def save_tensors(path, content):
    """``torch.save``, whole or not at all.

    Through memory, because torch aborts the process when the disk is full.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))


def load_tensors(path, made_by):
    """``torch.load`` of a file of any origin onto the CPU; one-line errors name it.

    ``weights_only`` runs no code in it. It takes no more memory than it has bytes, because
    compressed records, which torch never writes, are refused.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; {made_by} makes it")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                records = file.infolist()
            size = sum(record.file_size for record in records)
            if size > path.stat().st_size or any(record.compress_type for record in records):
                raise ValueError("compressed records")
        with warnings.catch_warnings():  # what torch thinks of a strange file
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # a broken zip, a foreign pickle, a cut-off record: many kinds
        raise InputError(
            f"{path}: not a readable weights file, expected one by {made_by}"
        ) from error


def is_plain_tensor(value):
    """Whether a value is a dense tensor on the CPU with all of its elements in memory.

    A file may hold views that claim more elements than are stored, or sparse or meta tensors.
    """
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def is_list_of_names(value, length=None):
    """Whether a value is a list (of some length) of texts that every format can hold."""
    return (
        isinstance(value, list)
        and (length is None or len(value) == length)
        and all(isinstance(name, str) and is_plain_name(name) for name in value)
    )


def is_list_of_weights(value, length):
    """Whether a value is a list of some length of numbers ≥ 0 that can be scaled to sum to 1."""
    return (
        isinstance(value, list)
        and len(value) == length
        and all(isinstance(weight, float) and weight >= 0 for weight in value)
        and 0 < sum(value) < float("inf")
    )


def check_metadata(metadata, model_class):
    """Check that what a file says of a model fits together, before anything is built from it.

    The model is first built on the meta device, without memory; what is allocated for it later is
    no more than the file itself holds.

    Raises:
        ValueError, KeyError, TypeError, RuntimeError: it does not; says what.
    """
    config, state = metadata["config"], metadata["state"]
    if not isinstance(config, dict) or not isinstance(state, dict):
        raise ValueError("config or state is no dict")
    for name, value in config.items():
        most = {"n_iterations": 10_000}.get(name, 2**31 - 1)
        if name == "likelihood":  # which the model itself checks
            sound = isinstance(value, str)
        elif name in ("dropout", "momentum"):
            sound = isinstance(value, int | float) and 0 <= value < 1
        else:
            sound = type(value) is int and 1 <= value <= most
        if not sound:
            raise ValueError(f"{name} {value}")
    with torch.device("meta"):
        expected = model_class(**config).state_dict()
    if state.keys() != expected.keys():
        raise ValueError("other names of tensors")
    for name, value in state.items():
        shape_and_dtype = expected[name].shape, expected[name].dtype
        if not is_plain_tensor(value) or (value.shape, value.dtype) != shape_and_dtype:
            raise ValueError(f"tensor {name}")
    names, K = metadata["genes"], config["n_types"]
    check_states(metadata.get("states"), (K, config.get("n_components")))
    check_signature(metadata.get("signature"), K)
    fraction, fit = metadata["held_out_fraction"], metadata.get("fit", {})
    of_types = {  # of the reference; older files have none
        name: metadata.get(name, [1.0] * K) for name in ("composition", "content")
    }
    sound = {
        "genes": is_list_of_names(names, config["n_genes"]) and len(set(names)) == len(names),
        "gene_ids": is_list_of_names(
            metadata.get("gene_ids", names), len(names)
        ),  # older have none
        "cell_types": is_list_of_names(metadata["cell_types"], K)
        and len(set(metadata["cell_types"])) == K,
        "held_out": is_list_of_names(metadata["held_out"]),
        "held_out_fraction": isinstance(fraction, int | float) and 0 <= fraction < 1,
        "settings": isinstance(metadata["settings"], dict),
        **{name: is_list_of_weights(value, K) for name, value in of_types.items()},
        "components": sorted(metadata.get("components", range(K))) == list(range(K)),
        "fit": isinstance(fit, dict)
        and all(
            len(pair) == 2 and all(isinstance(v, float) for v in pair) and pair[1] > 0
            for pair in fit.values()
        )
        and fit.keys() in (set(), {"correlation", "unexplained"}),
    }
    if wrong := [name for name, good in sound.items() if not good]:
        raise ValueError(", ".join(wrong))


def check_signature(signature, n_types):
    """Check the fields of dwls.Signature that a file has, if any.

    Raises:
        ValueError, KeyError, TypeError: they do not fit together.
    """
    if signature is None:
        return
    genes = signature["genes"]
    sound = is_list_of_names(genes) and len(set(genes)) == len(genes) and len(signature) == 3
    for name in ("mean", "change"):
        value = signature[name]
        sound = sound and is_plain_tensor(value) and tuple(value.shape) == (n_types, len(genes))
        sound = sound and value.is_floating_point() and not bool(value.isnan().any())
    if not sound or not bool(((signature["mean"] >= 0) & signature["mean"].isfinite()).all()):
        raise ValueError("signature")


def check_states(states, shape):
    """Check what scDecoder's file says of the reference's samples, if anything.

    shape: ``(K, C)``.

    Raises:
        ValueError, KeyError, TypeError: it does not fit together.
    """
    if states is None:
        return
    S = len(states["samples"])
    if not S or len(states) != 6:
        raise ValueError("states")
    for name in ("samples", "conditions", "batches"):
        if not is_list_of_names(states[name], S):
            raise ValueError(f"states: {name}")
    if not is_list_of_names(states["baseline"]) or len(set(states["samples"])) != S:
        raise ValueError("states: names of samples or of the baseline")
    for name, expected in (("n_cells", (S, shape[0])), ("weight", (S, *shape))):
        value = states[name]
        if not is_plain_tensor(value) or tuple(value.shape) != expected:
            raise ValueError(f"states: {name}")
        if value.dtype != torch.float32 or not ((value >= 0) & (value < MAX_VALUE)).all():
            raise ValueError(f"states: {name} not finite or out of range")
    if not torch.allclose(states["weight"].sum(dim=2), torch.ones(())):
        raise ValueError("states: weights do not sum to 1")


def check_values(model):
    """Check the values of a loaded model: finite, and in the range in which it can be used.

    Raises:
        ValueError: names the tensor.
    """
    state = model.state_dict()
    # Up to MAX_VALUE products of weights stay finite in float32, and up to MAX_LOG exponentials do.
    sound = {name: bool((value.abs() < MAX_VALUE).all()) for name, value in state.items()}
    for name in (n for n in state if n.endswith("log_theta")):
        sound[name] &= bool((state[name].abs() < MAX_LOG).all())
    for name in ("var", "scale"):  # a σ_k² or spread of zero is none
        if name in state:
            sound[name] &= bool((state[name] > 0).all())
    for name in ("signature", "profile", "shape_weight", "shape_sd"):
        if name in state:
            sound[name] &= bool((state[name] >= 0).all())
    if "shape_weight" in state:
        sound["shape_weight"] &= bool((state["shape_weight"].sum(dim=1) > 0).all())
    if "log_library" in state:  # of which no exponential overflows
        sound["log_library"] &= bool((state["log_library"].abs() < 40).all())
    if wrong := [name for name, good in sound.items() if not good]:
        raise ValueError(", ".join(wrong))


def leave_out_states(path, metadata):
    """Take the directions of states out of a Bulk Encoder that version 2 saved; says so."""
    state, config = metadata["state"], metadata["config"]
    if not config.pop("n_state", 0):
        return
    for name in [name for name in state if name.startswith("state_")]:
        del state[name]
    for head in ("mu_head", "var_head"):  # they corrected what the directions gave
        state[f"{head}.weight"], state[f"{head}.bias"] = (
            torch.zeros_like(state[f"{head}.{part}"]) for part in ("weight", "bias")
        )
    print(
        f"{path}: of an earlier version, whose states of samples are no longer read; train again "
        "for states"
    )


def load_model(path, model_class, device="cpu"):
    """Rebuild a saved model in eval mode from a file of any origin.

    Returns:
        ``(model, metadata)``: the module on ``device``, and the rest of the file as a dict.

    Raises:
        InputError: missing, truncated, another kind of file or version, or a state that does not
            fit its own description.
    """
    name = model_class.__name__
    metadata = load_tensors(path, MADE_BY[name])
    if (
        not isinstance(metadata, dict)
        or metadata.get("format") != "bulk2sc"
        or metadata.get("model") != name
    ):
        found = (
            metadata.get("model", "something else")
            if isinstance(metadata, dict)
            else type(metadata).__name__
        )
        raise InputError(f"{path}: found {found}, expected a {name} by {MADE_BY[name]}")
    if metadata.get("version") != FORMAT_VERSION:
        found = metadata.get("version")
        raise InputError(f"{path}: format version {found}, expected {FORMAT_VERSION}")
    try:
        leave_out_states(path, metadata)
        check_metadata(metadata, model_class)
        model = model_class(**metadata["config"])
        model.load_state_dict(metadata.pop("state"))
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path}: its parts do not fit together ({one_line(error)}), expected a whole {name}"
        ) from error
    try:
        check_values(model)
    except ValueError as error:
        raise InputError(
            f"{path}: {error} with values that are not finite or out of range, expected trained "
            "weights"
        ) from error
    return model.to(device).eval(), metadata


def save_mixture(folder, mu, var):
    """Write μ_k and σ_k² in autoCell's layout, 1 x D x K; mu and var are (K, D)."""
    for name, value in zip(MIXTURE_FILES, (mu, var), strict=True):
        layout = value.detach().cpu().T.unsqueeze(0).contiguous()  # (1, D, K)
        save_tensors(Path(folder) / name, layout)


def load_mixture(folder, n_types):
    """Read μ_k and σ_k², from this project or from autoCell: 1 x D x K, or K x D.

    Args:
        folder: with ``gmm_mu_c.pt`` and ``gmm_var_c.pt``. n_types: K of the labels.

    Returns:
        mu, var: (K, D) float32.

    Raises:
        InputError: shapes disagree with each other or with K, or a value is not finite, or a
            variance not positive.
    """
    tensors = []
    for name in MIXTURE_FILES:
        path = Path(folder) / name
        value = load_tensors(path, MADE_BY["scGMVAE"])
        if not is_plain_tensor(value) or not value.is_floating_point():
            raise InputError(f"{path}: expected a tensor of 1 x D x K or K x D numbers")
        shape = tuple(value.shape)
        if value.dim() == 3 and shape[0] == 1:
            value = value[0].T
        if value.dim() != 2 or value.shape[0] != n_types:
            raise InputError(
                f"{path}: found shape {shape}, expected 1 x D x {n_types} or {n_types} x D "
                f"for the {n_types} cell types of the labels"
            )
        tensors.append(value.detach().float().contiguous())
        if not torch.isfinite(tensors[-1]).all():  # nor beyond single precision
            raise InputError(f"{path}: holds values that are not finite")
    mu, var = tensors
    if mu.shape != var.shape:
        raise InputError(f"{folder}: mu is {tuple(mu.shape)}, var is {tuple(var.shape)} (K x D)")
    if not (var > 0).all():
        found = var.min().item()
        raise InputError(f"{path}: found a variance of {found:g}, expected positive ones")
    return mu, var


def check_cell_types(path, metadata, cell_types):
    """Raise InputError unless a model and the labels have the same name-to-code map."""
    known = metadata["cell_types"]
    if known != list(cell_types):
        raise InputError(
            f"{path}: knows {len(known)} cell types ({some(known)}), the "
            f"labels have {len(cell_types)} ({some(cell_types)}); expected weights of this dataset"
        )


def check_mixture(path, model, mu, var, other):
    """Raise InputError unless a model was trained for the mixture mu, var (K, D) of ``other``."""
    same = model.mu.shape == mu.shape
    for a, b in ((model.mu, mu), (model.var, var)):
        # Not to the bit: exp of the same number may differ between machines in the last place.
        same = same and torch.allclose(a.detach().cpu(), b.detach().cpu(), rtol=1e-4)
    if not same:
        raise InputError(
            f"{path}: made for another Gaussian mixture than {other}; expected weights of one "
            "run, so train the later stage again"
        )
