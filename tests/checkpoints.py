"""Checkpoints as any reader of safetensors sees them."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


def tensors(model: Path, kind: str = "weights") -> dict[str, Tensor]:
    """All tensors of one kind that a model's folder holds, by name."""
    found: dict[str, Tensor] = {}
    for file in sorted(model.glob(f"{kind}-*.safetensors")):
        more = load_file(file)
        assert not found.keys() & more.keys()
        found |= more
    return found


def check_same_bits(found: Path, expected: Path) -> None:
    """Compare all weights and moments of all models of two checkpoints."""
    models = {path.name for path in expected.iterdir() if path.is_dir()}
    assert {path.name for path in found.iterdir() if path.is_dir()} == models != set()
    for model in models:
        for kind in ("weights", "exp_avg", "exp_avg_sq"):
            ours, theirs = tensors(found / model, kind), tensors(expected / model, kind)
            assert ours.keys() == theirs.keys() != set()
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs), kind
