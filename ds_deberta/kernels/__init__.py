"""Disentangled attention and the switch between its kinds, the vocabulary head, dropout."""

from importlib.util import find_spec

import torch

from ds_deberta.kernels.cpu_attention import cpu_attention
from ds_deberta.kernels.dropout import Dropout, dropout
from ds_deberta.kernels.linear_cross_entropy import HeadOutput, linear_cross_entropy
from ds_deberta.kernels.reference import AttentionFn, disentangled_attention
from ds_deberta.kernels.table_gradient import TableGradient
from ds_deberta.kernels.tied_lookup import tied_lookup

__all__ = [
    "AttentionFn",
    "Dropout",
    "HeadOutput",
    "TableGradient",
    "disentangled_attention",
    "dropout",
    "linear_cross_entropy",
    "plan_attention",
    "select_attention",
    "tied_lookup",
]

ATTENTION_NAMES = ("auto", "cpu", "reference", "triton")


def select_attention(
    name: str, *, device: torch.device | str, dtype: torch.dtype, head_size: int
) -> tuple[AttentionFn, str]:
    """Pick the attention function once, at start-up.

    Args:
        name: one of ATTENTION_NAMES; auto is what is written for the device, else the reference.
        device: that the model runs on.
        dtype: that it computes in.
        head_size: of the model.

    Returns:
        The function, and one line for the log that says what was picked and why.

    Raises:
        ValueError: an unknown name, or one that can not run here.
    """
    if name not in ATTENTION_NAMES:
        choices = ", ".join(ATTENTION_NAMES)
        raise ValueError(f"attention must be one of {choices}; got {name!r}. Choose one of these.")
    device = torch.device(device)
    fast = "cpu" if device.type == "cpu" else "triton"
    chosen = fast if name == "auto" else name
    why = "written for it" if name == "auto" else "as asked"
    if obstacle := _obstacle(chosen, device, dtype, head_size):
        if name != "auto":
            raise ValueError(
                f"attention {name} needs {obstacle}. Use --attention auto, which takes what runs "
                "here."
            )
        chosen, why = "reference", f"{fast} needs {obstacle}"
    where = f"{device.type}, {str(dtype).removeprefix('torch.')}, heads of {head_size}"
    return _function(chosen), f"attention: {chosen} on {where}: {why}"


def plan_attention(name: str, *, device: str, head_size: int) -> AttentionFn:
    """The attention that `select_attention` would pick on a `cpu` or a new `gpu`, wherever this is.

    Raises:
        ValueError: a GPU's, without the package triton.
    """
    if name == "auto":
        name = "cpu" if device == "cpu" else "triton"
    if name == "triton":
        if find_spec("triton") is None:
            raise ValueError("a plan for GPUs needs the package triton; install it")
        from ds_deberta.kernels import triton_attention

        if head_size not in triton_attention.HEAD_SIZES:
            name = "reference"
    return _function(name)


def _function(name: str) -> AttentionFn:
    if name == "triton":  # here, for a machine may have no triton
        from ds_deberta.kernels import triton_attention

        return triton_attention.disentangled_attention
    return {"cpu": cpu_attention, "reference": disentangled_attention}[name]


def _obstacle(name: str, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Say what an implementation needs and does not have; None where it runs."""
    if name == "reference":
        return None
    if name == "cpu":
        return None if device.type == "cpu" else f"a CPU; got {device.type}"
    if device.type != "cuda":
        return f"a CUDA device; got {device.type}"
    if find_spec("triton") is None:
        return "the package triton; install it"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"compute capability 8.0 or more; got {capability[0]}.{capability[1]}"
    from ds_deberta.kernels import triton_attention

    if head_size not in triton_attention.HEAD_SIZES:
        sizes = ", ".join(map(str, triton_attention.HEAD_SIZES))
        return f"a head size of {sizes}; got {head_size}"
    if dtype not in triton_attention.DTYPES:
        return f"16 or 32 bit floating point; got {dtype}"
    return None
