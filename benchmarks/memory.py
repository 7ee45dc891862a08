"""Memory of a training step: planned (ds_deberta/plan.py) against measured.

    python benchmarks/memory.py [--only NAME] > benchmarks/results/memory_cpu.md

Each case trains three steps of real engines in processes of its own, on full rows of random ids.
Measured, of rank 0: the most bytes that tensors held at a time, counted at every operator, which on
a GPU is torch.cuda.max_memory_allocated; and the greatest resident size, less the one before the
models were built (after a tiny training that makes the libraries load what they need). The second
is more by what glibc has freed but keeps (see distributed._keep_freed_memory), gloo's buffers and
what libraries take.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from step import make_batch

from ds_deberta import build
from ds_deberta.config import PretrainConfig, parse
from ds_deberta.distributed import initialize, is_main, plan_world_size, shutdown, world_size
from ds_deberta.engine import initialize_engine
from ds_deberta.horizon import Horizon
from ds_deberta.kernels import plan_attention
from ds_deberta.metrics import processor
from ds_deberta.model import DebertaConfig
from ds_deberta.objectives import Objective
from ds_deberta.objectives.mlm import MLMObjective
from ds_deberta.objectives.rtd import RTDObjective
from ds_deberta.plan import Ledger, Trace, footprint, shape_of
from ds_deberta.ports import free_port

ROOT = Path(__file__).parent.parent
STEPS = 3
THREADS = 1  # of each process
TINY = DebertaConfig(vocab_size=2048, hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
CASES = {
    # name: (objective, model, DeepSpeed JSON, processes, rows at a time, length, more flags)
    "nano": ("rtd", "deberta-v3-nano", "zero0_fp32", 1, 64, 32, ""),
    "nano, ZeRO 1": ("rtd", "deberta-v3-nano", "zero1_bf16", 1, 64, 32, ""),
    "nano, ZeRO 2": ("rtd", "deberta-v3-nano", "zero2_bf16", 2, 64, 32, ""),
    "nano, ZeRO 2, fp32": ("rtd", "deberta-v3-nano", "zero2_fp32", 2, 64, 32, ""),
    "nano, ZeRO 3": ("rtd", "deberta-v3-nano", "zero3_bf16", 2, 64, 32, ""),
    "nano, ZeRO 3, fp32": ("rtd", "deberta-v3-nano", "zero3_fp32", 2, 64, 32, ""),
    "nano, offload": ("rtd", "deberta-v3-nano", "zero2_bf16_offload", 1, 64, 32, ""),
    "nano, full offload": ("rtd", "deberta-v3-nano", "zero3_bf16_offload", 1, 64, 32, ""),
    "xsmall, autocast": ("rtd", "deberta-v3-xsmall", "zero0_bf16", 1, 8, 128, ""),
    "xsmall, ZeRO 1": ("rtd", "deberta-v3-xsmall", "zero1_bf16", 2, 8, 128, ""),
    "xsmall, MLM": ("mlm", "deberta-v3-xsmall", "zero0_fp32", 1, 8, 128, ""),
    "xsmall, MLM, ZeRO 1": ("mlm", "deberta-v3-xsmall", "zero1_bf16", 1, 8, 128, ""),
    "xsmall, ZeRO 2, fp32": ("rtd", "deberta-v3-xsmall", "zero2_fp32", 2, 8, 128, ""),
    "xsmall, long": ("rtd", "deberta-v3-xsmall", "zero0_fp32", 1, 4, 512, ""),
    "xsmall, long, checkpointing": (
        *("rtd", "deberta-v3-xsmall", "zero0_fp32", 1, 4, 512),
        "--activation_checkpointing true",
    ),
    "small": ("rtd", "deberta-v3-small", "zero1_bf16", 1, 4, 64, ""),
    "base, MLM": ("mlm", "deberta-base", "zero2_bf16", 1, 4, 128, ""),
    "base, MLM, accumulation": (
        *("mlm", "deberta-base", "zero0_fp32", 1, 2, 128),
        "--train_batch_size 4",
    ),
}


def run_of(name: str) -> PretrainConfig:
    """A case as flags of run_pretrain.py."""
    objective, model, ds_config, processes, rows, length, more = CASES[name]
    return parse(
        [
            *("--objective", objective, "--model", model, "--output_dir", "unused"),
            *("--deepspeed_config", str(ROOT / f"ds_configs/{ds_config}.json")),
            *("--train_batch_size", str(rows * processes), "--micro_batch_size", str(rows)),
            *("--max_seq_length", str(length), "--max_ngram", "1", "--warmup", "0"),
            *("--expect_world_size", str(processes), *more.split()),
        ]
    )


def train(run: PretrainConfig, configs: dict[str, DebertaConfig]) -> Objective:
    """Some steps of the run on random rows."""
    ds_configs = build.build_ds_configs(run, configs)
    attend = plan_attention("auto", device="cpu", head_size=64)
    engines = {
        name: initialize_engine(
            model,
            ds_configs[name],
            optim=run.optim,
            lr=run.optim.learning_rate,
            horizon=Horizon(run.train.num_training_steps),
        )
        for name, model in build.build_models(run, configs, attend).items()
    }
    vocab_size = next(iter(configs.values())).vocab_size
    objective = (
        MLMObjective(engines["model"])
        if run.objective == "mlm"
        else RTDObjective(
            engines["generator"],
            engines["discriminator"],
            embedding_sharing=run.model.embedding_sharing,
            num_tokens=vocab_size,
            rtd_lambda=run.rtd.rtd_lambda,
        )
    )
    rows = run.train.micro_batch(world_size())
    batch = make_batch(rows, run.data.row_length, vocab_size)
    for _ in range(STEPS):
        objective.train_step([batch] * (run.train.train_batch_size // (rows * world_size())))
    return objective


def serve(name: str) -> None:
    """Be one process of a case; rank 0 prints its greatest memory in bytes."""
    run = run_of(name)
    initialize(seed=0)
    configs = build.model_configs(run, None)
    warm_up = replace(
        run, train=replace(run.train, train_batch_size=2 * world_size(), micro_batch_size=2)
    )
    train(warm_up, dict.fromkeys(configs, TINY))
    before = memory("VmRSS")
    trace = Trace()
    with Ledger(trace, torch.device("cpu")):
        _objective = train(run, configs)
    if is_main():
        print(round(trace.peak["keep"]), memory("VmHWM") - before, flush=True)
    shutdown()
    os._exit(0)


def memory(field: str) -> int:
    """Bytes that the kernel gives this process (VmRSS), or gave it at most (VmHWM)."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match[1]) * 1024


