"""Values of a DeepSpeed JSON that DeepSpeed itself does not look at before the first step."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 <= value <= 1e300 and math.isfinite(value)


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


_SWITCHES = (
    *("disable_allgather", "dump_state", "memory_breakdown", "prescale_gradients"),
    *("wall_clock_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
)
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "gradient_clipping": (_is_number, "a number, 0 for none"),
    "gradient_predivide_factor": (lambda value: _is_number(value) and value > 0, "a number over 0"),
    "steps_per_print": (
        lambda value: value is None or (type(value) is int and value > 0),
        "a whole number over 0, or null",
    ),
    **dict.fromkeys(_SWITCHES, (_is_switch, "true or false")),
}


def check_values(path: Path, config: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Refuse values that would end the first step in a traceback.

    Args:
        path: of the JSON.
        config: its content, without any "auto".
        dtype: that it computes in.

    Raises:
        ValueError: one of them, by its name.
    """
    for name, (fits, rule) in _RULES.items():
        if name in config and not fits(config[name]):
            raise ValueError(f"{path}: {name} must be {rule}; got {config[name]!r:.40}")
    data_types = config.get("data_types", {})
    if not isinstance(data_types, Mapping):
        raise ValueError(f"{path}: data_types must be a JSON object, got {data_types!r:.40}")
    own = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    if config.get("torch_autocast", {}).get("enabled"):
        own = "fp32"  # the weights' and so their gradients'
    sums = data_types.get("grad_accum_dtype")
    if sums not in (None, "fp32", own):
        raise ValueError(
            f"{path}: data_types.grad_accum_dtype must be {' or '.join(sorted({'fp32', own}))} "
            f"where gradients are {own}; got {sums!r:.40}. Remove it."
        )
    for name in config.get("torch_autocast", {}).get("lower_precision_safe_modules") or ():
        package, _, kind = str(name).rpartition(".")
        if package != "torch.nn" or not hasattr(nn, kind):
            raise ValueError(
                f"{path}: torch_autocast.lower_precision_safe_modules must be names as "
                f"torch.nn.Linear; got {name!r:.40}. Remove it: DeepSpeed's own list is right."
            )
