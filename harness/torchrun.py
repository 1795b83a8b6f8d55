"""The processes that `torchrun` starts, which it calls ranks: how they begin, wait for each other, and end.

What they exchange in a step of training is in `ranks.py`. A process that torchrun did not start is the only rank.
"""
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta

import torch
from torch import distributed

from sources.files import BadInput


def count() -> int:
    """How many ranks there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def number() -> int:
    """Which of them this process is. Rank 0 evaluates, saves and prints."""
    return distributed.get_rank() if distributed.is_initialized() else 0


@contextmanager
def started(device: str) -> Iterator[None]:
    """Be one of the ranks inside the block, if torchrun started this process. device: "auto", "cpu" or "cuda".

    If several ranks end with an error, the first alone may say why; the others raise SystemExit. Raises BadInput if
    there are more ranks than GPUs.
    """
    if not {"LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        yield
        return
    backend, gpu = "gloo", None
    if device != "cpu" and torch.cuda.is_available():
        gpu = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if gpu.index >= torch.cuda.device_count():
            raise BadInput(f"--nproc-per-node: expected at most {torch.cuda.device_count()}, the GPUs of this machine")
        torch.cuda.set_device(gpu)  # from now on "cuda" is this one
        backend = "cpu:gloo,cuda:nccl"
    store, rank, ranks = next(distributed.rendezvous("env://"))
    # The limit is long, because the others wait while rank 0 computes features or evaluates.
    distributed.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timedelta(days=1),
                                   device_id=gpu)
    whole = False
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if rank else sys.stdout):
            yield
        whole = True
    except BaseException as error:
        if not says_it_first(store):
            raise SystemExit(2) from error
        raise
    finally:
        if whole or gpu is None:  # after an error NCCL would wait here for the other ranks
            distributed.destroy_process_group()


def says_it_first(store: distributed.Store) -> bool:
    """Whether this rank is the first to end with an error. If the store is gone with its process, say yes."""
    try:
        return store.add("ended", 1) == 1
    except RuntimeError:
        return True


def exchange(collective: Callable, *tensors: object, **options: object) -> None:
    """Call a function of torch.distributed. Raises ConnectionError if it fails, as when another rank has ended."""
    try:
        collective(*tensors, **options)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        cause = f" ({str(error).splitlines()[0]})" if "NCCL" in str(error) else ""  # it fails for other reasons, too
        raise ConnectionError("another process of this training has ended; --resume goes on from the last "
                              f"checkpoint{cause}") from error


def any_of(flag: bool) -> bool:
    """Whether the flag is set on any rank. Also waits until all ranks have come to this place."""
    found = torch.tensor(int(flag))  # on the CPU, so that no GPU has to be waited for
    if count() > 1:
        exchange(distributed.all_reduce, found, op=distributed.ReduceOp.MAX)
    return bool(found)


@contextmanager
def first_alone() -> Iterator[None]:
    """Rank 0 runs the block first, and then the others do."""
    if number() > 0:
        any_of(False)
    yield
    if number() == 0:
        any_of(False)
