import inspect
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import pytest
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn

from ds_deberta.engine import Engine, _global_norm, initialize_engine
from ds_deberta.horizon import Horizon
from ds_deberta.optim import OptimConfig
from tests.launch import ROOT, clean_environment


def test_a_parameter_can_not_end_up_in_two_engines(monkeypatch):
    """DeepSpeed itself trains it wrongly under ZeRO-1, without a word."""
    monkeypatch.setattr(deepspeed, "initialize", lambda **kwargs: (SimpleNamespace(), None, None))
    shared = nn.Embedding(4, 2)
    first = nn.ModuleDict({"table": shared, "dense": nn.Linear(2, 2)})
    second = nn.ModuleDict({"words": shared})

    def wrap(module: nn.Module) -> Engine:
        return initialize_engine(module, {}, optim=OptimConfig(), lr=1e-3, horizon=Horizon(1))

    wrap(first)
    with pytest.raises(ValueError, match=r"words\.weight is a parameter of another engine"):
        wrap(second)


def test_an_engine_follows_a_schedule_that_changes():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=2.0)
    end = [10]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / end[0])
    for _ in range(5):
        optimizer.step()
        schedule.step()
    end[0] = 20
    Engine(SimpleNamespace(lr_scheduler=schedule), clip=None).follow_schedule()
    assert optimizer.param_groups[0]["lr"] == schedule.get_last_lr()[0] == 1.5
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1.4)


def test_the_cpu_needs_no_shared_memory_op():
    """It would be built with g++ and leave 66 MiB per rank in /dev/shm; see engine.py."""
    if torch.cuda.is_available():
        pytest.skip("CPU only")
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_under_zero_is_that_of_all_ranks_gradients(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
):
    """In single precision, whatever theirs; not finite as soon as one of them is not."""
    torch.manual_seed(0)
    theirs = torch.tensor(3.0)

    def all_reduce(square: torch.Tensor, group: object) -> None:
        assert group == "all ranks"
        square += theirs

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    grads = [torch.randn(700, 500).to(dtype), torch.zeros(0, dtype=dtype), torch.ones(3).to(dtype)]
    optimizer = SimpleNamespace(
        averaged_gradients={0: [None, *grads[:2]], 1: grads[2:]},
        device=torch.device("cpu"),
        dp_process_group="all ranks",
    )
    truth = (sum(grad.double().square().sum() for grad in grads) + theirs).sqrt()
    torch.testing.assert_close(_global_norm(optimizer).double(), truth, rtol=1e-6, atol=0)
    for grad in (grads[0][1], grads[2]):
        for value in (math.nan, math.inf, -math.inf):
            before, grad[1] = grad[1].item(), value
            assert not _global_norm(optimizer).isfinite()
            grad[1] = before
    assert _global_norm(optimizer).isfinite()
    theirs.fill_(math.nan)
    assert not _global_norm(optimizer).isfinite()


def test_deepspeed_asks_where_the_answers_are_ours():
    asked = inspect.getsource(DeepSpeedZeroOptimizer.step)
    assert "self.check_overflow(partition_gradients=" in asked
    assert "scaled_global_grad_norm = self.scaled_global_norm()" in asked
    assert "is_invalid_grad_norm(scaled_global_grad_norm)" in asked


_IN_PARTS = """
import copy
import torch
from pathlib import Path
from ds_deberta.distributed import initialize, shutdown
from ds_deberta.engine import DeepSpeedFacts, initialize_engine, load_ds_config
from ds_deberta.horizon import Horizon
from ds_deberta.model import DebertaConfig, DebertaForMaskedLM
from ds_deberta.optim import OptimConfig, build_optimizer

initialize(seed=0)
optim = OptimConfig(learning_rate=1e-3, warmup=0, lr_schedule="constant")
facts = dict(train_batch_size=2, micro_batch_size=2, hidden_size=16, lr=1e-3, optim=optim)
config = load_ds_config(Path("ds_configs/zero0_fp32.json"), DeepSpeedFacts(**facts))
sizes = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
truth = DebertaForMaskedLM(DebertaConfig(**sizes)).eval()
engine = initialize_engine(copy.deepcopy(truth), config, optim=optim, lr=1e-3, horizon=Horizon(9))
engine.module.eval()
plain = build_optimizer(truth, optim, 1e-3)
held = engine.module.table_gradient
for step in range(5):
    ids = torch.randint(5, 40, (2, 6))
    batch = (ids, ids > 0, torch.tensor([[1, 4], [2, 3]]), ids[:, [1, 4]])
    engine.backward(engine(*batch).loss * (torch.nan if step == 2 else 1.0))
    assert not held.is_empty
    engine.step()
    truth(*batch).loss.backward()
    assert held.is_empty
    assert engine.applied == (step != 2)
    if step != 2:
        norm = torch.nn.utils.clip_grad_norm_(truth.parameters(), 1.0)
        torch.testing.assert_close(engine.stats()["grad_norm"], norm.item(), rtol=1e-5, atol=0)
        plain.step()
    plain.zero_grad()
ours = dict(engine.module.named_parameters())
torch.testing.assert_close(ours, dict(truth.named_parameters()))
print("equal")
shutdown()
"""


