"""A training run that survives: it saves, stops in one line, and continues where it was."""

import hashlib
import signal
import time

import torch

from runtime.checkpoint import Checkpoint, Progress
from runtime.device import training_threads
from runtime.errors import InputError
from runtime.processes import ProcessGroup
from runtime.signals import SignalHandler, Stopped
from runtime.writing import check_writable


class ResumableRun:
    """Progress, checkpoint, processes and signals of one training.

    Attributes:
        progress: epoch, step, sums of losses, loss curve; what the checkpoint keeps.
        group: the processes that train together. checkpoint: its file.
        signal: number of the signal that ends the run after this step, or None.
        pending: losses that are not read yet; nothing is saved before they are.
        bar: the progress bar, set by the loop. unit: what users count it in, epoch or step.
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
        self.progress = Progress(rng_of_pass=rng.bit_generator.state)
        self.checkpoint = Checkpoint(name, cfg, made_from, model, optimizer, schedule, rng)
        self.resumed, self.signal, self.last_saved = False, None, "none"
        self.unit = "step" if hasattr(cfg, "steps") else "epoch"
        self.pending, self.bar, self.save_time = [], None, time.monotonic()
        if self.group.rank == 0:
            check_writable(cfg.weights, "--weights")  # rather now than after minutes of training
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
        where = f"{self.unit} {min(self.progress.epoch, self.n_epochs)} of {self.n_epochs}"
        return where if self.unit == "step" else f"{where}, step {self.progress.step}"

    def begin(self):
        """From now on signals take effect between steps; all processes have the same model."""
        if self.device.type == "cpu":
            n_threads = training_threads(self.plan.batch_size * self.model.config["n_genes"])
            torch.set_num_threads(n_threads)
            print(f"{self.name}: {n_threads} thread{'s' * (n_threads > 1)}")
        self.save_time = time.monotonic()
        SignalHandler.deferred = self.receive_signal
        self.check_processes()
        self.group.broadcast(*self.model.state_dict().values())

    def end(self):
        """Training is done: save it, whatever happens while the results are written."""
        if self.group.rank == 0:
            self.save()
        self.barrier()  # learn of a signal that came after the last step
        self.save_if_due()
        SignalHandler.deferred = None

    def check_processes(self):
        """Raise InputError if the processes found different data or checkpoints."""
        state = f"{self.made_from} {self.position} {self.resumed}"
        code = int(hashlib.blake2b(state.encode(), digest_size=7).hexdigest(), 16)
        if not self.group.is_same(code):
            raise InputError(
                f"{self.checkpoint.path}: the processes found different data or checkpoints, "
                "expected the same; do all see the same folders?"
            )

    def receive_signal(self, number):
        """Stop after this step; at the second signal, stop at once."""
        if self.group.size > 1:  # torchrun repeats a Ctrl-C, and ends all processes after 30 s
            self.group.local_signal = number
            return
        if self.signal is not None:
            raise Stopped(number)
        self.signal = number

    def barrier(self):
        """Wait for all processes, and see any signal that one of them received."""
        self.group.barrier()
        self.update_signal()

    def update_signal(self):
        """See whether any process received a signal; one process alone is told by its handler."""
        received = self.group.read_signal()
        if received is not None:  # else the handler may just be setting the attribute
            self.signal = received

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

    def raise_diverged(self, what):
        """Raise the error that says where the run stopped, and what is left of it."""
        self.bar.close()
        raise InputError(
            f"{self.name} diverged at {self.position}: {what}, expected a finite loss of about "
            f"{self.progress.first_loss or 0:.3g} or less; last good checkpoint: "
            f"{self.last_saved}; try a lower --lr than {self.plan.lr:g}"
        )

    def remove_checkpoint(self):
        """Delete the checkpoint: all results are written."""
        self.checkpoint.remove()
