"""What the three training loops share: budget of steps, optimiser, batches, sums of their losses.

A loop reads as any torch loop does, with :class:`TrainingRun` around its steps:

    run = TrainingRun("scDecoder", cfg, plan, model, optimizer, schedule, rng, made_from)
    for epoch in run.epochs():
        for rows, part in run.batches(train, X):
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
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from data import split_cells
from models import Dropout
from plots.training import write_losses
from readers.backed import BackedCounts
from runtime.resumable import ResumableRun
from runtime.weights import save_model

DIVERGED = 1000  # times the first loss; training has gone wrong long before it reads nan
READ_EVERY = 20  # steps on a GPU, which must wait for its queue whenever a loss is read
EPOCH_STEPS = 100  # of large references, so that losses are seen more often than once a pass
MOST_BATCHES = 64  # in a pass; a reference with more of them gets no more steps
VALIDATION_FROM = 2000  # training cells; fewer can spare none for early stopping
MOST_VALIDATION = 500  # cells set aside for early stopping
MOST_IN_CURVE = 2000  # held-out cells whose loss is drawn beside that of training
FLAT = 0.01  # a loss that falls by less than this share of its whole fall is flat


# ---------------------------------------------------------------------------- how long, how fast


def split_validation(train, codes, cfg):
    """Set aside some training cells, by whose loss early stopping decides.

    Args:
        train: indices of the training cells (n). codes: types of all cells (N). cfg: a
            TrainingSettings as the user gave it: none are set aside for a given number of epochs.

    Returns:
        Indices of the cells to train on, and of those set aside: none if there are fewer than
        VALIDATION_FROM.
    """
    if cfg.epochs is not None or len(train) < VALIDATION_FROM:
        return train, train[:0]
    share = min(0.1, MOST_VALIDATION / len(train))
    aside = split_cells(codes[train], share, cfg.seed)
    return train[~aside], train[aside]


def cells_of_curve(test, seed):
    """As many held-out cells (indices, ascending) as are enough for a loss curve."""
    if len(test) <= MOST_IN_CURVE:
        return test
    return np.sort(np.random.default_rng(seed).choice(test, MOST_IN_CURVE, replace=False))


def is_flat(losses):
    """Whether the last quarter of the losses brought at most FLAT of all that they have fallen.

    losses: one for each epoch.
    """
    n = max(3, len(losses) // 4)
    if len(losses) < 3 * n:
        return False
    before, now = min(losses[:-n]), min(losses[-n:])
    return before - now <= FLAT * (max(losses) - before)


@dataclass
class Plan:
    """How long a training is, in what batches, at what learning rate."""

    n_epochs: int
    """At most; early stopping may end it before."""
    epoch_steps: int
    """Steps of an epoch."""
    batch_size: int
    lr: float
    """Peak learning rate."""

    @property
    def n_steps(self):
        """Steps of all epochs."""
        return self.n_epochs * self.epoch_steps


def plan_training(cfg, n_cells, passes):
    """A plan by the number of cells, for what the settings leave open.

        batch = 32 √(n / 1000), a power of two from 32 to 256,   rate = lr √(batch / 32),
        steps = passes · min(n / batch, MOST_BATCHES)

    So from 2,000 cells on the number of steps is fixed, and the batches grow. Steps are taken in
    epochs of a pass over the cells, or of EPOCH_STEPS if a pass has more.

    Args:
        cfg: a TrainingSettings, whose ``epochs`` and ``batch_size`` may be None. n_cells: of
            training. passes: over the cells of a small reference.
    """
    batch, lr = cfg.batch_size, cfg.lr
    if batch is None:
        batch = 2 ** int(np.clip(math.log2(32 * math.sqrt(n_cells / 1000)), 5, 8))
        lr = lr * math.sqrt(batch / 32)
    n_batches = -(-n_cells // batch)  # the last one smaller
    if cfg.epochs is not None:
        return Plan(cfg.epochs, n_batches, batch, lr)
    epoch_steps = min(n_batches, EPOCH_STEPS)
    n_steps = passes * min(n_batches, MOST_BATCHES)
    return Plan(max(1, round(n_steps / epoch_steps)), epoch_steps, batch, lr)


class Rate:
    """Learning rate of a step, as a share of the peak: rising, constant, then falling to zero.

    The constant part can end at any step, which a cycle of a given length could not do; the fall
    then takes half as many steps as there were before it (warm-up, stable, decay: Hu et al.,
    MiniCPM, 2024).

    Attributes:
        warm_up: steps of the rise. decay_from: step at which the fall begins. n_steps: all.
    """

    def __init__(self, n_steps):
        self.n_steps, self.warm_up = n_steps, max(1, n_steps // 10)
        self.decay_from = n_steps * 2 // 3

    def fall(self, step):
        """Fall from this step on."""
        self.decay_from, self.n_steps = step, min(self.n_steps, step + max(1, step // 2))

    def __call__(self, step):
        rise = min(1.0, (step + 1) / self.warm_up)
        # The rate after the last step would be zero.
        left = (self.n_steps + 1 - step) / (self.n_steps + 1 - self.decay_from)
        return max(0.0, min(rise, left))


def two_rate_optimizer(model, fast, plan, weight_decay):
    """AdamW and a schedule in which a few parameters learn at 20 times the rate.

    The ``fast`` parameters are few and must travel far. They have no weight decay, which would
    pull them back.

    Args:
        model: whose parameters to train. fast: some of them. plan: Plan. weight_decay: of the
            others.

    Returns:
        ``(optimizer, schedule)``.
    """
    slow = [p for p in model.parameters() if all(p is not f for f in fast)]
    groups = [
        {"params": slow, "lr": plan.lr, "weight_decay": weight_decay},
        {"params": fast, "lr": 20 * plan.lr, "weight_decay": 0.0},
    ]
    # Fused: all weights are updated in one pass instead of several.
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], fused=True)
    rates = [Rate(plan.n_steps)] * len(optimizer.param_groups)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rates)


class TrainingRun(ResumableRun):
    """The epochs, batches and losses of one training."""

    def __init__(self, name, cfg, plan, model, optimizer, schedule, rng, made_from):
        self.plan, self.rate = plan, schedule.lr_lambdas[0]  # whose state a checkpoint holds
        super().__init__(name, cfg, model, optimizer, schedule, rng, made_from)
        self.read_every = READ_EVERY if self.device.type == "cuda" else 1
        self.split = None  # batches of this pass over the cells, once they are drawn

    @property
    def n_epochs(self):
        """Epochs of this training, fewer than planned once the rate has begun to fall early."""
        return -(-self.rate.n_steps // self.plan.epoch_steps)

    def epochs(self):
        """The epochs still to do, with a progress bar; signals take effect between steps."""
        first, hidden = self.progress.epoch, self.group.rank > 0
        options = {"desc": self.name, "unit": self.unit, "disable": hidden}
        self.bar = tqdm(total=self.n_epochs, initial=first - 1, **options)
        try:
            self.begin()
            while self.progress.epoch <= self.n_epochs:
                yield self.progress.epoch
        finally:
            self.bar.close()  # so that an error message starts on a line of its own
        self.end()

    def batches(self, rows, X):
        """The batches of this epoch that are still to do.

        An epoch goes on with the pass over the cells where the last one ended; the order of a pass
        is drawn when it begins.

        Args:
            rows: of X (N), the training cells. X: counts, CSR or backed; of a backed matrix, rows
                of the same blocks stay together.

        Yields:
            rows of the whole batch (B), and the slice of them that this process computes.
        """
        progress, epoch_steps = self.progress, self.plan.epoch_steps
        n_batches = -(-len(rows) // self.plan.batch_size)
        while progress.step < epoch_steps:
            done = ((progress.epoch - 1) * epoch_steps + progress.step) % n_batches  # of this pass
            if done == 0:
                progress.rng_of_pass = self.rng.bit_generator.state
                self.split = self.draw_batches(rows, n_batches, X)
            elif self.split is None:  # resumed within a pass
                state = self.rng.bit_generator.state
                self.rng.bit_generator.state = progress.rng_of_pass
                self.split = self.draw_batches(rows, n_batches, X)
                self.rng.bit_generator.state = state
            batch = self.split[done]
            yield batch, self.part(len(batch))
            progress.step += 1
            progress.cells += len(batch)
            self.save_if_due()
        self.read_losses()

    def draw_batches(self, rows, n_batches, X):
        """The cells in a new order, in batches: a list of n_batches arrays."""
        backed = isinstance(X, BackedCounts)
        order = X.shuffled(rows, self.rng) if backed else self.rng.permutation(rows)
        return np.array_split(order, n_batches)

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

    def mean_losses(self):
        """Means over the cells of this epoch of the sums given to :meth:`all_reduce`; a list."""
        return (self.progress.total / self.progress.cells).tolist()

    def end_epoch(self, row=None, validation=None, **postfix):
        """The epoch is done.

        Args:
            row: its losses for the curve. validation: loss of the validation cells; when it no
                longer falls, the learning rate does. postfix: texts for the progress bar.
        """
        self.read_losses()
        if row is not None:
            self.progress.curve.append(row)
        if validation is not None:
            self.watch(validation)
        self.progress.epoch += 1
        self.progress.step, self.progress.cells, self.progress.total = 0, 0, 0.0
        self.bar.total = self.n_epochs
        self.bar.set_postfix(postfix, refresh=False)
        self.bar.update()
        self.save_if_due()

    def watch(self, loss):
        """Let the learning rate fall from now on if the loss of the validation cells is flat."""
        loss = torch.tensor([loss], dtype=torch.float64)
        self.group.broadcast(loss)  # so that all processes decide alike
        self.progress.validation.append(loss.item())
        step = self.progress.epoch * self.plan.epoch_steps
        if step < self.rate.decay_from and is_flat(self.progress.validation):
            self.rate.fall(step)

    def save_results(self, **metadata):
        """Write the model with its ``metadata`` and the loss curves, then remove the checkpoint.

        metadata: what the model's file should know besides, see :func:`runtime.weights.save_model`.
        """
        metadata |= {"epoch": self.n_epochs, "plan": vars(self.plan), "made_from": self.made_from}
        path = self.cfg.weights / f"{self.name}_model.pt"
        save_model(path, self.model, self.cfg, **metadata)
        loss = getattr(self.cfg, "loss", "nb")
        write_losses(self.cfg.weights / self.name, self.progress.curve, loss)
        self.remove_checkpoint()
