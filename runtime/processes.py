"""Several processes of ``torchrun`` that train one model: NCCL on GPUs, Gloo on CPUs.

    torchrun --standalone --nproc-per-node 2 train_gmvae.py

Every process draws the random numbers of the whole batch and computes its part of it; gradients
are summed, so that losses and weights are those of one process up to rounding. The first process
alone prints and writes.
"""

import contextlib
import functools
import os
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from runtime.errors import InputError
from runtime.script import silence
from runtime.signals import SignalHandler, Stopped

PATIENCE = timedelta(seconds=10)  # for which the others wait for the first to report an error


def distributed(main):
    """Decorator: ``main(cfg)`` of a training also runs as one of the processes of ``torchrun``.

    A process that fails leaves the group, so that the others fail at their next collective. One of
    them alone reports why, the first if it can.
    """

    @functools.wraps(main)
    def run_main(cfg):
        if not dist.is_available() or not dist.is_torchelastic_launched() or dist.is_initialized():
            return main(cfg)
        store, rank, size = next(dist.rendezvous("env://"))
        if size == 1:
            return main(cfg)
        with silence() if rank else contextlib.nullcontext():
            try:
                join_group(cfg, store, rank, size)
                main(cfg)
            except (Exception, KeyboardInterrupt) as error:
                SignalHandler.deferred = lambda number: None  # the process is ending already
                if not claims_report(store, rank):
                    time.sleep(1)  # torchrun ends all processes as soon as the first one has ended
                    sys.exit(128 + error.number if isinstance(error, Stopped) else 1)
                raise
            finally:
                if dist.is_initialized():
                    dist.destroy_process_group()

    return run_main


def join_group(cfg, store, rank, size):
    """Join the process group; on CUDA each process has a GPU to itself.

    Raises:
        InputError: there are fewer GPUs than processes.
    """
    gpu = cfg.device.startswith("cuda") or (cfg.device == "auto" and torch.cuda.is_available())
    if gpu:
        local_rank, n_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= n_gpus or cfg.device not in ("auto", "cuda"):
            raise InputError(
                f"--device {cfg.device}: found {n_gpus} GPUs for the processes of torchrun, "
                "expected one each, and --device auto or cuda"
            )
        torch.cuda.set_device(local_rank)  # the one that "cuda" means from now on
    dist.init_process_group("nccl" if gpu else "gloo", store=store, rank=rank, world_size=size)


def claims_report(store, rank):
    """Whether this process reports the error: the first one, or else one of the others."""
    try:
        if rank:
            with contextlib.suppress(dist.DistStoreError):  # the first has not reported in time
                store.wait(["said"], PATIENCE)
        return store.add("said", 1) == 1
    except RuntimeError:  # the store is gone, and with it the process that held it
        return False


def collective(function, *arguments):
    """Call a function of ``torch.distributed``.

    Raises:
        InputError: another process has ended.
    """
    try:
        return function(*arguments)
    except RuntimeError as error:
        raise InputError(
            "another process of this training has ended; --resume goes on from the last checkpoint"
        ) from error


def wait_for_all():
    """Wait until all processes have come this far; of one process, do nothing."""
    if dist.is_available() and dist.is_initialized():
        collective(dist.barrier)


class ProcessGroup:
    """The processes that train together; of one process, every collective is the identity.

    Attributes:
        rank, size: of this process, from 0, and how many there are.
        local_signal: number of a signal that this process received, or None.
    """

    def __init__(self, device):
        initialized = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if initialized else (0, 1)
        self.device, self.local_signal = device, None
        self.signal_counts = None  # (NSIG,) over all processes, since the last read_signal

    def part(self, n):
        """This process's slice of a batch of n; empty if there are more processes than items."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def all_reduce(self, values, gradients=()):
        """Sum over all processes, and tell them all of a signal that one of them received.

        One flat tensor, not DistributedDataParallel: that averages over processes, whose parts of
        a batch differ in size, wants the whole loss in one forward(), and would need a second
        collective for losses and signals. These networks are small, so one sum is fastest.

        Args:
            values: (n,) float32. gradients: tensors of any shape, summed in place.

        Returns:
            (n,) sums.
        """
        if self.size == 1:
            return values
        counts = torch.zeros(signal.NSIG, device=self.device)
        counts[self.local_signal or 0] = 1.0
        parts = [*(g.flatten() for g in gradients), values, counts]
        flat = torch.cat(parts)
        collective(dist.all_reduce, flat)
        *sums, values, counts = flat.split([part.numel() for part in parts])
        for gradient, total in zip(gradients, sums, strict=True):
            gradient.copy_(total.view_as(gradient))
        self.signal_counts = counts if self.signal_counts is None else self.signal_counts + counts
        return values

    def read_signal(self):
        """The signal that any process received before the last collective, or None."""
        counts, self.signal_counts = self.signal_counts, None
        if counts is None or not counts[1:].any():  # place 0 counts processes without a signal
            return None
        return int(counts[1:].argmax()) + 1

    def barrier(self):
        """Wait until all processes have come this far."""
        self.all_reduce(torch.zeros(0, device=self.device))

    def broadcast(self, *tensors):
        """Overwrite tensors, in place, with those of the first process.

        Processors may round differently, so that what each computes alone would drift apart.
        """
        if self.size == 1:
            return
        for tensor in tensors:
            on_device = tensor.to(self.device)
            collective(dist.broadcast, on_device, 0)
            tensor.copy_(on_device)

    def is_same(self, code):
        """Whether an integer (of 60 bits at most) is the same in all processes."""
        if self.size == 1:
            return True
        local = torch.tensor([code], device=self.device)  # int64
        first = local.clone()
        self.broadcast(first)
        return not self.all_reduce((local != first).float()).item()
