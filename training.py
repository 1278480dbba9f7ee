"""What the three trainings share: the optimiser, and how a run survives what can happen to it.

A :class:`Run` writes a checkpoint every ``--checkpoint-every`` seconds, and when it is stopped by
Ctrl-C or SIGTERM; ``--resume`` goes on from it. On CPU, with the same number of threads, the end is
the same to the bit as that of a run never stopped.

Several processes train one model when ``torchrun`` starts them:

    torchrun --standalone --nproc-per-node 2 train_gmvae.py

``--batch-size`` stays that of all together. Each process takes its part of every batch; they add up
their gradients, by NCCL on GPUs (one each) and by Gloo on CPUs, and each takes the same step.
Random numbers are drawn for the whole batch by every process, so that loss curve and weights are
those of one process, but for rounding. The first process alone prints and writes. All must see the
same data and the same folder of weights.
"""

import math
import signal
import time

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from models import Dropout
from readers.backed import BackedCounts
from readers.fingerprint import digest
from runtime.checkpoint import CHECKPOINT_VERSION, alike, differing_setting
from runtime.errors import InputError
from runtime.processes import among_all
from runtime.script import plain_settings
from runtime.signals import Interruption, Stopped
from runtime.weights import load_tensors, save_tensors
from runtime.writing import check_writable

DIVERGED = 1000  # times the first loss; training has gone wrong long before it reads nan
LOOK_EVERY = 20  # steps on a GPU, which stands still whenever the loss is looked at


# ------------------------------------------------------------------------- several processes


# -------------------------------------------------------------------------------- one training


def two_rate_optimizer(model, fast, settings, n_steps, fused=True):
    """AdamW and a one-cycle schedule in which a few parameters learn at 20 times the rate.

    ``fast`` parameters are few and must travel far; weight decay, which would pull them back, is
    for the others alone.

    Args:
        model: whose parameters to train. fast: some of them. settings: with ``lr`` (peak) and
            ``weight_decay``. n_steps: length of the cycle.
        fused: one pass over all weights of a step in place of several.

    Returns:
        ``(optimizer, schedule)``.
    """
    slow = [p for p in model.parameters() if all(p is not f for f in fast)]
    groups = [
        {"params": slow, "lr": settings.lr, "weight_decay": settings.weight_decay},
        {"params": fast, "lr": 20 * settings.lr, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], fused=fused)
    # One step more than is taken: the last rate of the cycle is next to nothing.
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [g["lr"] for g in optimizer.param_groups], total_steps=n_steps + 1
    )
    return optimizer, schedule


