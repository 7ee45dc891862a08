"""`--validate`: everything that can be wrong before a training starts, all of it at once.

The checks of a start are the ones that a start makes itself, called here one by one; nothing is
trained, and no process group is made. Under a launcher the first process of each node checks its
node. Alone, one process stands for the `expect_world_size` that are planned.
"""

import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import get_default_build_root

from ds_deberta import build
from ds_deberta.builds import PATIENCE
from ds_deberta.checkpoint import TrainState
from ds_deberta.config import PretrainConfig
from ds_deberta.data import Manifest, ShardDataset, load_tokenizer
from ds_deberta.distributed import Place, check_allocation, check_world_size, plan_world_size
from ds_deberta.ds_remarks import remarks
from ds_deberta.hf_tokenizer import read_vocabulary
from ds_deberta.hub import check_push
from ds_deberta.plan import checkpoint_bytes, exports_bytes, shape_of
from ds_deberta.resolve import describe_schedule, resolve, warnings_of
from ds_deberta.run_lock import check_no_run_in

_NCCL_SHM_BYTES = 2**30  # what NCCL's documentation asks of a container: --shm-size=1g


def validate(as_parsed: PretrainConfig, place: Place) -> Iterator[tuple[bool, str]]:
    """Make every check.

    Args:
        as_parsed: what would be trained.
        place: of this process; of one process, `expect_world_size` stand for more.

    Yields:
        Whether it is right, and a line that says what it is, or what is wrong and what to do.
    """
    checks = _Checks()
    expected = as_parsed.expect_world_size
    if place.world_size > 1:
        yield checks.make("processes", lambda: check_world_size(place, expected))
    yield checks.make("allocation", lambda: check_allocation(place, os.environ, expected))
    plan_world_size(place.world_size if place.world_size > 1 else expected or 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    yield checks.make("data", lambda: resolve(as_parsed))
    has_data = checks.results["data"] is not _FAILED
    run = checks.results["data"] if has_data else as_parsed
    yield checks.make("length of rows", lambda: f"{run.data.row_length} tokens", needs="data")
    yield checks.make("schedule", lambda: describe_schedule(run), needs="data")
    for warning in warnings_of(run) if has_data else ():
        yield True, f"NOTE   {warning}"
    yield checks.make("batch", lambda: build.describe_batch(run))
    yield checks.make("vocabulary", lambda: _load_vocabulary(run), needs="data")
    tokenizer = checks.results["vocabulary"]
    yield checks.make("model", lambda: build.model_configs(run, tokenizer), needs="vocabulary")
    configs = checks.results["model"]
    yield checks.make(
        "DeepSpeed, attention", lambda: build.settle(run, configs, device), needs="model batch"
    )
    if checks.results["DeepSpeed, attention"] is not _FAILED:
        ds_config = next(iter(checks.results["DeepSpeed, attention"][0].values()))
        for remark in remarks(run.deepspeed_config, ds_config):
            yield True, f"NOTE   {remark}"
    if run.model.init_model or run.model.init_generator or run.model.init_discriminator:
        yield checks.make(
            "initial weights",
            lambda: build.build_models(run, configs, checks.results["DeepSpeed, attention"][1]),
            needs="model, DeepSpeed, attention",
        )
    in_this_process = replace(run, data=replace(run.data, num_workers=0))
    yield checks.make(
        "training rows",
        lambda: build.build_train_batches(in_this_process, tokenizer, TrainState()),
        needs="vocabulary, batch",
    )
    yield checks.make(
        "held-out rows",
        lambda: _check_evaluation(in_this_process, tokenizer),
        needs="vocabulary, batch",
    )
    yield checks.make("length", lambda: build.describe_length(run), needs="training rows")
    yield checks.make("checksums", lambda: _verify(run), needs="vocabulary")
    yield checks.make(
        "checkpoint to go on from",
        lambda: build.build_checkpointer(run, tokenizer).check(),
        needs="DeepSpeed, attention",
    )
    if name := run.push_to_hub:
        yield checks.make("hub", lambda: check_push(name))
    yield checks.make("output folder", lambda: _check_output_dir(run.output_dir))
    yield checks.make(
        "disk space",
        lambda: _check_disk(run, configs, checks.results["DeepSpeed, attention"][0]),
        needs="DeepSpeed, attention",
    )
    yield checks.make("shared memory", lambda: check_shm(run, place.local_world_size), needs="data")
    yield checks.make("leftovers of dead processes", check_leftovers)
    yield checks.make("locks of dead builds", check_build_locks)


class _Checks:
    """Makes checks that may need others' results, whatever these came to."""

    def __init__(self) -> None:
        self.results: dict[str, Any] = {}

    def make(self, name: str, check: Callable[[], Any], needs: str = "") -> tuple[bool, str]:
        failed = [other for other, result in self.results.items() if result is _FAILED]
        if missing := [other for other in failed if other in needs]:
            self.results[name] = _FAILED
            return False, f"-      {name}: not checked, because it needs {missing[0]}"
        try:
            self.results[name] = result = check()
        except (ValueError, OSError) as error:
            self.results[name] = _FAILED
            return False, f"WRONG  {name}: {error}"
        return True, f"ok     {name}" + (f": {result}" if isinstance(result, str) else "")


_FAILED = object()


def _load_vocabulary(run: PretrainConfig) -> Any:
    tokenizer = load_tokenizer(run.data.data_dir)
    read_vocabulary(tokenizer.vocab_file)
    return tokenizer


def _check_evaluation(run: PretrainConfig, tokenizer: Any) -> str:
    build.build_valid_batches(run, tokenizer)
    return build.describe_evaluation(run)


def _verify(run: PretrainConfig) -> str:
    manifest = Manifest.load(run.data.data_dir)
    for split in manifest.splits:
        ShardDataset(run.data.data_dir, split, manifest).verify()
    return f"{sum(len(split.shards) for split in manifest.splits.values())} shards"


def _check_output_dir(folder: Path) -> None:
    check_writable(folder)
    check_no_run_in(folder)


def check_writable(folder: Path) -> None:
    """Refuse a folder that can not be made or written, without making it."""
    there = _nearest(folder)
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(
            f"{folder} can not be written: {there}: {error.strerror}. Give another --output_dir."
        ) from None


def _nearest(folder: Path) -> Path:
    """The folder itself, or the one it would be made in."""
    return next(each for each in (folder, *folder.absolute().parents) if each.exists())


def _check_disk(run: PretrainConfig, configs: Any, ds_configs: Any) -> str:
    ds_config = next(iter(ds_configs.values()))
    size = checkpoint_bytes(shape_of(run, configs, ds_config, "cpu"))
    saves = -(-run.train.num_training_steps // run.train.dump_interval)
    keep = run.train.keep_checkpoints
    needed = size * (keep + 1 if keep else saves) + exports_bytes(run, size)
    used = sum(
        file.stat().st_size
        for folder in ("checkpoints", "export", "exports")
        for file in (run.output_dir / folder).rglob("*")
        if file.is_file()
    )
    return check_disk(run.output_dir, needed=needed - used)


def check_disk(folder: Path, *, needed: int) -> str:
    """Refuse a folder whose disk has not `needed` bytes left."""
    free = shutil.disk_usage(_nearest(folder)).free
    if free < needed:
        raise ValueError(
            f"checkpoints and exports need {needed / 2**30:,.1f} GiB in {folder}, and "
            f"{free / 2**30:,.1f} GiB are free. Make room, give another --output_dir, or keep "
            "fewer (--keep_checkpoints, --export_interval)."
        )
    return f"{free / 2**30:,.1f} GiB free, {max(0, needed) / 2**30:,.1f} GiB needed"


def check_shm(run: PretrainConfig, local_processes: int, shm: Path = Path("/dev/shm")) -> str:
    """Refuse less shared memory than the data workers' batches and NCCL take."""
    rows = run.train.micro_batch_size or 32
    batch = rows * run.data.row_length * 16  # ids and, in bytes, at most as much beside them
    needed = local_processes * run.data.num_workers * 3 * batch  # two wait, one is being made
    if torch.cuda.is_available():
        needed += _NCCL_SHM_BYTES
    free = shutil.disk_usage(shm).free if shm.is_dir() else 0
    if free < needed:
        raise ValueError(
            f"{shm} has {free / 2**20:,.0f} MiB free, and {needed / 2**20:,.0f} are needed for "
            "batches and NCCL. In a container start it with --shm-size=1g or more; else remove "
            "what lies there, or take fewer --num_workers."
        )
    return f"{free / 2**20:,.0f} MiB free in {shm}"


def check_leftovers(shm: Path = Path("/dev/shm")) -> None:
    """Name DeepSpeed's shared memory that no process uses: 66 MiB of it for each rank of a run."""
    files = [file for file in shm.glob("deepspeed_*") if file.stat().st_uid == os.getuid()]
    if not files:
        return
    used = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            used |= set(re.findall(rf"{re.escape(str(shm))}/deepspeed_\S+", maps.read_text()))
        except OSError:
            continue  # it has just ended, or is another user's
    if dead := [str(file) for file in files if str(file) not in used]:
        raise ValueError(f"no process uses these any more: rm {' '.join(sorted(dead))}")


def check_build_locks() -> None:
    """Name locks that other programs' builds of torch extensions left; a start sweeps ours."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    old = time.time() - PATIENCE
    locks = [path for path in root.glob("**/lock") if not path.is_symlink()]
    if dead := [str(lock) for lock in locks if lock.stat().st_mtime < old]:
        raise ValueError(
            f"older than {PATIENCE / 60:g} minutes, so that a build waits for them in vain, unless "
            f"another one is running: rm {' '.join(sorted(dead))}"
        )
