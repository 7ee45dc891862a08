"""Where the processes of a run meet."""

import socket
import subprocess
import sys

import pytest

from ds_deberta.ports import free_port
from tests.launch import ROOT, clean_environment

RANK = """
import os
from ds_deberta.ports import with_port_of_deepspeed

print(with_port_of_deepspeed(os.environ)["MASTER_PORT"])
"""
LAUNCHER = """
import os, subprocess, sys

_, port, nodes, rank = sys.argv[1:]
variables = os.environ | {"MASTER_PORT": port, "CROSS_SIZE": nodes}
for _ in range(2):
    subprocess.run([sys.executable, "-c", rank], env=variables, check=True)
print(os.getpid())
"""
DEEPSPEED = """
import subprocess, sys

port, nodes, rank, launcher = sys.argv[1:5]
words = ["-c", launcher, "deepspeed.launcher.launch", port, nodes, rank]
subprocess.run([sys.executable, *words], check=True)
"""


def ports(port: str, *options: str, nodes: str = "1", **variables: str) -> list[str]:
    """What two ranks take behind stand-ins for `deepspeed` and its launcher; and that's number."""
    command = [sys.executable, "-c", DEEPSPEED, port, nodes, RANK, LAUNCHER, *options]
    environment = clean_environment() | variables
    return subprocess.check_output(command, cwd=ROOT, env=environment, text=True).split()


def test_one_node_of_deepspeed_has_a_port_of_its_own():
    first, second, launcher = ports("29500")
    assert first == second == str(20_000 + int(launcher) % 10_000)


def test_deepspeed_obeys_master_port():
    assert ports("29500", MASTER_PORT="1234")[:2] == ["1234"] * 2


@pytest.mark.parametrize("options", [["--master_port", "29500"], ["--master_port=29500"]])
def test_the_port_on_the_command_line_of_deepspeed_wins(options):
    assert ports("29500", *options, MASTER_PORT="1234")[:2] == ["29500"] * 2


def test_another_port_than_deepspeeds_default_was_chosen():
    assert ports("5678", MASTER_PORT="1234")[:2] == ["5678"] * 2


def test_many_nodes_of_deepspeed_keep_its_port():
    assert ports("29500", nodes="2", MASTER_PORT="1234")[:2] == ["29500"] * 2


def test_a_port_in_use_is_not_free(monkeypatch):
    with socket.create_server(("127.0.0.1", free_port())) as server:
        busy = server.getsockname()[1]
        monkeypatch.setattr("ds_deberta.ports._PORTS", range(busy, busy + 1))
        monkeypatch.setattr("random.SystemRandom.sample", lambda _, ports, __: list(ports))
        with pytest.raises(ValueError, match="must be free"):
            free_port()
