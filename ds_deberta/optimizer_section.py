"""The optimizer that a DeepSpeed JSON may name: filled in from the recipe, tried before a start.

Without that section ours is used, see optim.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_ADAM = ("adam", "adamw")
_UNTRIED = ("lamb", "lion", "muon", "muadam", "muadamw", "musgd")  # of DeepSpeed's own
# What DeepSpeed's Adam takes, on GPUs, CPUs and offloaded.
_ADAM_PARAMS = {
    "adam_w_mode",
    "betas",
    "bias_correction",
    "eps",
    "lr",
    "torch_adam",
    "weight_decay",
}
_NOT_TORCHS = ("adam_w_mode", "torch_adam")  # read by DeepSpeed on the way to torch's Adam


def fill_optimizer(path: Path, config: dict[str, Any]) -> None:
    """Have the recipe decide what an optimizer section leaves out; else its class would.

    Raises:
        ValueError: the section names no optimizer, or its `params` are no object.
    """
    section = config["optimizer"]
    if not isinstance(section.get("type"), str):
        raise ValueError(
            f'{path}: optimizer.type must be a name, "AdamW" for instance; got '
            f"{section.get('type')!r}. Name one, or remove the section: ours is AdamW."
        )
    params = section.setdefault("params", {})
    if not isinstance(params, dict):
        raise ValueError(f"{path}: optimizer.params must be a JSON object, got {params!r:.40}")
    is_adam = section["type"].lower() in _ADAM
    for name in ("lr", "betas", "eps") if is_adam else ("lr",):
        params.setdefault(name, "auto")


def check_optimizer(path: Path, section: Mapping[str, Any]) -> None:
    """Refuse an optimizer that the training could not begin with.

    Raises:
        ValueError: there is none of that name, or not with these params; says why.
    """
    name, params = section["type"], section["params"]
    is_adam = name.lower() in _ADAM
    if name.lower() in _UNTRIED:
        raise ValueError(
            f"{path}: optimizer.type {name} of DeepSpeed has never been tried with checkpoints. "
            "Use AdamW, or remove the section: ours is AdamW."
        )
    if is_adam and not params.get("torch_adam"):
        if unknown := sorted(params.keys() - _ADAM_PARAMS):
            raise ValueError(
                f"{path}: optimizer.params has {unknown[0]!r}, which DeepSpeed's {name} does not "
                f"take; it takes {', '.join(sorted(_ADAM_PARAMS))}"
            )
        return
    if is_adam:
        is_decoupled = name.lower() == "adamw" or params.get("adam_w_mode", True)
        kind: Any = torch.optim.AdamW if is_decoupled else torch.optim.Adam
        params = {key: value for key, value in params.items() if key not in _NOT_TORCHS}
    else:
        kind = getattr(torch.optim, "Adagrad" if name.lower() == "adagrad" else name, None)
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise ValueError(
            f"{path}: optimizer.type must be AdamW, Adam or an optimizer of torch.optim; got "
            f"{name!r}. Name one of these, or remove the section: ours is AdamW."
        )
    _try(path, kind, params)


def _try(path: Path, kind: Any, params: Mapping[str, Any]) -> None:
    """Make one step on two groups of parameters, as a training has them."""
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    for parameter in parameters:
        parameter.grad = torch.ones(2)
    groups = [{"params": [parameter], "weight_decay": 0.0} for parameter in parameters]
    try:
        kind(groups, **params).step()
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{path}: torch's {kind.__name__} refuses to start: {error}") from None
