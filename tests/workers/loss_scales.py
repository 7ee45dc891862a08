"""Runs on every rank: steps in fp16 that are well, overflow on the last rank, and are well again.

loss_scales.py CONFIGS_JSON OUT_FILE

CONFIGS_JSON is a list of DeepSpeed files. OUT_FILE gets, for each, a list of
[phase, loss scale after the step, whether it was taken, whether the weights have moved].
"""

import json
import sys
from pathlib import Path

import torch
from torch import nn

from ds_deberta.distributed import initialize, is_main, rank, shutdown, world_size
from ds_deberta.engine import DeepSpeedFacts, Engine, initialize_engine, load_ds_config
from ds_deberta.horizon import Horizon
from ds_deberta.model_state import WEIGHTS
from ds_deberta.optim import OptimConfig
from tests.cases import allow_fp16_on_cpus

PHASES = {"well": 12, "overflow": 40, "well again": 12}  # steps


def weights(engine: Engine) -> list[float]:
    """All of them, in fp32."""
    state = engine.state()
    tensors = [state.tensor(WEIGHTS, name) for name in state.shapes[WEIGHTS]]
    return torch.cat([tensor.flatten() for tensor in tensors]).tolist()


def main() -> None:
    initialize(seed=0)
    allow_fp16_on_cpus()
    optim = OptimConfig(learning_rate=1e-3, warmup=0, lr_schedule="constant")
    found = []
    for path in json.loads(sys.argv[1]):
        facts = DeepSpeedFacts(
            train_batch_size=world_size(),
            micro_batch_size=1,
            hidden_size=8,
            lr=1e-3,
            optim=optim,
        )
        model = nn.Linear(8, 8)
        config = load_ds_config(Path(path), facts)
        engine = initialize_engine(model, config, optim=optim, lr=1e-3, horizon=Horizon(99))
        rows = torch.ones(1, 8, dtype=torch.float16)
        steps = []
        for phase, count in PHASES.items():
            is_bad = phase == "overflow" and rank() == world_size() - 1
            for _ in range(count):
                before = weights(engine)
                loss = engine(rows).float().mean()
                engine.backward(loss * (1e30 if is_bad else 1e-10))  # finite: its gradient is not
                engine.step()
                has_moved = before != weights(engine)
                steps.append([phase, engine.stats()["loss_scale"], engine.applied, has_moved])
        every: list = [None] * world_size()
        torch.distributed.all_gather_object(every, steps)
        assert all(each == every[0] for each in every), every
        found.append(steps)
    if is_main():
        Path(sys.argv[2]).write_text(json.dumps(found))
    shutdown()


if __name__ == "__main__":
    main()
