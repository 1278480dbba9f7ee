"""Several processes of torchrun that train one model."""

import contextlib
import functools
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from runtime.errors import InputError
from runtime.script import silence
from runtime.signals import Interruption, Stopped

PATIENCE = timedelta(seconds=10)  # that the first process has to say itself what went wrong


def several(main):
    """Decorator: ``main(cfg)`` of a training also runs as one of the processes of ``torchrun``.

    Whatever ends one of them ends all: it leaves the group, and the others fail at the next sum.
    One of them alone says why, the first if it can.
    """

    @functools.wraps(main)
    def run_one(cfg):
        if not dist.is_available() or not dist.is_torchelastic_launched():
            return main(cfg)
        store, rank, size = next(dist.rendezvous("env://"))
        if size == 1:
            return main(cfg)
        with contextlib.ExitStack() as stack:
            if rank:
                stack.enter_context(silence())
            try:
                join(cfg, store, rank, size)
                main(cfg)
            except (Exception, KeyboardInterrupt) as error:
                Interruption.later = lambda number: None  # it is ending already
                if not is_to_say(store, rank):
                    time.sleep(1)  # torchrun ends all when the first of them has ended
                    sys.exit(128 + error.number if isinstance(error, Stopped) else 1)
                raise
            finally:
                if dist.is_initialized():
                    dist.destroy_process_group()

    return run_one


def join(cfg, store, rank, size):
    """Become one of ``size`` processes; on CUDA each has a GPU of its own.

    Raises:
        InputError: there are fewer GPUs than processes.
    """
    gpu = cfg.device.startswith("cuda") or (cfg.device == "auto" and torch.cuda.is_available())
    if gpu:
        own, found = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if own >= found or cfg.device not in ("auto", "cuda"):
            raise InputError(
                f"--device {cfg.device}: found {found} GPUs for the processes of torchrun, "
                "expected one each, and --device auto or cuda"
            )
        torch.cuda.set_device(own)  # which "cuda" means from now on
    dist.init_process_group("nccl" if gpu else "gloo", store=store, rank=rank, world_size=size)


def is_to_say(store, rank):
    """Whether this process is the one to say what went wrong: the first, or if it does not, one."""
    try:
        if rank:
            with contextlib.suppress(dist.DistStoreError):  # it waited in vain
                store.wait(["said"], PATIENCE)
        return store.add("said", 1) == 1
    except RuntimeError:  # the store is gone, and with it the process that held it
        return False


def among_all(collective, *arguments):
    """Call a function of ``torch.distributed``.

    Raises:
        InputError: another process has ended.
    """
    try:
        return collective(*arguments)
    except RuntimeError as error:
        raise InputError(
            "another process of this training has ended; --resume goes on from the last checkpoint"
        ) from error
