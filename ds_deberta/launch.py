"""Start a run's processes on this node or, with a hostfile, on all nodes.

    python -m ds_deberta.launch [options of deepspeed] run_pretrain.py [its flags]

Puts `deepspeed` right where it goes wrong without a word: a hostfile that is not there is an
error; a signal to stop reaches the ranks, wherever they are; the status is theirs (143, 130 or 138
after a stop with everything saved); and nothing outlives it.

WORLD_SIZE, RANK and MASTER_ADDR may count nodes, as for the original's scripts: start it on each of
them. MASTER_PORT or --master_port is the port where the processes meet; default on one node: a free
one. `--procs_per_node N`: default one for each device, and one on a CPU.
"""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ds_deberta.distributed import Place, end_with_parent, find_place
from ds_deberta.ports import free_port
from ds_deberta.stop import ONE_REQUEST_SECONDS, SIGNALS

_SCRIPT = "run_pretrain.py"
_SECONDS_TO_LEAVE = 30
_PLACING = (  # options that say where processes start
    *("-H", "--hostfile", "-i", "--include", "-e", "--exclude", "--num_nodes"),
    *("--num_gpus", "--num_accelerators", "--no_ssh", "--node_rank"),
)


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the status to end with."""
    parser = argparse.ArgumentParser(prog="ds_deberta.launch", allow_abbrev=False, add_help=False)
    parser.add_argument("--procs_per_node", type=int)
    parser.add_argument("--master_port")
    given, words = parser.parse_known_args(argv)
    with tempfile.TemporaryFile("w") as hostfile:  # nameless: nothing is left of it
        hostfile_name = f"/proc/{os.getpid()}/fd/{hostfile.fileno()}"
        try:
            place = find_node(os.environ)
            options, command = split_command(words)
            options += ["--master_port", given.master_port] if given.master_port else []
            check_options(options, place, given.procs_per_node, command)
            added = placing_options(options, place, given.procs_per_node, hostfile_name)
            added += port_options(options, place, os.environ)
        except ValueError as error:
            sys.stderr.write(f"ds_deberta.launch: {error}\n")
            return 2
        slots = given.procs_per_node or max(1, torch.cuda.device_count())
        # deepspeed looks these names up nowhere: --no_ssh.
        hostfile.writelines(f"node{i} slots={slots}\n" for i in range(place.world_size))
        hostfile.flush()
        sys.stderr.write(f"{place}: deepspeed {shlex.join([*added, *options])}\n")
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "warning"]
        return _run([*launcher, *added, *options, *command])


def find_node(variables: Mapping[str, str]) -> Place:
    """This node among all nodes.

    Raises:
        ValueError: the variables are those of a process.
    """
    place = find_place(variables)
    if place.unit == "node":
        return place
    if "LOCAL_RANK" not in variables and place.local_world_size == 1:
        return replace(place, unit="node")  # srun --ntasks-per-node=1
    raise ValueError(
        f"this is {place}: the processes are started already. Start {_SCRIPT} itself here, or this "
        "once for each node."
    )


def split_command(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part the launcher's options from run_pretrain.py and its flags.

    Raises:
        ValueError: there is no run_pretrain.py in it.
    """
    at = next((i for i, word in enumerate(words) if Path(word).name == _SCRIPT), None)
    if at is None:
        raise ValueError(f"name {_SCRIPT} after the launcher's options; got {shlex.join(words)}")
    return list(words[:at]), list(words[at:])


def check_options(
    options: Sequence[str], place: Place, procs_per_node: int | None, command: Sequence[str] = ()
) -> None:
    """Refuse what `deepspeed` would misread or pass over.

    Raises:
        ValueError: no such hostfile; options and variables that contradict each other; or words of
            the command that would not reach other nodes as they are.
    """
    names = [word.partition("=")[0] for word in options]
    for i, name in enumerate(names):
        if name in ("-H", "--hostfile"):
            file = options[i].partition("=")[2] or " ".join(options[i + 1 : i + 2])
            if not Path(file).is_file():
                raise ValueError(f"there is no hostfile {file!r}; hostfiles/ has examples")
            check_hostfile(Path(file))
            _check_exports()
            _check_words(command)
    placing = [name for name in names if name in _PLACING]
    if placing and procs_per_node is not None:
        raise ValueError(f"--procs_per_node does not go with {placing[0]}: leave one of them out")
    if procs_per_node is not None and procs_per_node < 1:
        raise ValueError(f"procs_per_node must be at least 1, got {procs_per_node}")
    if place.world_size == 1:
        return
    placing += [name for name in names if name in ("--master_addr", "--master_port")]
    if placing:
        raise ValueError(
            f"{placing[0]} says where to start, but so do WORLD_SIZE and RANK, which make this "
            f"{place}. Unset those, or leave it out."
        )
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    if devices not in (None, ",".join(map(str, range(torch.cuda.device_count())))):
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES={devices} does not go with node variables: deepspeed takes the "
            "first devices of each node. Unset it and use --procs_per_node."
        )


def placing_options(
    options: Sequence[str], place: Place, procs_per_node: int | None, hostfile: str
) -> list[str]:
    """The options that follow from the node variables and --procs_per_node."""
    if place.world_size > 1:
        return [
            *("--hostfile", hostfile, "--no_ssh", "--node_rank", str(place.rank)),
            *("--num_nodes", str(place.world_size)),
            *("--master_addr", place.master_addr, "--master_port", str(place.master_port)),
        ]
    if any(word.partition("=")[0] in _PLACING for word in options):
        return []
    if procs_per_node is None and not torch.cuda.is_available():
        procs_per_node = 1  # deepspeed would start one for each NUMA node
    return [] if procs_per_node is None else ["--num_accelerators", str(procs_per_node)]


