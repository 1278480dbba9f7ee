"""The checkpoint of a training: written whole, vetted when read, resumed to the bit.

On CPU with the same number of threads, a resumed run ends as one that was never stopped.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from runtime.errors import InputError
from runtime.flags import flag
from runtime.script import plain_settings
from runtime.weights import load_model, load_tensors, save_tensors

CHECKPOINT_VERSION = 2
# What values raise that are not those of a checkpoint.
BROKEN = (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError, AttributeError)
# Settings that a resumed run may change: where things are, and how often it saves.
FREE = {"data", "labels", "samples", "donors", "weights", "device", "resume", "checkpoint_every"}


@dataclass
class Progress:
    """How far a training has come."""

    epoch: int = 1
    """The epoch under way, from 1."""
    step: int = 0
    """Steps of that epoch that are done."""
    total: Any = 0.0
    """Sums of losses over these steps, an array."""
    first_loss: float | None = None
    """Against which later losses are judged."""
    curve: list = field(default_factory=list)
    """A dict of losses for each epoch."""
    kept: dict = field(default_factory=dict)
    """Further tensors that the loop needs again."""
    cells: int = 0
    """Cells in these steps."""
    rng_of_pass: dict = field(default_factory=dict)
    """State of the NumPy generator before it drew the order of the cells in this pass."""
    validation: list = field(default_factory=list)
    """Loss of the validation cells at each epoch that early stopping watches."""


def differing_setting(saved, cfg):
    """The first setting in which a run differs from a saved one, in words, or None.

    saved: plain settings, with names of its time. cfg: a TrainingSettings.
    """
    renamed, gone = (getattr(cfg, name, {}) for name in ("renamed", "gone"))
    saved = gone | {renamed.get(name, name): value for name, value in saved.items()}
    for name, value in (gone | plain_settings(cfg)).items():
        if name not in FREE and saved.get(name) != value:
            return f"{flag(name)} {saved.get(name)}, now {value}"
    return None


def already_finished(cfg, path, model_class, made_from):
    """Whether ``--resume`` has nothing left to do: the model is there, whole, and of this run.

    Args:
        cfg: a TrainingSettings. path: of the model. made_from: digest of what the run starts from.
    """
    stem = path.name.removesuffix("_model.pt")
    if not cfg.resume or not path.exists() or path.with_name(f"{stem}_checkpoint.pt").exists():
        return False
    try:
        _, metadata = load_model(path, model_class)
    except InputError:
        return False  # the run will replace it
    difference = differing_setting(metadata["settings"], cfg)
    if difference is None and metadata.get("made_from") != made_from:
        difference = "other cells, labels, samples or earlier weights"
    if difference:
        print(f"{path}: of a run that ended, with {difference}; trained again")
        return False
    print(f"{path}: of a run with these settings and this data that ended; nothing left to do")
    return True


def same_structure(value, expected):
    """Whether a value from a file is like one expected: keys, types, shapes; and finite."""
    if isinstance(expected, torch.Tensor):
        return (
            isinstance(value, torch.Tensor)
            and value.shape == expected.shape
            and value.dtype == expected.dtype
            and value.layout == torch.strided
            and bool(torch.isfinite(value).all())
        )
    if isinstance(expected, dict):
        same_keys = isinstance(value, dict) and value.keys() == expected.keys()
        return same_keys and all(same_structure(value[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        same_length = type(value) is type(expected) and len(value) == len(expected)
        return same_length and all(map(same_structure, value, expected))
    if isinstance(expected, int | float) and not isinstance(expected, bool):
        return isinstance(value, int | float) and math.isfinite(value)
    return type(value) is type(expected)


class Checkpoint:
    """The checkpoint file of one training, and the objects whose state it holds.

    Attributes:
        path: ``<name>_checkpoint.pt`` in the folder of weights.
    """

    def __init__(self, name, cfg, made_from, model, optimizer, schedule, rng):
        """Args:
        name: of the model. cfg: a TrainingSettings. made_from: digest of data and earlier stages.
        model, optimizer, schedule: of torch. rng: the NumPy generator of the loop.
        """
        self.name, self.cfg, self.made_from = name, cfg, made_from
        self.model, self.optimizer, self.schedule, self.rng = model, optimizer, schedule, rng
        self.device = next(model.parameters()).device
        self.path = cfg.weights / f"{name}_checkpoint.pt"

    def state(self, progress):
        """All that the rest of the run depends on, in values that ``weights_only`` can load."""
        on_gpu = self.device.type == "cuda"
        return {
            "format": "bulk2sc checkpoint",
            "version": CHECKPOINT_VERSION,
            "name": self.name,
            "settings": plain_settings(self.cfg),
            "made_from": self.made_from,
            **vars(progress),
            "total": torch.as_tensor(progress.total, dtype=torch.float64),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "rng": self.rng.bit_generator.state,
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if on_gpu else None,
        }

    def is_finite(self):
        """Whether all weights and moments of the optimiser are."""
        states = self.optimizer.state_dict()["state"].values()
        moments = [moment for state in states for moment in state.values()]
        tensors = (*self.model.state_dict().values(), *moments)
        return all(torch.isfinite(tensor).all() for tensor in tensors)

    def save(self, progress):
        """Write the checkpoint, whole or not at all."""
        save_tensors(self.path, self.state(progress))

    def load(self):
        """Restore model, optimiser, schedule and generators.

        Returns:
            the Progress of the interrupted run.

        Raises:
            InputError: the file is broken, or of a run with other settings or data.
        """
        saved = load_tensors(self.path, f"the training of {self.name}")
        current = self.state(Progress())
        self.check_origin(saved, current)
        try:
            self.check_parts(saved, current)
            self.rng.bit_generator.state = saved["rng_of_pass"]  # raises if it is none
            self.rng.bit_generator.state = saved["rng"]
            torch.set_rng_state(saved["torch_rng"])
            if self.device.type == "cuda" and saved["cuda_rng"] is not None:
                torch.cuda.set_rng_state(saved["cuda_rng"], self.device)
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.schedule.load_state_dict(saved["schedule"])
        except BROKEN as e:
            raise InputError(
                f"{self.path}: its parts do not fit together, expected a whole checkpoint"
            ) from e
        names = [field.name for field in fields(Progress) if field.name != "total"]
        return Progress(total=saved["total"].numpy(), **{name: saved[name] for name in names})

    def check_origin(self, saved, current):
        """Raise InputError unless a file's content is a checkpoint of this very run."""
        if not isinstance(saved, dict) or saved.get("format") != current["format"]:
            raise InputError(f"{self.path}: not a checkpoint, expected one of {self.name}")
        for key in ("version", "name"):
            if saved.get(key) != current[key]:
                raise InputError(
                    f"{self.path}: found {key} {saved.get(key)}, expected {current[key]}"
                )
        settings = saved.get("settings")
        difference = "no settings"
        if isinstance(settings, dict):
            difference = differing_setting(settings, self.cfg)
        if difference:
            raise InputError(
                f"{self.path}: made with {difference}; expected the settings of the interrupted "
                "run, or no --resume"
            )
        if saved.get("made_from") != self.made_from:
            raise InputError(
                f"{self.path}: made from other cells, labels or earlier weights than these; "
                "expected those of the interrupted run, or no --resume"
            )

    def check_parts(self, saved, current):
        """Raise ValueError unless a checkpoint's parts have the structure of the current ones.

        Args:
            saved, current: as :meth:`state` gives them.
        """
        moments = saved["optimizer"]["state"]
        # The optimiser numbers parameters by group; those without a gradient yet have no moments.
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        expected = [{"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p} for p in parameters]
        groups = (each["optimizer"]["param_groups"] for each in (saved, current))
        sound = (
            saved.keys() == current.keys()
            and same_structure(saved["model"], current["model"])
            and same_structure(*groups)
            and same_structure(saved["schedule"], current["schedule"])
            and saved["torch_rng"].dtype == torch.uint8
            and all(same_structure(moment, expected[i]) for i, moment in moments.items())
            and type(saved["epoch"]) is int
            and saved["epoch"] >= 1
            and all(type(saved[n]) is int and saved[n] >= 0 for n in ("step", "cells"))
            and all(isinstance(loss, float) for loss in saved["validation"])
            and saved["total"].dtype == torch.float64
            and isinstance(saved["first_loss"], float | None)
            and all(isinstance(row, dict) for row in saved["curve"])
            and all(isinstance(value, torch.Tensor) for value in saved["kept"].values())
        )
        if not sound:
            raise ValueError("parts")

    def remove(self):
        """Delete the file: all results are written."""
        self.path.unlink(missing_ok=True)
