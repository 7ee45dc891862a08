from types import SimpleNamespace

import deepspeed
import pytest
import torch
from torch import nn

from ds_deberta.engine import Engine, initialize_engine
from ds_deberta.optim import OptimConfig


def test_a_parameter_can_not_end_up_in_two_engines(monkeypatch):
    """DeepSpeed itself trains it wrongly under ZeRO-1, without a word."""
    monkeypatch.setattr(deepspeed, "initialize", lambda **kwargs: (SimpleNamespace(), None, None))
    shared = nn.Embedding(4, 2)
    first = nn.ModuleDict({"table": shared, "dense": nn.Linear(2, 2)})
    second = nn.ModuleDict({"words": shared})

    def wrap(module: nn.Module) -> Engine:
        return initialize_engine(module, {}, optim=OptimConfig(), lr=1e-3, total_steps=1)

    wrap(first)
    with pytest.raises(ValueError, match=r"words\.weight is a parameter of another engine"):
        wrap(second)


def test_the_cpu_needs_no_shared_memory_op():
    """It would be built with g++ and leave 66 MiB per rank in /dev/shm; see engine.py."""
    if torch.cuda.is_available():
        pytest.skip("CPU only")
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False
