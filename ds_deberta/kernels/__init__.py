"""Disentangled attention and the switch between its kinds, the vocabulary head, dropout."""

import torch

from ds_deberta.kernels.cpu_attention import cpu_attention
from ds_deberta.kernels.dropout import Dropout, dropout
from ds_deberta.kernels.linear_cross_entropy import HeadOutput, linear_cross_entropy
from ds_deberta.kernels.reference import AttentionFn, disentangled_attention

__all__ = [
    "AttentionFn",
    "Dropout",
    "HeadOutput",
    "disentangled_attention",
    "dropout",
    "linear_cross_entropy",
    "select_attention",
]

ATTENTION = {"cpu": cpu_attention, "reference": disentangled_attention}


def select_attention(
    name: str, *, device: torch.device | str, dtype: torch.dtype
) -> tuple[AttentionFn, str]:
    """Pick the attention function once, at start-up.

    Args:
        name: auto, or one of ATTENTION.
        device: that the model runs on.
        dtype: that it computes in.

    Returns:
        The function, and one line for the log that says what was picked and why.
    """
    kind = torch.device(device).type
    if name != "auto" and name not in ATTENTION:
        choices = ", ".join(("auto", *ATTENTION))
        raise ValueError(f"attention must be one of {choices}; got {name!r}. Choose one of these.")
    if name == "cpu" and kind != "cpu":
        raise ValueError(f"attention cpu runs on a CPU; the device is {kind}. Choose auto.")
    why = "as asked"
    if name == "auto":
        name, why = ("cpu", "written for it") if kind == "cpu" else ("reference", "no fused kernel")
    return ATTENTION[
        name
    ], f"attention: {name} on {kind}, {str(dtype).removeprefix('torch.')}: {why}"
