"""What must be the same on all ranks: code, data, configuration, output folder; at the start.

Nodes have copies of their own, and flags of their own where each is started by hand. A difference
would train on without a word, or hang. So would damaged data: every node reads all of its own.
"""

import contextlib
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar, cast

from ds_deberta import __version__
from ds_deberta.config import PretrainConfig
from ds_deberta.data import Manifest, find_damage, load_tokenizer
from ds_deberta.distributed import (
    gather_objects,
    is_main,
    logger,
    place_on_node,
    world_size,
)

T = TypeVar("T")

_NAMED = 3  # damaged files
_VISIBLE = 60.0  # seconds that NFS may keep what it knows of a folder (its acdirmax)
_BETWEEN_LOOKS = 0.1
_PLACES = ("data_dir",)  # may differ, for what is there is compared


def check_agreement(run: PretrainConfig) -> None:
    """Compare this rank's code, data and configuration with the others'.

    Raises:
        ValueError: on every rank, if one differs; names the kind, what of it, and the ranks.
    """
    code = {"ds_deberta": __version__} | {name: version(name) for name in ("torch", "deepspeed")}
    code["the files of ds_deberta"] = _hash_code()
    check_same("code", code)
    manifest = on_all_ranks(lambda: Manifest.load(run.data.data_dir))
    data = " ".join(f"{name} {data_fingerprint(manifest, name)}" for name in manifest.splits)
    check_same("data", {str(run.data.data_dir): data})
    settings = {k: str(v) for k, v in json.loads(run.to_json()).items() if k not in _PLACES}
    for name in ("model", "deepspeed_config"):
        file = Path(settings[name])
        settings[name] = _hash(file.read_bytes()) if file.is_file() else settings[name]
    check_same("configuration", settings)


def check_data(data_dir: Path) -> None:
    """Read all data against their hashes, once on every node, its processes a share each.

    Raises:
        ValueError: on every rank, if a file is missing or not what was written; names it.
    """
    started = time.perf_counter()
    manifest = on_all_ranks(lambda: Manifest.load(data_dir))
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    number, of = place_on_node()

    def read_share() -> None:
        load_tokenizer(data_dir)
        damage = find_damage(data_dir, shards[number::of])
        if damage:
            more = f"\n... and {len(damage) - _NAMED} more" if len(damage) > _NAMED else ""
            raise ValueError("\n".join(damage[:_NAMED]) + more)

    on_all_ranks(read_share)
    seconds, gigabytes = time.perf_counter() - started, sum(s.bytes for s in shards) / 1e9
    logger.info(
        "verified %d shards, %.3g GB, in %.1f s; %d processes of each node shared them",
        *(len(shards), gigabytes, seconds, of),
    )


def check_output_dir(folder: Path) -> None:
    """See that a folder is the same on all nodes: a checkpoint gets files of every rank.

    Raises:
        ValueError: on every rank, if the first one can not write there, or one sees another folder.
    """
    if world_size() == 1:
        return
    name, *_ = gather_objects(f".seen_by_all_{secrets.token_hex(8)}")
    token, was_there = folder / name, folder.exists()

    def make() -> None:
        if is_main():
            folder.mkdir(parents=True, exist_ok=True)
            token.touch()

    try:
        on_all_ranks(make)
        on_all_ranks(lambda: _see(token))
    finally:
        if is_main():
            with contextlib.suppress(OSError):
                token.unlink()
                if not was_there:
                    folder.rmdir()


def _see(token: Path) -> None:
    """Wait for a file; NFS may show for some time what a folder held before."""
    deadline = time.monotonic() + _VISIBLE
    while not token.exists():
        if time.monotonic() > deadline:
            raise ValueError(
                f"--output_dir must be one folder on all nodes, for checkpoints: {token.parent} "
                "here does not show the file that rank 0 wrote there. Put it on a file system "
                "that all nodes mount at the same path (NFS)."
            )
        time.sleep(_BETWEEN_LOOKS)
        with contextlib.suppress(OSError):
            os.listdir(token.parent)  # has NFS ask again


def on_all_ranks(act: Callable[[], T]) -> T:
    """Act on every rank; where one fails, let all of them fail alike.

    Raises:
        ValueError: on every rank, if one met a ValueError or an OSError; says what, and which.
    """
    result, problem = None, ""
    try:
        result = act()
    except (ValueError, OSError) as error:
        problem = str(error)
    by_text: dict[str, list[str]] = {}
    for number, text in enumerate(gather_objects(problem)):
        by_text.setdefault(text, []).append(str(number))
    by_text.pop("", None)
    if by_text:
        raise ValueError(
            "\n".join(
                text if len(ranks) == world_size() else f"{text} (found by rank {', '.join(ranks)})"
                for text, ranks in by_text.items()
            )
        )
    return cast(T, result)


def check_same(kind: str, facts: Mapping[str, str]) -> None:
    """Compare facts by name, the same names on every rank.

    Raises:
        ValueError: on every rank, if one differs.
    """
    first, *_ = everyone = gather_objects(list(facts.values()))
    ranks = [str(i) for i, values in enumerate(everyone) if values != first]
    if ranks:
        names = [
            name
            for name, values in zip(facts, zip(*everyone, strict=True), strict=True)
            if len(set(values)) > 1
        ]
        raise ValueError(
            f"{kind} must be the same on all ranks; other than on rank 0 on rank "
            f"{', '.join(ranks)}: {', '.join(names)}"
        )


def data_fingerprint(manifest: Manifest, split: str = "train") -> str:
    """One hash for the vocabulary and every row of a split."""
    digest = hashlib.sha256(manifest.tokenizer.sha256.encode())
    for shard in manifest.splits[split].shards:
        digest.update(shard.sha256.encode())
    return digest.hexdigest()


def _hash_code() -> str:
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder)} {_hash(file.read_bytes())}\n".encode())
    return digest.hexdigest()


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
