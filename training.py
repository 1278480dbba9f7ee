"""What the three training loops share: optimiser, epochs, batches and the sums of their losses.

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
    run.save_results(genes=genes, ...)

Checkpoints are written every ``--checkpoint-every`` seconds and on Ctrl-C or SIGTERM, and
``--resume`` continues from them (:mod:`runtime.resumable`). ``torchrun`` trains with several
processes (:mod:`runtime.processes`).
"""

import math

import numpy as np
import torch
from tqdm import tqdm

from models import Dropout
from plotting import write_losses
from readers.backed import BackedCounts
from runtime.resumable import ResumableRun
from runtime.weights import save_model

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


class TrainingRun(ResumableRun):
    """The epochs, batches and losses of one training."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.read_every = READ_EVERY if self.device.type == "cuda" else 1

    def epochs(self):
        """The epochs still to do, with a progress bar; signals take effect between steps."""
        first, last = self.progress.epoch, self.cfg.epochs
        hidden = self.group.rank > 0
        self.bar = tqdm(total=last, initial=first - 1, desc=self.name, unit="epoch", disable=hidden)
        try:
            self.begin()
            yield from range(first, last + 1)
        finally:
            self.bar.close()  # so that an error message starts on a line of its own
        self.end()

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
        self.update_signal()

    def check_loss(self, loss):
        """Raise InputError if a loss is not finite, or DIVERGED times the first one."""
        if self.progress.first_loss is None:
            self.progress.first_loss = abs(loss)
        if not math.isfinite(loss) or loss > DIVERGED * (self.progress.first_loss + 1):
            self.raise_diverged(f"the loss is {loss:g}")

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

    def save_results(self, **card):
        """Write the model with its ``card`` and the loss curves, then remove the checkpoint.

        card: what the model's file should know besides, see :func:`runtime.weights.save_model`.
        """
        card |= {"epoch": self.cfg.epochs, "made_from": self.made_from}
        path = self.cfg.weights / f"{self.name}_model.pt"
        save_model(path, self.model, self.cfg, **card)
        loss = getattr(self.cfg, "loss", "nb")
        write_losses(self.cfg.weights / self.name, self.progress.curve, loss)
        self.remove_checkpoint()
