"""Checkpoints as any reader of safetensors sees them."""

from pathlib import Path

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
