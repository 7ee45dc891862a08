import os
import signal
import socket
import subprocess
import sys

import pytest

from ds_deberta.distributed import Place, find_place
from ds_deberta.launch import (
    _alive,
    check_hostfile,
    check_options,
    exit_status,
    find_node,
    placing_options,
    port_options,
    split_command,
)
from tests.launch import ROOT, clean_environment

ONE = find_place({})
NODE = find_place({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "5"})


def test_the_script_parts_the_launchers_options_from_the_flags():
    words = ["--num_gpus", "2", "x/run_pretrain.py", "--seed", "1"]
    assert split_command(words) == (words[:2], words[2:])
    with pytest.raises(ValueError, match=r"name run_pretrain\.py"):
        split_command(["--num_gpus", "2"])


def test_node_variables_become_the_launchers_options():
    assert " ".join(placing_options([], NODE, 2, "FILE")) == (
        "--hostfile FILE --no_ssh --node_rank 1 --num_nodes 2 --master_addr node0 --master_port 5"
    )


def test_one_node_is_the_launchers_own_business():
    assert placing_options(["--include=localhost:1"], ONE, None, "FILE") == []
    assert placing_options([], ONE, 3, "FILE") == ["--num_accelerators", "3"]


def test_one_node_takes_a_free_port_unless_one_is_named():
    def port(*options: str, place: Place = ONE, **variables: str) -> list[str]:
        return port_options(options, place, variables)

    name, free = port("--num_gpus", "2")
    assert name == "--master_port"
    with socket.create_server(("127.0.0.1", int(free))):
        assert port()[1] != free
    named = find_place({"MASTER_PORT": "5"})
    assert port(place=named, MASTER_PORT="5") == ["--master_port", "5"]
    assert port("-H", "hosts", place=named, MASTER_PORT="5") == ["--master_port", "5"]
    assert port("--master_port=6", place=named, MASTER_PORT="5") == []
    assert port("--hostfile=hosts") == []  # the port must be free on the first of them
    assert port(place=NODE, MASTER_PORT="5") == []  # see placing_options


@pytest.mark.parametrize(
    ("options", "place", "procs_per_node", "message"),
    [
        ("--hostfile nope", ONE, None, "there is no hostfile 'nope'"),
        ("--hostfile=nope", ONE, None, "there is no hostfile 'nope'"),
        ("-H", ONE, None, "there is no hostfile ''"),
        ("--num_gpus 2", ONE, 2, "--procs_per_node does not go with --num_gpus"),
        ("", ONE, 0, "procs_per_node must be at least 1"),
        ("--num_gpus 2", NODE, None, "--num_gpus says where to start, but so do WORLD_SIZE"),
        ("--master_port=3", NODE, None, "--master_port says where to start"),
    ],
)
def test_options_that_deepspeed_would_misread_are_refused(options, place, procs_per_node, message):
    with pytest.raises(ValueError, match=message):
        check_options(options.split(), place, procs_per_node)


def test_devices_that_deepspeed_would_not_mind_are_refused(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES=6,7 does not go with node"):
        check_options([], NODE, None)
    check_options([], ONE, None)


@pytest.mark.parametrize("line", ["", "# why", "OMP_NUM_THREADS 1"])
def test_a_line_that_crashes_deepspeed_is_named(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts").write_text("node0 slots=1")
    file = tmp_path / ".deepspeed_env"
    file.write_text("A=1\nB=x=y\n")
    check_options(["-H", "hosts"], ONE, None)
    file.write_text(f"A=1\n{line}\n")
    with pytest.raises(ValueError, match=r"deepspeed_env, line 2, must be NAME=VALUE"):
        check_options(["-H", "hosts"], ONE, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node1 slots=8\nnode2\n", "line 2, must be NODE slots=DEVICES"),
        ("node1 slots=0\n", "line 1, must be NODE slots=DEVICES"),
        ("node1 slots=8\n\nnode1 slots=8\n", "line 3, names node1 again"),
        ("# nobody\n\n", "names no node"),
    ],
)
def test_a_hostfile_that_deepspeed_would_not_read_is_refused(text, message, tmp_path):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ValueError, match=message):
        check_options(["-H", str(tmp_path / "hosts")], ONE, None)


@pytest.mark.parametrize("file", sorted((ROOT / "hostfiles").iterdir()), ids=lambda file: file.name)
def test_the_shipped_hostfiles_are_right(file):
    check_hostfile(file)


def test_a_process_is_not_launched_again():
    launched = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "node0"}
    with pytest.raises(ValueError, match="the processes are started already"):
        find_node({**launched, "MASTER_PORT": "5"})
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "gpu7"}
    assert find_node(step).unit == "node"
    with pytest.raises(ValueError, match="the processes are started already"):
        find_node(step | {"SLURM_STEP_TASKS_PER_NODE": "2"})


def test_a_signal_gives_the_status_that_shells_give():
    assert [exit_status(x) for x in (0, 7, 143, -15, 241, 247)] == [0, 7, 143, 143, 143, 137]


def test_a_group_of_processes_that_only_wait_to_be_reaped_is_gone():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1, start_new_session=True)
    assert _alive(process.pid)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie, until the next line
    assert not _alive(process.pid)
    process.communicate()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signals_to_stop_are_passed_on(number):
    """To a stand-in for `deepspeed`, which says what it got."""
    child = (
        "import signal, sys, time\n"
        f"signal.signal({number.value}, lambda number, _: sys.exit(100 + number))\n"
        "print('ready', flush=True); time.sleep(60)\n"
    )
    program = (
        "import sys; from ds_deberta.launch import _run\n"
        f"sys.exit(_run([sys.executable, '-c', {child!r}]))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, env=clean_environment(), stdout=-1, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.wait(30) == 100 + number
