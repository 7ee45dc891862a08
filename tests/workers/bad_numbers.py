"""Runs on every rank: gives engines a NaN or an infinity in every place, on one rank only.

    bad_numbers.py CASES_JSON OUT_FILE

A case is {"name", "config", "objective", "sharing", "data"}. OUT_FILE gets, by the case's name, for
every fault the engines that skipped it, and what must have stayed but did not.
"""

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn

from ds_deberta.data import load_tokenizer
from ds_deberta.data.loader import build_train_batches
from ds_deberta.distributed import initialize, is_main, rank, shutdown, world_size
from ds_deberta.engine import DeepSpeedFacts, Engine, initialize_engine, load_ds_config
from ds_deberta.horizon import Horizon
from ds_deberta.kernels import HeadOutput
from ds_deberta.objectives.mlm import MLMObjective
from ds_deberta.objectives.rtd import RTDObjective
from ds_deberta.optim import OptimConfig
from tests.cases import (
    BATCH,
    LR,
    RTD_LAMBDA,
    allow_fp16_on_cpus,
    build_models,
    masker,
)

FAULTS = ("nan_logits", "nan_loss", "inf_loss", "nan_gradient", "inf_gradient")


def build(case: dict[str, str]) -> tuple[MLMObjective | RTDObjective, list]:
    tokenizer = load_tokenizer(Path(case["data"]))
    optim = OptimConfig(learning_rate=LR, warmup=10, max_grad_norm=1.0)
    engines = {}
    for name, module in build_models(case["objective"], case["sharing"], tokenizer).items():
        facts = DeepSpeedFacts(
            train_batch_size=BATCH,
            micro_batch_size=BATCH // world_size() // 2,
            hidden_size=32,
            lr=LR,
            optim=optim,
        )
        ds_config = load_ds_config(Path(case["config"]), facts)
        engines[name] = initialize_engine(
            module, ds_config, optim=optim, lr=LR, horizon=Horizon(99)
        )
    steps = build_train_batches(
        data_dir=Path(case["data"]),
        tokenizer=tokenizer,
        masker=masker(tokenizer),
        micro_batch_size=BATCH // world_size() // 2,
        accumulation_steps=2,
        seed=7,
        rank=rank(),
        world_size=world_size(),
    )
    batches = [next(steps) for _ in range(4)]
    if case["objective"] == "mlm":
        return MLMObjective(engines["model"]), batches
    objective = RTDObjective(
        engines["generator"],
        engines["discriminator"],
        embedding_sharing=case["sharing"],  # type: ignore[arg-type]
        num_tokens=tokenizer.num_tokens,
        rtd_lambda=RTD_LAMBDA,
    )
    return objective, batches


@contextlib.contextmanager
def broken(module: nn.Module, fault: str) -> Iterator[None]:
    """Break the first micro-batch of the last rank; the others are well."""
    value = math.nan if fault.startswith("nan") else math.inf
    calls = 0

    def is_broken() -> bool:
        nonlocal calls
        calls += 1
        return calls == 1 and rank() == world_size() - 1

    def break_output(_: nn.Module, __: Any, output: HeadOutput | Tensor) -> HeadOutput | Tensor:
        if not is_broken():
            return output
        if isinstance(output, HeadOutput):
            return output._replace(loss=output.loss + value)  # its gradient is finite
        place = torch.zeros_like(output)
        place[0, 0] = value  # [CLS], never replaced: the gradient of an infinity is finite
        return output + place

    def break_states(_: nn.Module, __: Any, states: Tensor) -> Tensor:
        if not is_broken():
            return states
        if fault == "nan_logits":
            return states * value
        states = states.clone()
        states.register_hook(lambda gradient: gradient * value)
        return states

    is_inside = fault.endswith(("logits", "gradient"))
    place = module.deberta.encoder if is_inside else module
    handle = place.register_forward_hook(break_states if is_inside else break_output)
    yield
    handle.remove()


def snapshot(engine: Engine) -> list[Tensor]:
    """Weights, masters, moments, their counts and the schedule's position."""
    optimizer = engine._engine.optimizer
    optimizer = getattr(optimizer, "optimizer", optimizer)
    tensors = [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]
    for group in optimizer.param_groups:
        tensors += [torch.tensor(group["lr"], dtype=torch.float64), *group["params"]]
        for param in group["params"]:
            tensors += optimizer.state[param].values()
    return [tensor.detach().clone() for tensor in tensors]


def without_padding(engine: Engine) -> list[Tensor]:
    """Masters and moments: what pads ZeRO's partitions is memory as it was found."""
    params = list(engine.module.parameters())
    if not hasattr(params[0], "ds_tensor"):  # ZeRO-3's alone is not cleared
        return snapshot(engine)
    masters = [safe_get_full_fp32_param(param) for param in params]
    moments = ("exp_avg", "exp_avg_sq")
    return masters + [safe_get_full_optimizer_state(p, name) for p in params for name in moments]


def is_same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


def examine(case: dict[str, str]) -> dict[str, Any]:
    objective, batches = build(case)
    for batch in batches[:3]:
        objective.train_step(batch)
    expected = {name: without_padding(engine) for name, engine in objective.engines.items()}

    objective, batches = build(case)
    for batch in batches[:2]:
        objective.train_step(batch)
    found: dict[str, Any] = {"changed": []}
    whole, partial = [], []
    for name in objective.engines:
        for fault in FAULTS:
            gives_bad_samples = name == "generator" and not fault.endswith("gradient")
            is_shared = name == "discriminator" and case["sharing"] == "es"
            stops_all = name == "model" or gives_bad_samples or is_shared
            (whole if stops_all else partial).append((name, fault))

    def try_fault(name: str, fault: str) -> None:
        before = {n: snapshot(engine) for n, engine in objective.engines.items()}
        counts = {n: engine.stats()["skipped_steps"] for n, engine in objective.engines.items()}
        with broken(objective.engines[name].module, fault):
            objective.train_step(batches[3])
        skipped = [n for n, engine in objective.engines.items() if not engine.applied]
        found[f"{name} {fault}"] = skipped
        for n, engine in objective.engines.items():
            is_unchanged = is_same(before[n], snapshot(engine))
            is_counted = engine.stats()["skipped_steps"] == counts[n] + (n in skipped)
            if is_unchanged != (n in skipped) or not is_counted:
                found["changed"].append(f"{name} {fault}: {n}")

    for name, fault in whole:
        try_fault(name, fault)
    objective.train_step(batches[2])
    for n, engine in objective.engines.items():
        if not is_same(expected[n], without_padding(engine)):
            found["changed"].append(f"the step after: {n}")
    for name, fault in partial:
        try_fault(name, fault)
    return found


def main() -> None:
    cases, out_file = json.loads(sys.argv[1]), Path(sys.argv[2])
    initialize(seed=0)
    allow_fp16_on_cpus()
    found = {case["name"]: examine(case) for case in cases}
    every: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(every, found)
    assert all(each == every[0] for each in every), every
    if is_main():
        out_file.write_text(json.dumps(found))
    shutdown()
    os._exit(0)  # gloo's threads sometimes abort the exit


if __name__ == "__main__":
    main()
