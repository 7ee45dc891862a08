"""Two hosts on one machine: network namespaces joined by a cable, with an sshd each.

Needs root and Debian's iproute2, openssh-server and pdsh. Touches neither ~/.ssh nor /etc/ssh.
Their names end in the number of this process: another one's tests may run beside these.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAMES = (f"dsnode1-{os.getpid()}", f"dsnode2-{os.getpid()}")
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def missing() -> str:
    """Why there can be no two nodes; empty if there can."""
    if sys.platform != "linux" or os.geteuid():
        return "needs root on Linux"
    commands = ("ip", "sshd", "ssh-keygen", "pdsh", "unshare")
    absent = [name for name in commands if not shutil.which(name, path=_path())]
    if absent:
        return f"needs {', '.join(absent)} (apt-get install iproute2 openssh-server pdsh)"
    probe = f"dsprobe-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", probe], env=_environment()).returncode:
        return "may not add network namespaces"
    _call("ip", "netns", "delete", probe)
    return ""


@contextmanager
def two_nodes(folder: Path) -> Iterator[Path]:
    """Set them up; `folder`/bin must come first in PATH, `folder`/hostfile names them.

    Start a command on node i by `on(i)`; GLOO_SOCKET_IFNAME is eth0 on both.
    """
    _sweep()
    try:
        _set_up(folder)
        yield folder
    finally:
        _tear_down(folder)


def on(node: int) -> tuple[str, ...]:
    """The words before a command that is to run on node 0 or 1."""
    return ("ip", "netns", "exec", NAMES[node])


def _set_up(folder: Path) -> None:
    Path("/run/sshd").mkdir(exist_ok=True)
    for key in ("id", "hostkey"):
        _call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
    keys = folder / "authorized_keys"
    shutil.copy(folder / "id.pub", keys)
    keys.chmod(0o600)
    for name in NAMES:
        _call("ip", "netns", "add", name)
    cable = ("type", "veth", "peer", "name", "eth0", "netns", NAMES[1])
    _call("ip", "link", "add", "eth0", "netns", NAMES[0], *cable)
    for name, address in zip(NAMES, ADDRESSES, strict=True):
        _call("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _call("ip", "-n", name, "link", "set", device, "up")
        hosts = Path("/etc/netns") / name / "hosts"  # `ip netns exec` mounts it over /etc/hosts
        hosts.parent.mkdir(parents=True)
        lines = ["127.0.0.1 localhost", *map(" ".join, zip(ADDRESSES, NAMES, strict=True))]
        hosts.write_text("\n".join(lines) + "\n")
        config = folder / f"sshd_{name}"
        config.write_text(
            f"Port 2222\nListenAddress {address}\nHostKey {folder}/hostkey\n"
            f"AuthorizedKeysFile {keys}\nPidFile {folder}/{name}.pid\nStrictModes no\nUsePAM no\n"
            "PasswordAuthentication no\nPermitRootLogin prohibit-password\n"
        )
        sshd = shutil.which("sshd", path=_path())
        command = f"hostname {name}; exec {sshd} -f {config} -E {folder}/{name}.log"
        _call("ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", command)
    (folder / "ssh_config").write_text(
        f"Host {' '.join(NAMES)}\n Port 2222\n User root\n IdentityFile {folder}/id\n"
        " IdentitiesOnly yes\n StrictHostKeyChecking no\n UserKnownHostsFile /dev/null\n"
        " LogLevel ERROR\n"
    )
    ssh = folder / "bin/ssh"  # deepspeed and pdsh look for it in PATH
    ssh.parent.mkdir()
    ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    ssh.chmod(0o755)
    (folder / "hostfile").write_text("".join(f"{name} slots=1\n" for name in NAMES))


def _tear_down(folder: Path) -> None:
    for name in NAMES:
        pid_file = folder / f"{name}.pid"
        if pid_file.exists():
            os.kill(int(pid_file.read_text()), signal.SIGTERM)
        _delete(name)


def _sweep() -> None:
    """Delete the networks that killed tests left."""
    for folder in Path("/run/netns").glob("dsnode?-*"):
        if not Path("/proc", folder.name.partition("-")[2]).exists():
            _delete(folder.name)


def _delete(name: str) -> None:
    subprocess.run(["ip", "netns", "delete", name], env=_environment(), stderr=-3)
    shutil.rmtree(f"/etc/netns/{name}", ignore_errors=True)


def _call(*command: str) -> None:
    subprocess.run(command, env=_environment(), check=True)


def _environment() -> dict[str, str]:
    return dict(os.environ) | {"PATH": _path()}


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"
