"""What the three training loops share: optimiser, epochs, batches, and how a run survives.

A loop reads as any torch loop does, with :class:`TrainingRun` around its steps:

    run = TrainingRun("scDecoder", cfg, model, optimizer, schedule, rng, made_from)
    for epoch in run.epochs():
        for rows, part in run.batches(train, n_batches, X):
            optimizer.zero_grad()
            loss.backward()
            run.all_reduce(loss)
            optimizer.step()
            schedule.step()
        run.end_epoch({"epoch": epoch, "loss": ...})
    run.remove_checkpoint()

Checkpoints are written every ``--checkpoint-every`` seconds and on Ctrl-C or SIGTERM, and
``--resume`` continues from them (:mod:`runtime.checkpoint`). ``torchrun`` trains with several
processes (:mod:`runtime.processes`).
"""

import math
import signal
import time

import numpy as np
import torch
from tqdm import tqdm

from models import Dropout
from readers.backed import BackedCounts
from readers.fingerprint import digest
from runtime.checkpoint import Checkpoint, Progress
from runtime.errors import InputError
from runtime.processes import ProcessGroup
from runtime.signals import SignalHandler, Stopped
from runtime.writing import check_writable

DIVERGED = 1000  # times the first loss; training has gone wrong long before it reads nan
READ_EVERY = 20  # steps on a GPU, which must wait for its queue whenever a loss is read


