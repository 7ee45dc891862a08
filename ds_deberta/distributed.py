"""Ranks, devices and the process group: the only file that reads the launcher's environment.

Works the same under `deepspeed`, `torchrun`, `srun` and plain `python` (one process).
"""

import contextlib
import ctypes
import hashlib
import logging
import os
import random
import re
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ds_deberta.ports import free_port, with_port_of_deepspeed

T = TypeVar("T")

logger = logging.getLogger("ds_deberta")

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for another one in a collective before it fails."""
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
_PR_SET_PDEATHSIG = 1  # of sys/prctl.h
_DEFAULT_PORT = 17006  # the original's
_THIS_MACHINE = ("127.0.0.1", "localhost")
_planned_world_size = 1


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one starts: a process among all processes, or a node among all nodes."""

    unit: str
    """process: one of those a launcher started; node: one that is to start its own."""
    source: str
    """Whose variables say so."""
    rank: int = 0
    """This one's number."""
    world_size: int = 1
    """How many there are."""
    local_rank: int = 0
    """A process's number on its node, and so its device."""
    local_world_size: int = 1
    """The processes of its node."""
    master_addr: str = "127.0.0.1"
    """The host of the first one."""
    master_port: int = _DEFAULT_PORT
    """A free port there."""

    def __str__(self) -> str:
        if self.unit == "node" and self.world_size == 1:
            return "started alone (WORLD_SIZE is 1 or not set)"
        return (
            f"{self.unit} {self.rank} of {self.world_size}, by {self.source}; "
            f"first one at {self.master_addr}:{self.master_port}"
        )


def find_place(variables: Mapping[str, str]) -> Place:
    """Tell process variables from node variables, which go by the same names.

    LOCAL_RANK is there: `deepspeed` or `torchrun` started this process; RANK and WORLD_SIZE count
    processes. In a step of `srun`: Slurm's variables count them. Else, as in the original, RANK
    and WORLD_SIZE, if there, count nodes, and each node is to start its own processes.

    Raises:
        ValueError: variables are missing, or contradict each other.
    """
    variables = {name: value for name, value in variables.items() if value}
    if "LOCAL_RANK" in variables:
        wanted = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in wanted if name not in variables]
        if missing and variables.get("WORLD_SIZE", "1") != "1":
            raise ValueError(
                f"LOCAL_RANK is set, so this process belongs to a launcher, but "
                f"{', '.join(missing)} is not. Start with `deepspeed` or `torchrun`."
            )
        local_size = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in variables else "LOCAL_SIZE"
        place = Place(
            unit="process",
            source="the launcher's LOCAL_RANK, RANK and WORLD_SIZE",
            rank=_whole_number(variables, "RANK", 0),
            world_size=_whole_number(variables, "WORLD_SIZE", 1),
            local_rank=_whole_number(variables, "LOCAL_RANK", 0),
            local_world_size=_whole_number(variables, local_size, 1),
            master_addr=variables.get("MASTER_ADDR", "127.0.0.1"),
            master_port=_port(variables, _DEFAULT_PORT),
        )
        if local_size in variables and place.local_rank >= place.local_world_size:
            raise ValueError(
                f"LOCAL_RANK must be less than {local_size}, got {place.local_rank} and "
                f"{place.local_world_size}. Start with `deepspeed` or `torchrun`."
            )
    elif _whole_number(variables, "SLURM_STEP_NUM_TASKS", 1) > 1 and "SLURM_PROCID" in variables:
        place = _slurm_place(variables)
    else:
        place = Place(
            unit="node",
            source="RANK and WORLD_SIZE" if "WORLD_SIZE" in variables else "no variables",
            rank=_whole_number(variables, "RANK", 0),
            world_size=_whole_number(variables, "WORLD_SIZE", 1),
            master_addr=variables.get("MASTER_ADDR", "127.0.0.1"),
            master_port=_port(variables, _DEFAULT_PORT),
        )
        if place.world_size > 1 and (
            missing := [name for name in ("RANK", "MASTER_ADDR") if name not in variables]
        ):
            raise ValueError(
                f"WORLD_SIZE={place.world_size} is set without LOCAL_RANK, so it counts nodes, but "
                f"{' and '.join(missing)} is not set. Set RANK to this node's number and "
                "MASTER_ADDR to node 0's address, or unset WORLD_SIZE."
            )
    if place.rank >= place.world_size:
        raise ValueError(
            f"RANK must be less than WORLD_SIZE, got {place.rank} and {place.world_size} "
            f"({place.unit} variables)"
        )
    return place


