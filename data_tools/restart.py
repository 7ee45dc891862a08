"""Remember in the data folder what it is made from and how far that has come."""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from encoding import SPLITS
from rows import Progress

from ds_deberta.data.shards import (
    CHECKSUM,
    MANIFEST_FILE,
    Manifest,
    ShardInfo,
    checksum,
    find_damage,
    write_durably,
)

PREPARATION_FILE = "preparation.json"
VOCAB_FILE = "spm.model"
LOCK_ATTEMPTS = 30


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder, and keep other processes from preparing it."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        for attempt in range(LOCK_ATTEMPTS):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == LOCK_ATTEMPTS - 1:
                    raise ValueError(f"another process is preparing {folder}") from None
                time.sleep(0.1)  # the workers of a killed one hold the lock for a moment
            except OSError:
                break  # a file system without locks
        yield
    finally:
        os.close(handle)


def begin(
    folder: Path, settings: dict[str, Any], vocab: bytes, *, overwrite: bool
) -> dict[str, Progress] | None:
    """Return how far earlier runs with these settings came, None if to the end.

    What is not in their finished shards is cleared away, and the vocabulary is put into the folder.
    """
    path, manifest = folder / PREPARATION_FILE, folder / MANIFEST_FILE
    progress = {split: Progress() for split in SPLITS}
    if path.exists():
        old_settings, old_progress = _load(path)
        changes = [
            f"{name}: {old_settings.get(name)} then, {value} now"
            for name, value in settings.items()
            if old_settings.get(name) != value
        ]
        is_finished = _is_finished(folder, vocab)
        is_begun = is_finished or any(each.shards for each in old_progress.values())
        if changes and is_begun and not overwrite:
            raise ValueError(
                f"{folder} was made from other input or settings ({'; '.join(changes)}). "
                "Give another --output, or --overwrite."
            )
        if not changes and not (is_finished and overwrite):
            _check(folder, old_progress)
            if is_finished:
                _clear(folder, old_progress)
                return None
            progress = old_progress
    elif taken := [name for name in (MANIFEST_FILE, *SPLITS) if (folder / name).exists()]:
        raise ValueError(f"{folder} has a {taken[0]} of other origin; give another --output")
    elif (folder / VOCAB_FILE).exists() and (folder / VOCAB_FILE).read_bytes() != vocab:
        raise ValueError(f"{folder / VOCAB_FILE} is another vocabulary; give another --output")
    manifest.unlink(missing_ok=True)
    save_progress(folder, settings, progress)
    write_file(folder / VOCAB_FILE, vocab)
    _clear(folder, progress)
    return progress


def save_progress(folder: Path, settings: dict[str, Any], progress: dict[str, Progress]) -> None:
    """Write both down; a crash leaves the old state or the new one."""
    state = {
        "settings": settings,
        "progress": {split: asdict(each) for split, each in progress.items()},
    }
    state[CHECKSUM] = checksum(state)
    write_file(folder / PREPARATION_FILE, (json.dumps(state, indent=1) + "\n").encode())


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one."""
    write_durably(path, lambda file: file.write(content))


def _load(path: Path) -> tuple[dict[str, Any], dict[str, Progress]]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        # Folders of before there was a checksum lack it.
        if state.pop(CHECKSUM, None) not in (None, checksum(state)):
            raise ValueError(f"its {CHECKSUM} differs")
        progress = {
            split: Progress(
                **fields
                | {"place": tuple(fields["place"])}
                | {"shards": tuple(ShardInfo(**shard) for shard in fields["shards"])}
                | {"open_rows": tuple(map(tuple, fields.get("open_rows", ())))}
            )
            for split, fields in state["progress"].items()
        }
        # Folders of earlier versions lack these settings.
        return {"pack_documents": False, "documents": "file", **state["settings"]}, progress
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete {path.parent}") from None


def _check(folder: Path, progress: dict[str, Progress]) -> None:
    damage = find_damage(folder, (shard for each in progress.values() for shard in each.shards))
    if damage:
        raise ValueError("\n".join(damage))


def _is_finished(folder: Path, vocab: bytes) -> bool:
    """True if manifest and vocabulary are there; damaged ones are written anew."""
    try:
        Manifest.load(folder)
        return (folder / VOCAB_FILE).read_bytes() == vocab
    except (ValueError, FileNotFoundError):
        return False


def _clear(folder: Path, progress: dict[str, Progress]) -> None:
    """Delete shards that are unfinished, or of other settings."""
    kept = {folder / shard.file for each in progress.values() for shard in each.shards}
    for split in SPLITS:
        for path in set((folder / split).glob("*.arrow*")) - kept:
            path.unlink()