def two_rate_optimizer(model, fast, settings, n_steps, fused=True):
    """AdamW and a one-cycle schedule in which a few parameters learn at 20 times the rate.

    The ``fast`` parameters are few and must travel far. They have no weight decay, which would
    pull them back.

    Args:
        model: whose parameters to train. fast: some of them. settings: with ``lr`` (peak) and
            ``weight_decay``. n_steps: length of the cycle.
        fused: update all weights in one pass instead of several.

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


class TrainingRun:
    """One training: its epochs and batches, its loss curve, and when to save or stop.

    Attributes:
        progress: epoch, step, sums of losses, loss curve; what the checkpoint keeps.
        group: the processes that train together.
        checkpoint: its file.
    """

    def __init__(self, name, cfg, model, optimizer, schedule, rng, made_from):
        """Start a run, or with ``cfg.resume`` continue the one in the checkpoint.

        Args:
            name: of the model, for file and progress bar. cfg: a TrainingSettings. rng: the NumPy
                generator of the loop. made_from: digest of data and earlier stages.

        Raises:
            InputError: the checkpoint is broken, or of other settings or data.
            OSError: the folder of weights cannot be written to.
        """
        self.name, self.cfg, self.model, self.rng, self.made_from = name, cfg, model, rng, made_from
        self.device = next(model.parameters()).device
        self.group = ProcessGroup(self.device)
        self.progress = Progress(rng_of_epoch=rng.bit_generator.state)
        self.checkpoint = Checkpoint(name, cfg, made_from, model, optimizer, schedule, rng)
        self.resumed, self.signal, self.last_saved = False, None, "none"
        self.read_every = READ_EVERY if self.device.type == "cuda" else 1
        self.pending = []  # losses of the latest steps, not read yet
        if self.group.rank == 0:
            check_writable(cfg.weights)  # rather now than after minutes of training
        path = self.checkpoint.path
        if cfg.resume and path.exists():
            self.progress, self.resumed = self.checkpoint.load(), True
            self.last_saved = f"{path} of {self.position}"
            print(f"{path}: going on at {self.position}")
        elif cfg.resume:
            print(f"{path}: no such checkpoint, so the run starts from the beginning")
        elif path.exists():
            print(
                f"{path}: a checkpoint of an interrupted run, which this run will replace; "
                "--resume would go on with it"
            )

    @property
    def position(self):
        """How far the run is, in words."""
        epoch = min(self.progress.epoch, self.cfg.epochs)
        return f"epoch {epoch} of {self.cfg.epochs}, step {self.progress.step}"

    def epochs(self):
        """The epochs still to do, with a progress bar; signals take effect between steps."""
        first, last = self.progress.epoch, self.cfg.epochs
        self.save_time = time.monotonic()
        hidden = self.group.rank > 0
        self.bar = tqdm(total=last, initial=first - 1, desc=self.name, unit="epoch", disable=hidden)
        SignalHandler.deferred = self.receive_signal
        self.check_processes()
        self.group.broadcast(*self.model.state_dict().values())
        try:
            yield from range(first, last + 1)
        finally:
            self.bar.close()  # so that an error message starts on a line of its own
        if self.group.rank == 0:
            self.save()  # training is done, whatever happens while the results are written
        self.barrier()  # learn of a signal that came after the last step
        self.save_if_due()
        SignalHandler.deferred = None

    def batches(self, rows, n_batches, X):
        """The batches of this epoch that are still to do, in an order drawn for the epoch.

        Args:
            rows: of X (N), the training cells. n_batches: of an epoch. X: counts, CSR or backed;
                of a backed matrix, rows of the same blocks stay together.

        Yields:
            rows of the whole batch (B), and the slice of them that this process computes.
        """
        state = self.rng.bit_generator.state
        if self.progress.step:  # resumed within the epoch, whose order comes from the state then
            self.rng.bit_generator.state = self.progress.rng_of_epoch
        self.progress.rng_of_epoch = self.rng.bit_generator.state
        backed = isinstance(X, BackedCounts)
        order = X.shuffled(rows, self.rng) if backed else self.rng.permutation(rows)
        if self.progress.step:
            self.rng.bit_generator.state = state
        for batch in np.array_split(order, n_batches)[self.progress.step :]:
            yield batch, self.part(len(batch))
            self.progress.step += 1
            self.save_if_due()
        self.read_losses()

    def part(self, n):
        """The slice of a batch of n that this process computes; dropout masks follow it."""
        part = self.group.part(n)
        if self.group.size > 1:
            Dropout.part = (n, part)
        return part

    def all_reduce(self, loss, *sums):
        """Sum gradients and losses over the processes, after ``backward`` and before the step.

        Args:
            loss: scalar tensor, this process's share of the mean over the whole batch. sums: of
                losses over this process's part, scalar tensors; they add up in ``progress.total``.

        Raises:
            InputError: the loss has diverged, so that the step must not be taken. On a GPU a
                diverged loss is noticed up to READ_EVERY steps late, but before anything is saved.
        """
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        losses = torch.stack([value.detach() for value in (loss, *sums)])
        self.pending.append(self.group.all_reduce(losses, gradients))
        if len(self.pending) >= self.read_every:
            self.read_losses()

    def read_losses(self):
        """Check and add up the losses of the steps since the last reading; see any signal.

        All processes do so at the same steps.

        Raises:
            InputError: a loss has diverged.
        """
        for loss, *sums in torch.stack(self.pending).tolist() if self.pending else ():
            self.check_loss(loss)
            if sums:
                self.progress.total = self.progress.total + np.array(sums)
        self.pending = []
        self.signal = self.group.read_signal() or self.signal

    def check_loss(self, loss):
        """Raise InputError if a loss is not finite, or DIVERGED times the first one."""
        if self.progress.first_loss is None:
            self.progress.first_loss = abs(loss)
        if not math.isfinite(loss) or loss > DIVERGED * (self.progress.first_loss + 1):
            self.raise_diverged(f"the loss is {loss:g}")

    def raise_diverged(self, what):
        """Raise the error that says where the run stopped, and what is left of it."""
        self.bar.close()
        raise InputError(
            f"{self.name} diverged at {self.position}: {what}, expected a finite loss of about "
            f"{self.progress.first_loss or 0:.3g} or less; last good checkpoint: "
            f"{self.last_saved}; try a lower --lr than {self.cfg.lr:g}"
        )

    def end_epoch(self, row=None, **postfix):
        """The epoch is done. row: its losses for the curve. postfix: texts for the progress bar."""
        self.read_losses()
        if row is not None:
            self.progress.curve.append(row)
        self.progress.epoch += 1
        self.progress.step, self.progress.total = 0, 0.0
        self.bar.set_postfix(postfix, refresh=False)
        self.bar.update()
        self.save_if_due()

    def receive_signal(self, number):
        """Stop after this step; at the second signal, stop at once."""
        if self.group.size > 1:  # torchrun repeats a Ctrl-C, and ends all processes after 30 s
            self.group.local_signal = number
            return
        if self.signal is not None:
            raise Stopped(number)
        self.signal = number

    def save_if_due(self):
        """Save when it is time; when a signal has come, save and stop. The first process saves.

        Raises:
            Stopped: a signal has come.
        """
        if self.pending:  # not before these losses are known to be sound
            return
        if self.signal is None:
            due = time.monotonic() - self.save_time >= self.cfg.checkpoint_every
            if due and self.group.rank == 0:
                self.save()
            return
        if self.group.rank == 0:
            self.save()
        self.barrier()  # the first process to end makes torchrun end all
        self.bar.close()
        raise Stopped(
            self.signal,
            f"interrupted ({signal.Signals(self.signal).name}) at {self.position}: saved "
            f"{self.checkpoint.path}; the same command with --resume goes on from there",
        )

    def save(self):
        """Write the checkpoint.

        Raises:
            InputError: weights or moments are not finite; the older checkpoint stays.
        """
        if not self.checkpoint.is_finite():
            self.raise_diverged("weights are not finite")
        self.checkpoint.save(self.progress)
        self.save_time = time.monotonic()
        self.last_saved = f"{self.checkpoint.path} of {self.position}"

    def barrier(self):
        """Wait for all processes, and see any signal that one of them received."""
        self.group.barrier()
        self.read_losses()

    def check_processes(self):
        """Raise InputError if the processes found different data or checkpoints."""
        position = (self.progress.epoch, self.progress.step, self.resumed)
        if not self.group.is_same(int(digest(self.made_from, *position)[:15], 16)):
            raise InputError(
                f"{self.checkpoint.path}: the processes found different data or checkpoints, "
                "expected the same; do all see the same folders?"
            )

    def remove_checkpoint(self):
        """Delete the checkpoint: all results are written."""
        self.checkpoint.remove()