class Run:
    """One training: where it is, its loss curve, and its checkpoint file.

    The loop asks it for the epochs still to do (:meth:`epochs`) and for an epoch's batches
    (:meth:`batches`), lets it take each step (:meth:`descend`), and tells it of each epoch that is
    done.

    Attributes:
        rank, size: which of how many processes this is, from 0; 0 of 1 without ``torchrun``.
        epoch: the one under way, from 1. step: how many of its steps are done.
        total: sums of losses over these steps, as :meth:`descend` was given them.
        curve: a dict of losses for each epoch. kept: further tensors that the loop needs again.
        resumed: whether all this came from a checkpoint.
    """

    def __init__(self, name, cfg, model, optimizer, schedule, rng, made_from):
        """Start a run, or with ``cfg.resume`` go on with the one in the checkpoint.

        Args:
            name: of the model, for file and progress bar. cfg: a TrainingSettings. rng: the numpy
                generator of the loop. made_from: :func:`digest` of data and earlier stages.

        Raises:
            InputError: the checkpoint is broken, or of other settings or data.
            OSError: the folder of weights cannot be written to.
        """
        self.name, self.cfg, self.made_from = name, cfg, made_from
        self.model, self.optimizer, self.schedule, self.rng = model, optimizer, schedule, rng
        self.device = next(model.parameters()).device
        self.path = cfg.weights / f"{name}_checkpoint.pt"
        self.epoch, self.step, self.total, self.curve, self.kept = 1, 0, 0.0, [], {}
        self.first_loss = None
        self.rng_of_epoch = rng.bit_generator.state  # before the order of its cells was drawn
        self.resumed, self.signal, self.saved_at = False, None, "none"
        together = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        self.noted = None  # a signal that came to this process; self.signal: that all know of
        self.came = None  # counts of signals in all processes, not looked at yet
        self.late = self.device.type == "cuda"
        self.unseen = []  # loss and sums of the steps since the last look
        if self.rank == 0:
            check_writable(cfg.weights)  # not after minutes of training
        if cfg.resume and self.path.exists():
            self.restore()
        elif cfg.resume:
            print(f"{self.path}: no such checkpoint, so the run starts from the beginning")
        elif self.path.exists():
            print(
                f"{self.path}: a checkpoint of an interrupted run, which this run will replace; "
                "--resume would go on with it"
            )

    @property
    def where(self):
        """Where the run is, in words."""
        return f"epoch {min(self.epoch, self.cfg.epochs)} of {self.cfg.epochs}, step {self.step}"

    def epochs(self):
        """The epochs still to do, with a progress bar; signals are heeded between steps."""
        first, last = self.epoch, self.cfg.epochs
        self.last_save = time.monotonic()
        self.bar = tqdm(
            total=last, initial=first - 1, desc=self.name, unit="epoch", disable=self.rank > 0
        )
        Interruption.later = self.note_signal
        self.check_alike()
        self.take_from_first(*self.model.state_dict().values())
        yield from range(first, last + 1)
        self.bar.close()
        if self.rank == 0:
            self.save()  # whatever happens while the results are written, training is done
        self.wait_for_all()  # and hear of a signal that came after the last step
        self.save_if_due()
        Interruption.later = None

    def batches(self, rows, n, X):
        """The n batches of an epoch that are still to do, of rows in an order drawn anew.

        X: the matrix whose rows they are; of a backed one, neighbours in the file stay near.

        Yields:
            rows of the whole batch (B), and the slice of them that is this process's part.
        """
        at_step = self.rng.bit_generator.state
        if self.step:  # resumed within the epoch: its order comes from the state before it
            self.rng.bit_generator.state = self.rng_of_epoch
        self.rng_of_epoch = self.rng.bit_generator.state
        backed = isinstance(X, BackedCounts)
        order = X.shuffled(rows, self.rng) if backed else self.rng.permutation(rows)
        if self.step:
            self.rng.bit_generator.state = at_step
        for batch in np.array_split(order, n)[self.step :]:
            yield batch, self.part(len(batch))
            self.step += 1
            self.save_if_due()
        self.look()

    def part(self, n):
        """The slice of a batch of n that is this process's; empty if there are more of them."""
        part = slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)
        if self.size > 1:
            Dropout.part = (n, part)
        return part

    def descend(self, loss, *sums):
        """Take one step of the optimiser.

        Args:
            loss: scalar tensor; this process's share of the mean over the whole batch, so that the
                shares add up to it. sums: of losses over this process's part, scalar tensors, for
                :attr:`total`.

        Raises:
            InputError: the loss shows that training has gone wrong; the step is not taken.
        """
        self.optimizer.zero_grad()
        loss.backward()
        # Not by DistributedDataParallel, which takes a mean over processes where parts of a batch
        # differ in size, wants all of a loss in one forward(), and would add a sum of its own to
        # those of the losses and signals. These networks are small: one sum of all is fastest.
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        seen = self.add_up(torch.stack([v.detach() for v in (loss, *sums)]), gradients)
        if not self.late:
            self.check(seen[0])
        self.optimizer.step()
        self.schedule.step()
        self.unseen.append(seen)
        if not self.late or len(self.unseen) == LOOK_EVERY:
            self.look()

    def look(self):
        """Take in the losses and signals since the last look; on a GPU, losses are checked here.

        A step that should not have been taken is found late there, but before anything is saved.
        All processes look at the same steps.

        Raises:
            InputError: a loss shows that training has gone wrong.
        """
        for seen in torch.stack(self.unseen).cpu() if self.unseen else ():
            if self.late:
                self.check(seen[0])
            if len(seen) > 1:
                self.total = self.total + np.array(seen[1:].tolist())
        self.unseen = []
        if self.came is not None and self.came[1:].any():
            self.signal = int(self.came[1:].argmax()) + 1
        self.came = None

    def add_up(self, values, gradients=()):
        """Sum over all processes; also tells all of a signal that came to one of them.

        Args:
            values: (n,) float32. gradients: tensors of any shape, summed in place.

        Returns:
            (n,) sums; with one process, the values as they are.
        """
        if self.size == 1:
            return values
        came = torch.zeros(signal.NSIG, device=self.device)  # a count for each kind of signal
        came[self.noted or 0] = 1.0
        parts = [*(g.flatten() for g in gradients), values, came]
        every = torch.cat(parts)
        among_all(dist.all_reduce, every)
        *found, values, came = every.split([part.numel() for part in parts])
        for gradient, total in zip(gradients, found, strict=True):
            gradient.copy_(total.view_as(gradient))
        self.came = came if self.came is None else self.came + came
        return values

    def wait_for_all(self):
        """Go on when all processes have come this far."""
        self.add_up(torch.zeros(0, device=self.device))
        self.look()

    def take_from_first(self, *tensors):
        """Overwrite tensors, in place, with what they are in the first process.

        Processors may round differently, and what each process computes alone would drift apart.
        """
        if self.size == 1:
            return
        for tensor in tensors:
            found = tensor.to(self.device)
            among_all(dist.broadcast, found, 0)
            tensor.copy_(found)

    def check_alike(self):
        """See that all processes are to train the same thing from the same place.

        Raises:
            InputError: they found other data or checkpoints than each other.
        """
        if self.size == 1:
            return
        code = int(digest(self.made_from, self.epoch, self.step, self.resumed)[:15], 16)
        own = torch.tensor([code], device=self.device)  # int64
        first = own.clone()
        self.take_from_first(first)
        if self.add_up((own != first).float()).item():
            raise InputError(
                f"{self.path}: the processes found different data or checkpoints, expected the "
                "same; do all see the same folders?"
            )

    def check(self, loss):
        """Stop if a loss (a scalar tensor) is not finite, or beyond all measure.

        Raises:
            InputError: it is; says at which step.
        """
        value = loss.item()
        if self.first_loss is None:
            self.first_loss = abs(value)
        if not math.isfinite(value) or value > DIVERGED * (self.first_loss + 1):
            self.diverged(f"the loss is {value:g}")

    def diverged(self, what):
        """Raise the error that says where the run stopped and what is left of it."""
        self.bar.close()
        raise InputError(
            f"{self.name} diverged at {self.where}: {what}, expected a finite loss of about "
            f"{self.first_loss or 0:.3g} or less; last good checkpoint: {self.saved_at}; "
            f"try a lower --lr than {self.cfg.lr:g}"
        )

    def after_epoch(self, row=None, **shown):
        """The epoch is done; row: its losses for the curve; shown: texts for the bar."""
        self.look()
        if row is not None:
            self.curve.append(row)
        self.epoch, self.step, self.total = self.epoch + 1, 0, 0.0
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        self.save_if_due()

    def note_signal(self, number):
        """Remember to stop after this step; the second time, stop at once."""
        if self.size == 1:
            if self.signal is not None:
                raise Stopped(number)
            self.signal = number
        else:  # torchrun passes on the Ctrl-C that came already, and after 30 s ends all itself
            self.noted = number

    def save_if_due(self):
        """Save when it is time; when a signal has come, save and stop. The first process saves.

        Raises:
            Stopped: a signal has come.
        """
        if self.unseen:  # not before they are known to be sound
            return
        if self.signal is None:
            due = time.monotonic() - self.last_save >= self.cfg.checkpoint_every
            if due and self.rank == 0:
                self.save()
            return
        if self.rank == 0:
            self.save()
        self.wait_for_all()  # the first of them to end makes torchrun end all
        self.bar.close()
        name = signal.Signals(self.signal).name
        raise Stopped(
            self.signal,
            f"interrupted ({name}) at {self.where}: saved {self.path}; the same command with "
            "--resume goes on from there",
        )

    def state(self):
        """All that the rest of the run depends on, in values that weights_only reads."""
        on_gpu = self.device.type == "cuda"
        return {
            "format": "bulk2sc checkpoint",
            "version": CHECKPOINT_VERSION,
            "name": self.name,
            "settings": plain_settings(self.cfg),
            "made_from": self.made_from,
            "epoch": self.epoch,
            "step": self.step,
            "total": torch.as_tensor(self.total, dtype=torch.float64),
            "first_loss": self.first_loss,
            "curve": self.curve,
            "kept": self.kept,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "rng": self.rng.bit_generator.state,
            "rng_of_epoch": self.rng_of_epoch,
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if on_gpu else None,
        }

    def save(self):
        """Write the checkpoint, whole or not at all; never one that holds nan.

        Raises:
            InputError: weights or moments are not finite; the older checkpoint stays.
        """
        state = self.state()
        moments = [m for one in state["optimizer"]["state"].values() for m in one.values()]
        if not all(torch.isfinite(t).all() for t in (*state["model"].values(), *moments)):
            self.diverged("weights are not finite")
        save_tensors(self.path, state)
        self.last_save, self.saved_at = time.monotonic(), f"{self.path} of {self.where}"

    def restore(self):
        """Take everything from the checkpoint, after checking that it is of this run and sound."""
        found = load_tensors(self.path, f"the training of {self.name}")
        if not isinstance(found, dict) or found.get("format") != "bulk2sc checkpoint":
            raise InputError(f"{self.path}: not a checkpoint, expected one of {self.name}")
        for key, own in (("version", CHECKPOINT_VERSION), ("name", self.name)):
            if found.get(key) != own:
                raise InputError(f"{self.path}: found {key} {found.get(key)}, expected {own}")
        theirs, own = found.get("settings"), self.state()
        if not isinstance(theirs, dict) or (other := differing_setting(theirs, own["settings"])):
            other = other if isinstance(theirs, dict) else "no settings"
            raise InputError(
                f"{self.path}: made with {other}; expected the settings of the interrupted run, "
                "or no --resume"
            )
        if found.get("made_from") != self.made_from:
            raise InputError(
                f"{self.path}: made from other cells, labels or earlier weights than these; "
                "expected those of the interrupted run, or no --resume"
            )
        try:
            self.check_parts(found, own)
            self.rng.bit_generator.state = found["rng_of_epoch"]
            self.rng.bit_generator.state = found["rng"]
            torch.set_rng_state(found["torch_rng"])
            if self.device.type == "cuda" and found["cuda_rng"] is not None:
                torch.cuda.set_rng_state(found["cuda_rng"], self.device)
            self.model.load_state_dict(found["model"])
            self.optimizer.load_state_dict(found["optimizer"])
            self.schedule.load_state_dict(found["schedule"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as e:
            raise InputError(
                f"{self.path}: its parts do not fit together, expected a whole checkpoint"
            ) from e
        for key in ("epoch", "step", "curve", "kept", "first_loss", "rng_of_epoch"):
            setattr(self, key, found[key])
        self.total = found["total"].numpy()
        self.resumed, self.saved_at = True, f"{self.path} of {self.where}"
        print(f"{self.path}: going on at {self.where}")

    def check_parts(self, found, own):
        """Raise ValueError unless a checkpoint's parts have the structure of one's own.

        found, own: as :meth:`state` gives them.
        """
        moments = found["optimizer"]["state"]
        # The optimiser numbers parameters by group; those without a gradient yet have no moments.
        ordered = [p for group in self.optimizer.param_groups for p in group["params"]]
        like = {"step": torch.zeros(()), "exp_avg": None, "exp_avg_sq": None}
        sound = (
            found.keys() == own.keys()
            and alike(found["model"], own["model"])
            and alike(found["optimizer"]["param_groups"], own["optimizer"]["param_groups"])
            and alike(found["schedule"], own["schedule"])
            and found["torch_rng"].dtype == torch.uint8
            and all(
                alike(one, like | {"exp_avg": ordered[i], "exp_avg_sq": ordered[i]})
                for i, one in moments.items()
            )
            and type(found["epoch"]) is int
            and 1 <= found["epoch"] <= self.cfg.epochs + 1
            and type(found["step"]) is int
            and found["step"] >= 0
            and found["total"].dtype == torch.float64
            and isinstance(found["first_loss"], float | None)
            and all(isinstance(row, dict) for row in found["curve"])
            and all(isinstance(value, torch.Tensor) for value in found["kept"].values())
        )
        if not sound:
            raise ValueError("parts")

    def finished(self):
        """All results are written: the checkpoint has done its work."""
        self.path.unlink(missing_ok=True)
