"""Ranks, devices and the process group: the only file that reads the launcher's environment.

Works the same under `deepspeed`, `torchrun` and plain `python` (one process).
"""

import ctypes
import logging
import os
import random
import signal
import sys
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

logger = logging.getLogger("ds_deberta")

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
_PR_SET_PDEATHSIG = 1  # of sys/prctl.h
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def initialize(seed: int) -> torch.device:
    """Join the process group, pick this process's device and seed every random generator.

    Parameters are initialised from `seed` alone, so all ranks build the same weights;
    call `seed_rank` once the models exist to give every rank its own dropout masks.

    Raises:
        ValueError: the launcher's variables are there only in part.
    """
    _check_environment()
    _set_up_logging()
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        timeout = timedelta(minutes=30)
        if "LOCAL_RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:  # plain `python`: a group of one, without a port
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
            # DeepSpeed looks for these even where the group exists already.
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    seed_everything(seed)
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // _local_world_size()))
    _keep_freed_memory()
    return torch.device("cpu")


def seed_everything(seed: int) -> None:
    """Seed python's, numpy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - libraries may draw from the global generator
    torch.manual_seed(seed)


def seed_rank(seed: int) -> None:
    """Give this rank its own random stream, for dropout."""
    seed_everything(seed + 1000003 * (rank() + 1))


def rank() -> int:
    """This process's number among all."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """True on the one process that prints and writes."""
    return rank() == 0


def barrier() -> None:
    """Wait until every rank has come here."""
    if world_size() > 1:
        dist.barrier()


def sum_across_ranks(tensor: Tensor) -> Tensor:
    """Add up a tensor over all ranks. Returns a new tensor, the same on every rank."""
    total = tensor.clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def gather_across_ranks(tensor: Tensor) -> Tensor:
    """Concatenate the ranks' 1-d tensors, whose lengths may differ, in rank order."""
    if world_size() == 1:
        return tensor
    lengths = torch.zeros(world_size(), dtype=torch.int64, device=tensor.device)
    lengths[rank()] = len(tensor)
    dist.all_reduce(lengths)
    sizes = lengths.tolist()
    padded = tensor.new_zeros(max(sizes))
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def shutdown() -> None:
    """Leave the process group once all ranks are done."""
    barrier()
    dist.destroy_process_group()


def end_with_parent() -> None:
    """Tie this process's life to its parent's: signals to stop are for the parent alone.

    A terminal and launchers send them to every process, and a worker that is gone is an error.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    prctl = getattr(ctypes.CDLL(None), "prctl", None)  # Linux has it
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _keep_freed_memory() -> None:
    """Keep what a step frees for the next one, as torch does on a GPU.

    glibc gives blocks over 32 MiB (a table's gradient, for one) back to the kernel, which clears
    every page anew: a third of a step's time on a CPU. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _local_world_size() -> int:
    # LOCAL_WORLD_SIZE is torchrun's word, LOCAL_SIZE is DeepSpeed's; an empty one counts as none.
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if os.environ.get(name):
            return int(os.environ[name])
    return 1


def _check_environment() -> None:
    if "LOCAL_RANK" in os.environ:
        missing = [name for name in _LAUNCHER_VARIABLES if name not in os.environ]
        if missing and os.environ.get("WORLD_SIZE", "1") != "1":
            raise ValueError(
                f"LOCAL_RANK is set, so this process belongs to a launcher, but "
                f"{', '.join(missing)} is not. Start with `deepspeed` or `torchrun`."
            )
    elif os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set without LOCAL_RANK: "
            "start with `deepspeed` or `torchrun`, which set both, or unset WORLD_SIZE."
        )


def _set_up_logging() -> None:
    main = os.environ.get("RANK", "0") == "0"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if main else logging.ERROR)
