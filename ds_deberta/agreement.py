"""What must be the same on all ranks: code, data and configuration, compared at the start.

Nodes have copies of their own, and flags of their own where each is started by hand. A difference
would train on without a word, or hang.
"""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch

from ds_deberta import __version__
from ds_deberta.config import PretrainConfig
from ds_deberta.data import Manifest
from ds_deberta.distributed import gather_across_ranks, world_size

_PLACES = ("data_dir",)  # may differ, for what is there is compared


def check_agreement(run: PretrainConfig, device: torch.device) -> None:
    """Compare this rank's code, data and configuration with the others'.

    Raises:
        ValueError: on every rank, if one differs; names the kind, what of it, and the ranks.
    """
    code = {"ds_deberta": __version__} | {name: version(name) for name in ("torch", "deepspeed")}
    code["the files of ds_deberta"] = _hash_code()
    check_same("code", code, device)
    try:
        manifest = Manifest.load(run.data.data_dir)
        data = " ".join(f"{name} {data_fingerprint(manifest, name)}" for name in manifest.splits)
    except (ValueError, FileNotFoundError) as error:
        data = type(error).__name__  # if all ranks agree on that, the next to load it says more
    check_same("data", {str(run.data.data_dir): data}, device)
    settings = {k: str(v) for k, v in json.loads(run.to_json()).items() if k not in _PLACES}
    for name in ("model", "deepspeed_config"):
        file = Path(settings[name])
        settings[name] = _hash(file.read_bytes()) if file.is_file() else settings[name]
    check_same("configuration", settings, device)


def check_same(kind: str, facts: Mapping[str, str], device: torch.device) -> None:
    """Compare facts by name, the same names on every rank.

    Raises:
        ValueError: on every rank, if one differs.
    """
    short = [int(_hash(value.encode())[:15], 16) for value in facts.values()]
    mine = torch.tensor(short, device=device)
    table = gather_across_ranks(mine).view(world_size(), -1).cpu()
    different = table != table[0]
    if different.any():
        ranks = ", ".join(str(i) for i, row in enumerate(different) if row.any())
        names = ", ".join(name for name, i in zip(facts, different.any(0), strict=True) if i)
        raise ValueError(
            f"{kind} must be the same on all ranks; other than on rank 0 on rank {ranks}: {names}"
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
