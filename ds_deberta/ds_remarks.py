"""What a DeepSpeed JSON says without effect here, or leaves out: said in the log, not refused."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_NEVER = {  # section or switch -> what does it here
    "activation_checkpointing": "use --activation_checkpointing",
    "checkpoint": "checkpoints are written by this program itself",
}


def remarks(path: Path, config: Mapping[str, Any]) -> Iterator[str]:
    """Say what a user may not have meant.

    Args:
        path: of the JSON.
        config: what `load_ds_config` made of it.
    """
    if useless := list(_without_effect(config)):
        yield f"{path} says without effect: {'; '.join(useless)}"
    if config.get("gradient_clipping") is None:
        yield (
            f"{path} has no gradient_clipping, and --max_grad_norm is not given: gradients are not "
            'clipped, whatever their norm. Give --max_grad_norm 1, or write "gradient_clipping": '
            '"auto", as ds_configs/ do.'
        )


def _without_effect(config: Mapping[str, Any]) -> Iterator[str]:
    for name, instead in _NEVER.items():
        value = config.get(name)
        if value and not (isinstance(value, Mapping) and value.get("enabled") is False):
            yield f"{name} ({instead})"
    for name in ("bf16", "fp16", "torch_autocast"):
        section = config.get(name, {})
        if not section.get("enabled") and section.keys() - {"enabled"}:
            yield f"{name} (it is not enabled)"
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage == 0 and (rest := sorted(zero.keys() - {"stage"})):
        yield f"zero_optimization's {', '.join(rest)} (its stage is 0)"
    elif stage < 3 and (rest := sorted(name for name in zero if name.startswith("stage3_"))):
        yield f"zero_optimization's {', '.join(rest)} (its stage is {stage})"
    places = [zero.get(f"offload_{part}") or {} for part in ("optimizer", "param")]
    if "aio" in config and not any(place.get("device") == "nvme" for place in places):
        yield "aio (nothing is offloaded to NVMe)"
