import platform
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ds_deberta import distributed
from ds_deberta.distributed import (
    Place,
    check_allocation,
    computes_in_bf16,
    find_place,
    initialize,
)
from ds_deberta.kernels.dropout import dropout
from tests.launch import ROOT, clean_environment

MASTER = {"MASTER_ADDR": "node0", "MASTER_PORT": "123"}
SLURM = {
    **{"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"},
    **{"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_STEP_NODELIST": "gpu[07-08],x1"},
    "SLURM_JOB_ID": "40012",
}


def test_a_cpu_with_avx512_multiplies_in_bf16():
    flags = Path("/proc/cpuinfo").read_text() if platform.machine() == "x86_64" else ""
    if not flags or torch.cuda.is_available():
        pytest.skip("says nothing of an x86 CPU on Linux")
    assert computes_in_bf16() == ("avx512bw" in flags)


def summary(**variables: str) -> tuple:
    place = find_place(variables)
    return place.unit, place.rank, place.world_size, place.local_rank, place.local_world_size


def test_local_rank_makes_them_process_variables():
    variables = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **MASTER}
    assert summary(**variables) == ("process", 5, 8, 1, 1)
    assert summary(**variables, LOCAL_SIZE="4") == ("process", 5, 8, 1, 4)
    assert summary(**variables, LOCAL_WORLD_SIZE="4", LOCAL_SIZE="") == ("process", 5, 8, 1, 4)
    assert str(find_place(variables)) == (
        "process 5 of 8, by the launcher's LOCAL_RANK, RANK and WORLD_SIZE; first one at node0:123"
    )


def test_without_local_rank_they_count_nodes_as_in_the_original():
    assert summary() == ("node", 0, 1, 0, 1)
    assert summary(WORLD_SIZE="1", RANK="0") == ("node", 0, 1, 0, 1)
    assert summary(WORLD_SIZE="2", RANK="1", MASTER_ADDR="node0") == ("node", 1, 2, 0, 1)
    place = find_place({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "node0"})
    assert (place.master_addr, place.master_port) == ("node0", 17006)


def test_a_step_of_srun_places_its_processes():
    assert summary(**SLURM) == ("process", 5, 8, 1, 4)
    place = find_place(SLURM)
    assert (place.master_addr, place.master_port) == ("gpu07", 20012)
    assert find_place(SLURM | MASTER).master_addr == "node0"
    # A batch script, or an interactive shell, is no step of many.
    assert summary(SLURM_PROCID="0", SLURM_NTASKS="8") == ("node", 0, 1, 0, 1)
    # Whatever Slurm says, a launcher under it knows better.
    launched = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", **MASTER}
    assert summary(**SLURM, **launched) == ("process", 3, 4, 3, 1)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK, MASTER_ADDR, MASTER_PORT is not"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "counts nodes, but MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2", **MASTER}, "RANK must be less than WORLD_SIZE"),
        ({"RANK": "1"}, "RANK must be less than WORLD_SIZE, got 1 and 1"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number, got 'two'"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT must be from 1 to 65535, got 65536"),
        (
            {"WORLD_SIZE": "8", "RANK": "0", "LOCAL_RANK": "4", "LOCAL_SIZE": "4", **MASTER},
            "LOCAL_RANK must be less than LOCAL_SIZE",
        ),
        ({**SLURM, "WORLD_SIZE": "2"}, "WORLD_SIZE=2 contradicts SLURM_STEP_NUM_TASKS=8"),
        ({**SLURM, "SLURM_STEP_NODELIST": ""}, "Slurm names no hosts"),
    ],
)
def test_what_makes_no_sense_is_refused(variables, message):
    with pytest.raises(ValueError, match=message):
        find_place(variables)


BATCH = {"SLURM_JOB_ID": "40012", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}
TWO_NODES = BATCH | {"SLURM_JOB_NUM_NODES": "2"}
STARTED = {"RANK": "3", "LOCAL_RANK": "3", "LOCAL_SIZE": "4", **MASTER}


def allocate(variables: dict[str, str], expected: int | None = None) -> None:
    check_allocation(find_place(variables), variables, expected)


def test_a_part_of_what_slurm_has_given_is_refused():
    with pytest.raises(ValueError, match=r"8 tasks on 1 nodes, but 1 process\(es\) would train"):
        allocate(BATCH)
    with pytest.raises(ValueError, match=r"would train on 1 of them\. Start `srun python"):
        allocate(TWO_NODES | STARTED | {"WORLD_SIZE": "4"})


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        (BATCH | {"SLURM_NTASKS": "1"}, None),
        (BATCH, 1),
        (BATCH | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        (BATCH | STARTED | {"WORLD_SIZE": "4"}, None),
        (TWO_NODES | STARTED | {"WORLD_SIZE": "8"}, None),
        (TWO_NODES | STARTED | {"WORLD_SIZE": "4"}, 4),
        (SLURM | {"SLURM_NTASKS": "8", "SLURM_JOB_NUM_NODES": "2"}, None),
    ],
)
def test_all_of_what_slurm_has_given_or_what_is_said_is_taken(variables, expected):
    allocate(variables, expected)


def set_environment(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_a_process_alone_does_not_take_node_variables(monkeypatch):
    set_environment(monkeypatch, WORLD_SIZE="2", RANK="0", MASTER_ADDR="node0")
    with pytest.raises(ValueError, match=r"counts nodes. Start each node with \./rtd\.sh"):
        initialize(0)


def test_another_number_of_processes_than_expected_is_refused(monkeypatch):
    set_environment(monkeypatch)
    with pytest.raises(ValueError, match="expect_world_size is 2, but there are 1 processes"):
        initialize(0, expect_world_size=2)


@pytest.mark.parametrize(
    "listen",
    [
        lambda place: distributed._local_store(place, timedelta(seconds=5)),
        lambda place: dist.TCPStore(place.master_addr, place.master_port, 1, True),  # of torch
    ],
)
def test_a_busy_port_is_named(listen):
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = Place(unit="process", source="a test", master_port=server.getsockname()[1])
        message = f"{place.master_port} is in use there.* MASTER_PORT=2.*--master_port"
        with pytest.raises(ValueError, match=message), distributed._told_of_a_busy_port(place):
            listen(place)


_FADED = """
import torch
from ds_deberta.distributed import initialize, shutdown

initialize(seed=0)
torch.set_num_threads(2)
faded = torch.full((2**20,), 1e-38) * 0.1  # enough for both threads
print(int(faded.count_nonzero()))
shutdown()
"""


def test_numbers_too_small_for_a_fast_product_become_zero_on_all_threads():
    command = [sys.executable, "-c", _FADED]
    printed = subprocess.check_output(command, cwd=ROOT, env=clean_environment(), text=True)
    assert printed.split() == ["0"]


def test_dropout_is_a_function_of_seed_step_and_rank(monkeypatch):
    def masks(seed: int, step: int, rank: int) -> list[torch.Tensor]:
        """What two micro-batches of a step, or two models, drop one after the other."""
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        distributed.seed_step(seed, step)
        return [dropout(torch.ones(4096), 0.5) for _ in range(2)]

    places = [(1, 7, 0), (1, 7, 1), (1, 8, 0), (2, 7, 0), (17, 0, 0), (1, 70, 0)]
    found = [mask for place in places for mask in masks(*place)]
    for i, mask in enumerate(found):
        for other in found[:i]:  # independent ones agree in half of the places, give or take 32
            assert abs((mask == other).sum() - 2048) < 200
    again = [mask for place in places for mask in masks(*place)]
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
