"""Disentangled attention, and the one switch between its implementations."""

from importlib.util import find_spec

import torch

from ds_deberta.kernels.reference import AttentionFn, disentangled_attention

__all__ = ["AttentionFn", "disentangled_attention", "select_attention"]

ATTENTION_NAMES = ("auto", "reference", "triton")


def select_attention(
    name: str, *, device: torch.device | str, dtype: torch.dtype, head_size: int
) -> tuple[AttentionFn, str]:
    """Pick the attention function once, at start-up.

    Returns:
        The function, and one line for the log that says what was picked and why.
    """
    if name not in ATTENTION_NAMES:
        choices = ", ".join(ATTENTION_NAMES)
        raise ValueError(f"attention must be one of {choices}; got {name!r}. Choose one of these.")
    device = torch.device(device)
    where = f"{device.type}, {str(dtype).removeprefix('torch.')}, heads of {head_size}"
    obstacle = _triton_obstacle(device, dtype, head_size)
    if name == "triton" and obstacle:
        raise ValueError(
            f"attention triton needs {obstacle}. Use --attention auto, which takes what runs here."
        )
    if name == "reference" or obstacle:
        why = "as asked" if name == "reference" else f"triton needs {obstacle}"
        return disentangled_attention, f"attention: reference (plain torch) on {where}: {why}"
    from ds_deberta.kernels import triton_attention

    why = "as asked" if name == "triton" else "it runs here"
    return triton_attention.disentangled_attention, f"attention: triton (fused) on {where}: {why}"


def _triton_obstacle(device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Say what the Triton kernels need and do not have; None where they run."""
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
