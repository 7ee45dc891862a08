"""A training step never waits for the device, which on a GPU would leave it idle.

The step runs on the CPU here, where every operation can be watched: it may not read a value, nor
make a tensor whose shape depends on values.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ds_deberta.objectives.mlm import MLMObjective
from ds_deberta.optim import OptimConfig, build_optimizer
from tests.cases import CLIP, build_models
from tests.objectives.test_rtd import TorchEngine, random_batch, rtd

READING_METHODS = {
    *("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__")
}
SYNCING_OPS = {
    *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2"),
    *("unique_dim", "unique_consecutive", "repeat_interleave", "_coalesce"),
}


class NoReading(TorchFunctionMode):
    """Refuses the methods that bring values to the host; `tolist` is no operation of its own."""

    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        if getattr(func, "__name__", "") in READING_METHODS:
            raise AssertionError(f"{func.__name__} waits for the device")
        return func(*args, **(kwargs or {}))


class NoSync(TorchDispatchMode):
    """Refuses the operations that wait for values, in the backward pass as well."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in SYNCING_OPS or by_mask:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


class AdamWEngine(TorchEngine):
    """Clips and updates as a DeepSpeed engine without ZeRO does."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(module)
        self.optimizer = build_optimizer(module, OptimConfig(), lr=1e-3)  # type: ignore[assignment]

    def step(self) -> None:
        self.optimizer.clip(CLIP)  # type: ignore[attr-defined]
        super().step()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["mlm", "gdes", "es", "nes"])
def test_a_training_step_never_waits_for_the_device(tokenizer, kind: str, packed: bool) -> None:
    batch = random_batch(tokenizer, rows=3)
    if packed:
        batch = replace(batch, documents=batch.documents * (1 + (torch.arange(32) >= 10)))
    if kind == "mlm":
        objective = MLMObjective(AdamWEngine(build_models("mlm", "nes", tokenizer)["model"]))
    else:
        objective = rtd(tokenizer, kind, engine=AdamWEngine)
    with NoReading(), NoSync():
        metrics = objective.train_step([batch])
    assert all(total.isfinite() for total, _ in metrics.means.values())


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x[x > 0],
        lambda x: torch.where(x > 0),
        lambda x: bool(x.any()),
        lambda x: torch.masked_select(x, x > 0),
        lambda x: x.unique(),
        lambda x: x.index_put((x > 0,), x.new_zeros(())),
    ],
)
def test_the_watch_sees_what_waits(read) -> None:
    with pytest.raises(AssertionError, match="waits for the device"), NoReading(), NoSync():
        read(torch.arange(3.0))
