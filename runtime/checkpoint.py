"""Checkpoints."""

import math

import torch

from runtime.errors import InputError
from runtime.script import plain_settings
from runtime.weights import load_model

CHECKPOINT_VERSION = 1

# Settings that a resumed run may change: where things are, and how often it saves.
FREE = {"data", "labels", "weights", "device", "resume", "checkpoint_every"}


def differing_setting(found, own):
    """The first setting in which two runs differ, as words, or None. Both: plain settings."""
    for name in own:
        if name not in FREE and found.get(name) != own[name]:
            return f"--{name.replace('_', '-')} {found.get(name)}, now {own[name]}"
    return None


def already_finished(cfg, path, model_class, made_from):
    """Whether ``--resume`` has nothing left to do: the model is there, of the same run, complete.

    made_from: :func:`digest` of what the run starts from.
    """
    stem = path.name.removesuffix("_model.pt")
    if not cfg.resume or not path.exists() or path.with_name(f"{stem}_checkpoint.pt").exists():
        return False
    try:
        _, card = load_model(path, model_class)
    except InputError:
        return False  # to be made again
    same = card.get("made_from") == made_from
    if not same or differing_setting(card["settings"], plain_settings(cfg)):
        return False
    print(f"{path}: of a run with these settings and this data that ended; nothing left to do")
    return True


def alike(found, own):
    """Whether a value from a file has the structure of one's own: keys, types, shapes, finite."""
    if isinstance(own, torch.Tensor):
        return (
            isinstance(found, torch.Tensor)
            and found.shape == own.shape
            and found.dtype == own.dtype
            and found.layout == torch.strided
            and bool(torch.isfinite(found).all())
        )
    if isinstance(own, dict):
        return isinstance(found, dict) and found.keys() == own.keys() and all(
            alike(found[key], own[key]) for key in own
        )  # fmt: skip
    if isinstance(own, list | tuple):
        return type(found) is type(own) and len(found) == len(own) and all(map(alike, found, own))
    if isinstance(own, int | float) and not isinstance(own, bool):
        return isinstance(found, int | float) and math.isfinite(found)
    return type(found) is type(own)
