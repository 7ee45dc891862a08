"""After any end of a run: no process, no file in /dev/shm, no temporary folder."""

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ds_deberta.leftovers import own_temporary_folder
from tests.launch import ROOT, free_port, left_in_shared_memory, run_ranks
from tests.test_stop import ENDLESS, Run

DEEPSPEED = ("deepspeed", "--num_accelerators", "2")


@pytest.fixture
def flags(data_dir: Path, tiny_model_file: Path) -> list[str]:
    return [
        *("--objective", "mlm", "--model", str(tiny_model_file), "--data_dir", str(data_dir)),
        *("--deepspeed_config", str(ROOT / "ds_configs/zero1_fp32.json"), "--log_interval", "1"),
        *("--max_seq_length", "32", "--train_batch_size", "4", "--micro_batch_size", "1"),
        *("--num_workers", "2", "--warmup", "1"),
    ]


@pytest.fixture
def temporary() -> Iterator[Path]:
    """The folder for temporary files of a run; its path is short, for sockets lie in it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def start(tmp_path: Path, flags: list[str], temporary: Path) -> Run:
    port = ("--master_port", str(free_port()))
    command = (*DEEPSPEED, *port, "run_pretrain.py", *flags, *ENDLESS)
    return Run(tmp_path / "run", *command, TMPDIR=str(temporary))


def launchers(run: Run) -> list[int]:
    """`deepspeed` and the process that it starts on each node."""
    ranks = {*run.processes(RANK="0"), *run.processes(RANK="1")}
    return [process for process in run.processes() if process not in ranks]


def rank_1(run: Run) -> list[int]:
    return [min(run.processes(RANK="1"))]


def worker_of_rank_1(run: Run) -> list[int]:
    return [max(run.processes(RANK="1"))]


VICTIMS: dict[str, Callable[[Run], list[int]]] = {
    "all processes": Run.processes,
    "launchers": launchers,
    "a rank": rank_1,
    "a data worker": worker_of_rank_1,
}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("victims", VICTIMS)
def test_nothing_outlives_a_killed_training(flags, tmp_path, temporary, victims):
    """SIGKILL, while two ranks train with two data workers each."""
    with start(tmp_path, flags, temporary) as run:
        run.wait_for(lambda: run.has_logged(3))
        assert len(run.processes()) == 2 + 2 + 4
        assert os.listdir(temporary)
        for process in VICTIMS[victims](run):
            os.kill(process, signal.SIGKILL)
        killed = time.monotonic()
        run.wait_for(lambda: not run.processes(), 40)
        print(f"{victims}: all gone after {time.monotonic() - killed:.1f} s")
        assert run.launcher.wait(5) != 0
        assert not left_in_shared_memory(run.shared_memory)
    if victims == "launchers":  # the ranks have saved
        assert len(list((tmp_path / "run/checkpoints").glob("step_*"))) == 1
    sweep(temporary, flags, tmp_path)


def sweep(temporary: Path, flags: list[str], tmp_path: Path) -> None:
    """Another run, even one that fails at once, leaves the folder empty."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(temporary))
        wrong = ["--data_dir", str(tmp_path / "none"), "--output_dir", str(tmp_path / "next")]
        run_ranks(ROOT / "run_pretrain.py", *flags, *wrong, status=2)
    assert os.listdir(temporary) == []


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("seconds", [1.0, 3.0, 5.0, 8.0])
def test_ranks_without_launchers_end_whenever_these_were_killed(
    flags, tmp_path, temporary, seconds
):
    """Before the ranks have begun to train, too."""
    with start(tmp_path, flags, temporary) as run:
        run.wait_for(lambda: len(run.processes(RANK="1")) > 0)
        time.sleep(seconds)
        for process in launchers(run):
            os.kill(process, signal.SIGKILL)
        killed = time.monotonic()
        run.wait_for(lambda: not run.processes(), 60)
        print(f"killed after {seconds} s: all gone {time.monotonic() - killed:.1f} s later")
        assert not left_in_shared_memory(run.shared_memory)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("end", ["clean", "failed"])
def test_nothing_is_left_of_a_run_that_ends_by_itself(flags, tmp_path, temporary, end):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(temporary))
        before = set(os.listdir("/dev/shm"))
        more = ["--output_dir", str(tmp_path / "run"), "--num_training_steps", "3"]
        more += ["--seed", "1.5"] if end == "failed" else []
        status = 2 if end == "failed" else 0
        run_ranks(ROOT / "run_pretrain.py", *flags, *more, world_size=2, status=status)
    assert os.listdir(temporary) == []
    assert not left_in_shared_memory(before)


def test_a_long_name_leaves_room_for_sockets(tmp_path, monkeypatch):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with own_temporary_folder() as folder:
        assert folder.parent == Path("/tmp")
        assert tempfile.mkdtemp().startswith(f"{folder}/")


def test_only_folders_of_dead_processes_are_swept(temporary, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    prefix = f"ds_deberta_{os.getuid()}_"
    names = (f"{prefix}dead", "other")
    for name in names:
        (temporary / name / "pymp-x").mkdir(parents=True)
    with own_temporary_folder() as first:
        monkeypatch.setattr("tempfile.tempdir", str(temporary))
        assert {path.name for path in temporary.iterdir()} == {"other", first.name}
        (first / "mine").touch()
        with own_temporary_folder() as second:
            assert (first / "mine").exists()
            assert second.parent == temporary
        assert not second.exists()
    assert [path.name for path in temporary.iterdir()] == ["other"]
