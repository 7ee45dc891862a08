"""torch.compile for the layers of an encoder."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn

from ds_deberta.distributed import without_triton

CPU_ACTIVATION_BUDGET = 0.95
"""Share of the activations that a compiled layer keeps on a CPU; the cheapest of the rest are made
again. With 0.95 the second shape of benchmarks/step.py needs 40 MiB less and takes as long as with
all of them (1.002 times, 30 paired steps on a Xeon); with 0.9, 1.014 times."""


def compile_layer(layer: nn.Module) -> None:
    """Have torch.compile make a layer at its first call; those of one shape share the result."""
    with without_triton():
        layer.compile(backend=_inductor, dynamic=False)  # one shape: symbols would cost minutes


def _inductor(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Compile as torch.compile's default does, on a CPU with what pays there.

    A C++ wrapper calls the kernels with less delay than Python; triton is not loaded.
    """
    with without_triton():
        from torch._functorch import config
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    if not all(each.device.type == "cpu" for each in inputs if isinstance(each, Tensor)):
        return compile_fx(graph, inputs)
    with config.patch(activation_memory_budget=CPU_ACTIVATION_BUDGET):
        return compile_fx(
            graph,
            inputs,
            inner_compile=without_triton()(compile_fx_inner),  # it compiles the backward pass later
            config_patches={"cpp_wrapper": True},
        )
