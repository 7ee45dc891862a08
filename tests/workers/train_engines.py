"""Runs on every rank: trains each given case for four steps on DeepSpeed engines.

    train_engines.py CASES_JSON OUT_DIR

A case is {"name", "config", "objective", "sharing", "data"}. OUT_DIR gets NAME.json with the
losses, NAME_valid.json with an evaluation at the end, and NAME/ with a checkpoint of every engine.
"""

import json
import sys
from pathlib import Path

import torch
import torch._dynamo

from ds_deberta.data import load_tokenizer
from ds_deberta.data.loader import build_train_batches, build_valid_batches
from ds_deberta.distributed import initialize, is_main, rank, shutdown, world_size
from ds_deberta.engine import DeepSpeedFacts, initialize_engine, load_ds_config
from ds_deberta.horizon import Horizon
from ds_deberta.metrics import reduce_metrics
from ds_deberta.model_state import gather_shares, write_shares
from ds_deberta.objectives.mlm import MLMObjective
from ds_deberta.objectives.rtd import RTDObjective
from ds_deberta.optim import OptimConfig
from ds_deberta.trainer import evaluate
from tests.cases import (
    BATCH,
    CLIP,
    DISCRIMINATOR_LR,
    LR,
    RTD_LAMBDA,
    STEPS,
    allow_fp16_on_cpus,
    build_models,
    masker,
)


def main() -> None:
    cases, out_dir = json.loads(sys.argv[1]), Path(sys.argv[2])
    initialize(seed=0)
    allow_fp16_on_cpus()
    optim = OptimConfig(learning_rate=LR, warmup=0, lr_schedule="constant", max_grad_norm=CLIP)
    for case in cases:
        data_dir = Path(case["data"])
        tokenizer = load_tokenizer(data_dir)
        lrs = {"discriminator": DISCRIMINATOR_LR}
        engines = {}
        for name, module in build_models(case["objective"], case["sharing"], tokenizer).items():
            lr = lrs.get(name, LR)
            module.deberta.encoder.checkpoint_activations = "checkpointing" in case["name"]
            if "compiled" in case["name"]:
                torch._dynamo.reset()
                torch._dynamo.config.fail_on_recompile_limit_hit = True  # else: not compiled
                module.deberta.encoder.compile_layers()
            facts = DeepSpeedFacts(
                train_batch_size=BATCH,
                micro_batch_size=BATCH // world_size() // 2,
                hidden_size=32,
                lr=lr,
                optim=optim,
            )
            ds_config = load_ds_config(Path(case["config"]), facts)
            engines[name] = initialize_engine(
                module, ds_config, optim=optim, lr=lr, horizon=Horizon(STEPS)
            )
        objective = (
            MLMObjective(engines["model"])
            if case["objective"] == "mlm"
            else RTDObjective(
                engines["generator"],
                engines["discriminator"],
                embedding_sharing=case["sharing"],
                num_tokens=tokenizer.num_tokens,
                rtd_lambda=RTD_LAMBDA,
            )
        )
        batches = build_train_batches(
            data_dir=data_dir,
            tokenizer=tokenizer,
            masker=masker(tokenizer),
            micro_batch_size=BATCH // world_size() // 2,
            accumulation_steps=2,
            seed=7,
            rank=rank(),
            world_size=world_size(),
        )
        steps = []
        for _ in range(STEPS):
            metrics = objective.train_step(next(batches))
            values = reduce_metrics([metrics], scores_of=[metrics])
            steps.append(
                values | {f"norm_{n}": engine.stats()["grad_norm"] for n, engine in engines.items()}
            )
        for name, engine in engines.items():
            folder = out_dir / case["name"] / name
            folder.mkdir(parents=True, exist_ok=True)
            shares = gather_shares(
                engine.state(), rank=rank(), world_size=world_size(), copies=False
            )
            write_shares(shares, folder)
        valid_batches = build_valid_batches(
            data_dir=data_dir,
            tokenizer=tokenizer,
            masker=masker(tokenizer),
            micro_batch_size=5,
            seed=7,
            rank=rank(),
            world_size=world_size(),
        )
        values, _ = evaluate(objective, valid_batches, torch.device("cpu"))
        if is_main():
            (out_dir / f"{case['name']}.json").write_text(json.dumps(steps))
            (out_dir / f"{case['name']}_valid.json").write_text(json.dumps(values))
    shutdown()


if __name__ == "__main__":
    main()
