"""The TCP port where the processes of a run meet: the one that is named, else one of its own."""

import os
import random
import socket
from collections.abc import Mapping
from contextlib import suppress

import psutil

_PORTS = range(20_000, 30_000)  # below those that Linux and macOS give to outgoing connections
_DEFAULT_OF_DEEPSPEED = "29500"


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    for port in random.SystemRandom().sample(_PORTS, 1000):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise ValueError(
        f"a port from {_PORTS[0]} to {_PORTS[-1]} must be free; 1000 tried ones are not"
    )


def with_port_of_deepspeed(variables: Mapping[str, str]) -> dict[str, str]:
    """Variables of a process, with the port that one node of `deepspeed` did not choose.

    `deepspeed` does not read MASTER_PORT and sets it to 29500, on every machine and for every run.
    On one node, its processes find out together what the user said: the launcher that they share
    still has the user's MASTER_PORT. If nothing is said, the port follows from the launcher's
    number, which no other launcher of this machine has.
    """
    found = dict(variables)
    if found.get("CROSS_SIZE") != "1" or found.get("MASTER_PORT") != _DEFAULT_OF_DEEPSPEED:
        return found
    with suppress(psutil.Error):
        launcher = psutil.Process(os.getppid())
        if "deepspeed.launcher.launch" in launcher.cmdline() and not _is_named(launcher.parent()):
            own = str(_PORTS[launcher.pid % len(_PORTS)])
            found["MASTER_PORT"] = launcher.environ().get("MASTER_PORT") or own
    return found


def _is_named(deepspeed: psutil.Process | None) -> bool:
    words = deepspeed.cmdline() if deepspeed else []
    return any(word.startswith("--master_p") for word in words)
