"""Disentangled attention, with the one switch between its implementations; the vocabulary head."""

import torch

from ds_deberta.kernels.linear_cross_entropy import HeadOutput, linear_cross_entropy
from ds_deberta.kernels.reference import AttentionFn, disentangled_attention

__all__ = [
    "AttentionFn",
    "HeadOutput",
    "disentangled_attention",
    "linear_cross_entropy",
    "select_attention",
]

ATTENTION_NAMES = ("auto", "reference")


def select_attention(
    name: str, *, device: torch.device | str, dtype: torch.dtype
) -> tuple[AttentionFn, str]:
    """Pick the attention function once, at start-up.

    Returns:
        The function, and one line for the log that says what was picked and why.
    """
    if name not in ATTENTION_NAMES:
        choices = ", ".join(ATTENTION_NAMES)
        raise ValueError(f"attention must be one of {choices}; got {name!r}. Choose one of these.")
    where = f"{torch.device(device).type}, {str(dtype).removeprefix('torch.')}"
    why = "as asked" if name == "reference" else "no fused kernel for this device"
    return disentangled_attention, f"attention: reference (plain torch) on {where}: {why}"