def initialize(seed: int, *, expect_world_size: int | None = None) -> torch.device:
    """Join the process group, pick this process's device and seed every random generator.

    Parameters are initialised from `seed` alone, so all ranks build the same weights;
    `seed_step` then gives every rank its own dropout masks.

    Raises:
        ValueError: variables that make no sense, another number of processes than expected, or a
            busy port.
    """
    place = find_place(with_port_of_deepspeed(os.environ))
    _set_up_logging(main=place.rank == 0)
    if place.unit == "node" and place.world_size > 1:
        raise ValueError(
            f"WORLD_SIZE={place.world_size} is set without LOCAL_RANK, so it counts nodes. Start "
            "each node with ./rtd.sh, ./mlm.sh or `python -m ds_deberta.launch`, which starts a "
            "process for each device, or unset WORLD_SIZE."
        )
    check_world_size(place, expect_world_size)
    check_allocation(place, os.environ, expect_world_size)
    logger.info("%s", place)
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if place.unit == "process":
            os.environ.update(  # what Slurm calls otherwise
                RANK=str(place.rank),
                LOCAL_RANK=str(place.local_rank),
                WORLD_SIZE=str(place.world_size),
                MASTER_ADDR=place.master_addr,
                MASTER_PORT=str(place.master_port),
            )
            with _told_of_a_busy_port(place):
                if place.master_addr in _THIS_MACHINE and "TORCHELASTIC_RUN_ID" not in os.environ:
                    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
                    store = _local_store(place, COLLECTIVE_TIMEOUT)
                    dist.init_process_group(
                        backend,
                        store=store,
                        rank=place.rank,
                        world_size=place.world_size,
                        timeout=COLLECTIVE_TIMEOUT,
                    )
                else:
                    dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
        else:  # plain `python`: a group of one, without a port
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group(
                backend, store=store, rank=0, world_size=1, timeout=COLLECTIVE_TIMEOUT
            )
            # DeepSpeed looks for these even where the group exists already.
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    seed_everything(seed)
    # Before torch starts the threads that are to inherit it. The moments of a word that is not read
    # halve every 7 steps, end as denormals, and make AdamW 10 times as slow (on a Xeon).
    torch.set_flush_denormal(True)
    if torch.cuda.is_available():
        torch.cuda.set_device(place.local_rank)
        return torch.device("cuda", place.local_rank)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // place.local_world_size))
    _keep_freed_memory()
    return torch.device("cpu")


@contextlib.contextmanager
def _told_of_a_busy_port(place: Place) -> Iterator[None]:
    try:
        yield
    except (OSError, dist.DistNetworkError) as error:
        if "address already in use" not in str(error).lower():
            raise
        raise ValueError(
            f"MASTER_PORT must be free on {place.master_addr}; {place.master_port} is in use "
            f"there. Stop the process that uses it, or choose another: MASTER_PORT={free_port()} "
            "before ./rtd.sh, ./mlm.sh or srun, --master_port after deepspeed or torchrun."
        ) from None


def _local_store(place: Place, timeout: timedelta) -> Any:
    """The ranks' meeting point on this machine; torch's own would listen to the whole network."""
    is_first = place.rank == 0
    address = (place.master_addr, place.master_port)
    listener = socket.create_server(address).detach() if is_first else None
    return dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        *address,
        world_size=place.world_size,
        is_master=is_first,
        timeout=timeout,
        master_listen_fd=listener,
    )


def check_world_size(place: Place, expected: int | None) -> None:
    """Refuse another number of processes than expected.

    Raises:
        ValueError: there is another.
    """
    if expected not in (None, place.world_size):
        raise ValueError(
            f"expect_world_size is {expected}, but there are {place.world_size} "
            f"processes ({place}). Look at the launcher's options and its hostfile."
        )


def check_allocation(place: Place, variables: Mapping[str, str], expected: int | None) -> None:
    """Refuse to train on a part of what Slurm has given, unless the number of processes is said.

    Raises:
        ValueError: this process would train alone, or its processes leave nodes idle.
    """
    if expected is not None or "SLURM_STEP_NUM_TASKS" in variables:  # in a step: `srun` said it
        return
    tasks = _whole_number(variables, "SLURM_NTASKS", 1)
    nodes = _whole_number(variables, "SLURM_JOB_NUM_NODES", 1)
    used = place.world_size // place.local_world_size
    is_alone = place.unit == "node" and place.world_size == 1
    if (is_alone and tasks > 1) or used < nodes:
        raise ValueError(
            f"Slurm has given this job {tasks} tasks on {nodes} nodes, but {place.world_size} "
            f"process(es) would train on {used} of them. Start `srun python run_pretrain.py` (a "
            "task for each device) or `srun ./rtd.sh` (a task for each node); or, if it is meant, "
            f"add --expect_world_size {place.world_size}."
        )