def port_options(options: Sequence[str], place: Place, variables: Mapping[str, str]) -> list[str]:
    """MASTER_PORT as an option, which `deepspeed` does not read; one node takes a free port.

    A hostfile's nodes keep `deepspeed`'s default: the first of them may be another machine.
    """
    names = [word.partition("=")[0] for word in options]
    if place.world_size > 1 or "--master_port" in names:
        return []
    if variables.get("MASTER_PORT"):
        return ["--master_port", str(place.master_port)]
    is_here = not {"-H", "--hostfile"} & set(names)
    return ["--master_port", str(free_port())] if is_here else []


def check_hostfile(file: Path) -> None:
    """Name the line of a hostfile that `deepspeed` would not read.

    Raises:
        ValueError: a line that is no node, a node that is there twice, or no node at all.
    """
    nodes: set[str] = set()
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not line.strip() or line.strip().startswith("#"):
            continue
        match = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)\s*(#.*)?", line.strip())
        if not match:
            raise ValueError(
                f"{file}, line {number}, must be NODE slots=DEVICES, one device at least; got "
                f"{line!r}"
            )
        if match[1] in nodes:
            raise ValueError(f"{file}, line {number}, names {match[1]} again; one line for each")
        nodes.add(match[1])
    if not nodes:
        raise ValueError(f"{file} names no node; write lines NODE slots=DEVICES")


def _check_exports() -> None:
    """Name the line of a .deepspeed_env that would crash `deepspeed`."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    for file in (Path.home() / name, Path(name)):
        if file.is_file():
            for number, line in enumerate(file.read_text().splitlines(), 1):
                if not re.match(r"\w+=", line):
                    raise ValueError(
                        f"{file}, line {number}, must be NAME=VALUE, without blank lines and "
                        f"comments; got {line!r}"
                    )


def _check_words(command: Sequence[str]) -> None:
    """Refuse words that a shell would change, for `deepspeed` quotes none but those with spaces."""
    for word in command:
        if re.search(r"[$`\\%\n]" if " " in word else r"[^\w@:,./+=-]|^$", word, re.ASCII):
            raise ValueError(
                f"a shell of the other nodes would change {word!r}; use plain names, and put other "
                "values into a file for --config"
            )


def _run(command: Sequence[str]) -> int:
    """Run the launcher in a session of its own, which a terminal's Ctrl-C does not reach."""
    launcher = subprocess.Popen(
        command,
        start_new_session=True,
        preexec_fn=lambda: end_with_parent(signal.SIGTERM),
    )

    asked_at: list[float] = []

    def pass_on(number: int, _: object) -> None:
        asked_at.append(time.monotonic())
        if asked_at[-1] - asked_at[0] <= ONE_REQUEST_SECONDS:
            _stop(launcher.pid, number)
        else:
            os.killpg(launcher.pid, number)

    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, pass_on)
    status = launcher.wait()
    deadline = time.monotonic() + _SECONDS_TO_LEAVE
    while _alive(launcher.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    if _alive(launcher.pid):
        os.killpg(launcher.pid, signal.SIGKILL)
    return exit_status(status)


def exit_status(returned: int) -> int:
    """A process's status as shells give it: 128 and the number of the signal that ended it.

    Python gives minus that number, and deepspeed hands a rank's on, which makes it 256 less it.
    """
    if returned < 0:
        return 128 - returned
    return 128 + 256 - returned if returned > 256 - signal.NSIG else returned


def _stop(launcher: int, number: int) -> None:
    """Send a signal to every rank at once, here or, by pdsh, on the nodes.

    `deepspeed` would send it to one after the other, to none, or kill its own messengers first.
    """
    commands = {process: _words(process) for process in _descendants(launcher)}
    ranks = [
        process
        for process, words in commands.items()
        if any(Path(word).name == _SCRIPT for word in words[:3])
    ]
    pdsh = next((words for words in commands.values() if Path(words[0]).name == "pdsh"), None)
    for rank in ranks:
        os.kill(rank, number)
    if pdsh is not None:
        folder = re.findall(r"--output_dir[ =](\S+)", " ".join(pdsh))[-1]
        pattern = rf"{_SCRIPT} --local_rank=[0-9]+ .*--output_dir[ =]{re.escape(folder)}( |$)"
        hosts = pdsh[pdsh.index("-w") + 1]
        subprocess.Popen(
            ["pdsh", "-f", "1024", "-w", hosts, f"pkill -{number} -f -- {shlex.quote(pattern)}"],
            env=os.environ | {"PDSH_RCMD_TYPE": "ssh"},
            start_new_session=True,
        )
    elif not ranks:  # still starting, or gone already
        os.killpg(launcher, number)


def _descendants(process: int) -> Iterator[int]:
    for file in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            children = file.read_text().split()
        except OSError:
            continue  # it has just ended
        for child in map(int, children):
            yield child
            yield from _descendants(child)


def _words(process: int) -> list[str]:
    """A process's command line; an empty word for one that has ended."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        return [""]


def _alive(group: int) -> bool:
    """True if any process of a group still runs; one that only waits to be reaped does not."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = file.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue  # it has just ended
        if int(its_group) == group and state not in "ZX":
            return True
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