def measure(name: str) -> tuple[int, int]:
    """Bytes of rank 0 of a case: in tensors, and resident."""
    processes = CASES[name][3]
    port = str(free_port())
    with tempfile.TemporaryFile("w+") as errors:
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, "--serve", name],
                env=os.environ
                | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                | {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
                | {"MASTER_PORT": port, "OMP_NUM_THREADS": str(THREADS)},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            for rank in range(processes)
        ]
        while None in (statuses := [rank.poll() for rank in ranks]) and not any(statuses):
            time.sleep(0.1)
        for rank in ranks:
            rank.kill()  # where another one has failed; nothing for one that has ended
        outputs = [rank.communicate()[0] for rank in ranks]
        if any(rank.returncode for rank in ranks):
            errors.seek(0)
            raise RuntimeError(f"{name} failed: {errors.read()[-2000:]}")
    tensors, resident = outputs[0].split()[-2:]
    return int(tensors), int(resident)


def planned(name: str) -> float:
    """Bytes of a process of a case."""
    run = run_of(name)
    plan_world_size(CASES[name][3])
    configs = build.model_configs(run, None)
    ds_config = next(iter(build.build_ds_configs(run, configs).values()))
    return footprint(shape_of(run, configs, ds_config, "cpu"), ds_config, CASES[name][3]).total


def main() -> None:
    """Measure every case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=CASES, nargs="+", help="these cases")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve)
    torch.set_num_threads(THREADS)
    print(f"`python benchmarks/memory.py`: {processor()}, torch {torch.__version__}\n", flush=True)
    columns = "case|model|DeepSpeed|processes|rows x length|planned|in tensors|off by|resident"
    print(f"| {columns.replace('|', ' | ')} |")
    print("|-|-|-|-|-|-|-|-|-|")
    for name in args.only or CASES:
        objective, model, ds_config, processes, rows, length, _ = CASES[name]
        plan, (real, resident) = planned(name), measure(name)
        print(
            f"| {name} | {model}, {objective} | {ds_config} | {processes} | {rows} x {length} | "
            f"{plan / 2**20:,.0f} MiB | {real / 2**20:,.0f} MiB | {plan / real - 1:+.1%} | "
            f"{resident / 2**20:,.0f} MiB |",
            flush=True,
        )


if __name__ == "__main__":
    main()