def seed_everything(seed: int) -> None:
    """Seed python's, numpy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - libraries may draw from the global generator
    torch.manual_seed(seed)


def seed_step(seed: int, step: int) -> None:
    """Give this rank its own random stream for one step, for dropout.

    It takes 3 us on a CPU; `torch.manual_seed`, which looks for all kinds of devices, takes 100.
    """
    digest = hashlib.sha256(f"{seed} {step} {rank()}".encode()).digest()
    value = int.from_bytes(digest[:8], "little", signed=True)
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_available():
        torch.cuda.manual_seed(value)  # of the current device; it waits for nothing


def computes_in_bf16() -> bool:
    """Whether this machine's device multiplies in bf16; a CPU without AVX-512 only imitates it."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # What torch itself asks before it hands a product in bf16 to oneDNN.
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def plan_world_size(size: int) -> None:
    """Let `world_size` speak of processes that are only planned, in one that starts no group."""
    global _planned_world_size
    _planned_world_size = size


def rank() -> int:
    """This process's number among all."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else _planned_world_size


def is_main() -> bool:
    """True on the one process that prints and writes."""
    return dist.get_rank() == 0 if dist.is_initialized() else os.environ.get("RANK", "0") == "0"


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


def gather_objects(value: T) -> list[T]:
    """Collect a small object of every rank, in rank order, on every rank."""
    values = [value]
    if dist.is_initialized() and dist.get_world_size() > 1:
        values *= dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def host_identity() -> str:
    """What this machine's processes share, in containers too, until it is booted again."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else socket.gethostname()


def place_on_node() -> tuple[int, int]:
    """This process's number among those of its host, and how many these are.

    Counted by asking all ranks: launchers' variables do without, or count for another node.
    """
    host = f"{socket.gethostname()} {host_identity()}"
    ranks = [i for i, other in enumerate(gather_objects(host)) if other == host]
    return ranks.index(rank()), len(ranks)


def shutdown() -> None:
    """Leave the process group once all ranks are done."""
    barrier()
    dist.destroy_process_group()


def has_launcher() -> bool:
    """True if `deepspeed` or `torchrun` started this process, whether they live or not."""
    return any(name in os.environ for name in ("CROSS_RANK", "TORCHELASTIC_RUN_ID"))


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when its parent ends."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)  # Linux has it
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, number)


@contextlib.contextmanager
def without_triton() -> Iterator[None]:
    """Keep other packages from importing triton where its kernels can not run: 70 MiB."""
    if torch.cuda.is_available() or "triton" in sys.modules:
        yield
        return
    sys.modules["triton"] = None  # type: ignore[assignment] - "not installed", to an import
    try:
        yield
    finally:
        del sys.modules["triton"]


def _keep_freed_memory() -> None:
    """Keep what a step frees for the next one, as torch does on a GPU.

    glibc gives blocks over 32 MiB (a table's gradient, for one) back to the kernel, which clears
    every page anew: a third of a step's time on a CPU. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _slurm_place(variables: Mapping[str, str]) -> Place:
    """The place of a process that `srun` started."""
    first = re.match(r"([^,\[]+)(?:\[(\d+))?", variables.get("SLURM_STEP_NODELIST", ""))
    tasks = re.match(r"\d+", variables.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    for name, other in (("RANK", "SLURM_PROCID"), ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")):
        if name in variables and variables[name] != variables[other]:
            raise ValueError(
                f"{name}={variables[name]} contradicts {other}={variables[other]}; unset {name}"
            )
    if "MASTER_ADDR" not in variables and not first:
        raise ValueError("Slurm names no hosts (SLURM_STEP_NODELIST); set MASTER_ADDR to node 0's")
    return Place(
        unit="process",
        source="Slurm's SLURM_PROCID and SLURM_STEP_NUM_TASKS",
        rank=_whole_number(variables, "SLURM_PROCID", 0),
        world_size=_whole_number(variables, "SLURM_STEP_NUM_TASKS", 1),
        local_rank=_whole_number(variables, "SLURM_LOCALID", 0),
        local_world_size=int(tasks[0]) if tasks else 1,
        master_addr=variables.get("MASTER_ADDR") or "".join(x or "" for x in first.groups()),  # type: ignore[union-attr]
        # Another for each job, the same in all of its processes.
        master_port=_port(variables, 20000 + _whole_number(variables, "SLURM_JOB_ID", 0) % 10000),
    )


def _whole_number(variables: Mapping[str, str], name: str, default: int) -> int:
    value = variables.get(name, str(default))
    if not value.isdecimal():
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    return int(value)


def _port(variables: Mapping[str, str], default: int) -> int:
    port = _whole_number(variables, "MASTER_PORT", default)
    if not 0 < port < 65536:
        raise ValueError(f"MASTER_PORT must be from 1 to 65535, got {port}")
    return port


def _set_up_logging(*, main: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if main else logging.ERROR)