@pytest.mark.distributed
def test_a_table_s_gradient_in_parts_trains_as_a_whole_one():
    """On one CPU; a bad step in the middle leaves nothing of itself behind."""
    if torch.cuda.is_available():
        pytest.skip("CPU only")
    command = [sys.executable, "-c", _IN_PARTS]
    printed = subprocess.check_output(command, cwd=ROOT, env=clean_environment(), text=True)
    assert printed.split() == ["equal"]


_STEP = """
import sys
import torch
from pathlib import Path
from ds_deberta.distributed import initialize, shutdown
from ds_deberta.engine import DeepSpeedFacts, initialize_engine, load_ds_config
from ds_deberta.horizon import Horizon
from ds_deberta.optim import OptimConfig

initialize(seed=0)
optim = OptimConfig(learning_rate=1e-3)
facts = dict(train_batch_size=1, micro_batch_size=1, hidden_size=8, lr=1e-3, optim=optim)
config = load_ds_config(Path("ds_configs/zero0_fp32.json"), DeepSpeedFacts(**facts))
engine = initialize_engine(torch.nn.Linear(8, 8), config, optim=optim, lr=1e-3, horizon=Horizon(9))
engine.backward(engine(torch.ones(1, 8)).sum())
engine.step()
print(sorted({"torch._dynamo", "triton", "sympy"} & set(sys.modules)))
shutdown()
"""


_END = """
import gc
import sys
import torch
from pathlib import Path
from ds_deberta.distributed import initialize, shutdown
from ds_deberta.engine import DeepSpeedFacts, initialize_engine, load_ds_config
from ds_deberta.horizon import Horizon
from ds_deberta.optim import OptimConfig

initialize(seed=0)
optim = OptimConfig(learning_rate=1e-3)
facts = dict(train_batch_size=1, micro_batch_size=1, hidden_size=8, lr=1e-3, optim=optim)
for name in ("zero0_fp32", "zero1_fp32", "zero2_fp32", "zero3_fp32"):
    config = load_ds_config(Path(f"ds_configs/{name}.json"), DeepSpeedFacts(**facts))
    module = torch.nn.Linear(8, 8)
    engine = initialize_engine(module, config, optim=optim, lr=1e-3, horizon=Horizon(9))
    engine.backward(engine(torch.ones(1, 8)).sum())
    engine.step()
    loaded = set(sys.modules)
    del engine
    gc.collect()
    print(name, sorted(set(sys.modules) - loaded))
shutdown()
"""


@pytest.mark.distributed
def test_the_end_of_an_engine_imports_nothing():
    """It may come in the midst of another import, which CPython 3.11 does not stand."""
    command = [sys.executable, "-c", _END]
    printed = subprocess.check_output(command, cwd=ROOT, env=clean_environment(), text=True)
    assert printed.splitlines() == [f"zero{stage}_fp32 []" for stage in range(4)]


_COMPILED = """
import sys
import torch
from ds_deberta.model import DebertaConfig, DebertaModel
config = DebertaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
model = DebertaModel(config)
model.encoder.compile_layers()
model(torch.ones(1, 8, dtype=torch.int64), torch.ones(1, 8, dtype=torch.bool)).sum().backward()
print(sorted({"torch._inductor", "triton"} & set(sys.modules)))
"""


@pytest.mark.slow
def test_a_compiler_for_a_cpu_loads_no_triton(tmp_path: Path):
    """Neither where it has yet to make everything, nor where it finds what it made before."""
    if torch.cuda.is_available():
        pytest.skip("CPU only")
    command = [sys.executable, "-c", _COMPILED]
    env = clean_environment() | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    for _ in range(2):
        printed = subprocess.check_output(command, cwd=ROOT, env=env, text=True)
        assert printed == "['torch._inductor']\n"


@pytest.mark.distributed
def test_a_step_on_a_cpu_loads_no_compiler():
    """torch's optimizer and DeepSpeed would: 0.14 GiB in each process, and a second."""
    if torch.cuda.is_available():
        pytest.skip("CPU only")
    command = [sys.executable, "-c", _STEP]
    printed = subprocess.check_output(command, cwd=ROOT, env=clean_environment(), text=True)
    assert printed.split() == ["[]"]
