"""Tokens per second of a whole RTD step: ours against the same step built from transformers.

    python benchmarks/step.py [--rounds 5] [--only NAME]

Both sides run in turn in one process, so that a noisy machine slows both. Ours: two DeepSpeed
engines (ZeRO 1), generator, sampling, discriminator, clipping and both updates, through
`RTDObjective`. Theirs: DebertaV2ForMaskedLM and DebertaV2ForTokenClassification with independent
embeddings, torch's AdamW and the same losses, in fp32. Dropout is 0.1 on both sides.

MFU: useful matrix-product operations (model/flops.py, three forward passes) per second, as a
share of the best 1024 x 1024 product measured in the same run and dtype.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers

from ds_deberta.data import IGNORE_INDEX, Batch
from ds_deberta.distributed import initialize, seed_everything
from ds_deberta.engine import DeepSpeedFacts, initialize_engine, load_ds_config
from ds_deberta.kernels import select_attention
from ds_deberta.metrics import measure_peak_flops
from ds_deberta.model import DebertaConfig, DebertaForMaskedLM, DebertaForRTD, generator_config
from ds_deberta.model.flops import forward_flops
from ds_deberta.objectives.rtd import RTDObjective
from ds_deberta.optim import OptimConfig

CONFIGS = Path(__file__).parent.parent / "ds_configs"
SHAPES = {
    # name: (discriminator, rows, length)
    "256 x 4/2, 16k words, 16 x 128": (
        DebertaConfig(
            vocab_size=16384, hidden_size=256, num_hidden_layers=4, num_attention_heads=4
        ),
        16,
        128,
    ),
    "384 x 12/6, 128k words, 4 x 128": (
        DebertaConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=6),
        4,
        128,
    ),
}


def make_batch(rows: int, length: int, vocab_size: int) -> Batch:
    """Full rows with 15% of the tokens masked."""
    predictions = round(0.15 * length)
    ids = torch.randint(5, vocab_size - 200, (rows, length))
    positions = torch.stack(
        [torch.randperm(length - 2)[:predictions].sort().values + 1 for _ in range(rows)]
    )
    labels = ids.gather(1, positions)
    return Batch(
        input_ids=ids.scatter(1, positions, 4),
        attention_mask=torch.ones(rows, length, dtype=torch.bool),
        predicted_positions=positions,
        labels=labels,
        uniforms=torch.rand(rows, predictions, dtype=torch.float64),
        sample_numbers=torch.arange(rows),
    )


def our_step(config: DebertaConfig, batch: Batch, precision: str) -> Callable[[], None]:
    """One optimizer step of both models on DeepSpeed engines."""
    optim = OptimConfig(warmup=0)
    rows = len(batch.input_ids)
    attend, _ = select_attention(
        "auto", device="cpu", dtype=torch.float32, head_size=config.head_size
    )
    models = {
        "generator": DebertaForMaskedLM(generator_config(config), attend),
        "discriminator": DebertaForRTD(config, attend, embedding_sharing="gdes"),
    }
    facts = DeepSpeedFacts(
        train_batch_size=rows,
        micro_batch_size=rows,
        hidden_size=config.hidden_size,
        lr=1e-4,
        optim=optim,
    )
    ds_config = load_ds_config(CONFIGS / f"zero1_{precision}.json", facts)
    engines = {
        name: initialize_engine(model, ds_config, optim=optim, lr=1e-4, total_steps=10**6)
        for name, model in models.items()
    }
    objective = RTDObjective(
        **engines, embedding_sharing="gdes", num_tokens=config.vocab_size, rtd_lambda=10.0
    )
    return lambda: objective.train_step([batch]) and None


def transformers_step(config: DebertaConfig, batch: Batch, autocast: bool) -> Callable[[], None]:
    """The same step from transformers' models and torch's AdamW."""

    def their_config(ours: DebertaConfig) -> transformers.DebertaV2Config:
        return transformers.DebertaV2Config(**ours.to_dict(), num_labels=1, legacy=False)

    generator = transformers.DebertaV2ForMaskedLM(their_config(generator_config(config)))
    discriminator = transformers.DebertaV2ForTokenClassification(their_config(config))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-4) for m in (generator, discriminator)]
    mask = batch.attention_mask
    original = batch.original_ids()
    labels = torch.full_like(original, IGNORE_INDEX).scatter(
        1, batch.predicted_positions, batch.labels
    )
    masked = labels != IGNORE_INDEX

    def update(loss: torch.Tensor, model: torch.nn.Module, optimizer: torch.optim.Optimizer):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = generator(batch.input_ids, attention_mask=mask, labels=labels)
        update(out.loss, generator, optimizers[0])
        probs = torch.softmax(out.logits.detach()[masked].float(), -1)
        corrupted = batch.input_ids.clone()
        corrupted[masked] = torch.multinomial(probs, 1).squeeze(-1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = discriminator(corrupted, attention_mask=mask).logits.squeeze(-1)
        loss = F.binary_cross_entropy_with_logits(logits.float(), (corrupted != original).float())
        update(10.0 * loss, discriminator, optimizers[1])

    return step


def seconds_per_step(step: Callable[[], None], steps: int) -> float:
    """Wall time of one step, over `steps` of them."""
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - start) / steps


def compare(name: str, rounds: int) -> None:
    """Print one table row per contender."""
    config, rows, length = SHAPES[name]
    seed_everything(0)
    batch = make_batch(rows, length, config.vocab_size)
    contenders = {
        "transformers fp32": transformers_step(config, batch, autocast=False),
        "transformers bf16 autocast": transformers_step(config, batch, autocast=True),
        "ours fp32": our_step(config, batch, "fp32"),
        "ours bf16": our_step(config, batch, "bf16"),
    }
    peak = {
        kind: measure_peak_flops(torch.device("cpu"), dtype)
        for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    predictions = batch.labels.shape[1]
    flops = (
        3
        * rows
        * (
            forward_flops(generator_config(config), length=length, predictions=predictions)
            + forward_flops(config, length=length, predictions=None)
        )
    )
    times: dict[str, list[float]] = {contender: [] for contender in contenders}
    for step in contenders.values():
        step()  # warm up
    for _ in range(rounds):
        for contender, step in contenders.items():
            times[contender].append(seconds_per_step(step, 2))
    base = times["transformers fp32"]
    print(f"\n{name}: {peak['fp32'] / 1e9:.0f} GFLOP/s fp32, {peak['bf16'] / 1e9:.0f} bf16\n")
    print("| | tokens/s | ratio to transformers fp32 | share of the GEMM rate |\n|-|-|-|-|")
    for contender, seconds in times.items():
        median = statistics.median(seconds)
        ratio = statistics.median(b / s for b, s in zip(base, seconds, strict=True))
        kind = "bf16" if "bf16" in contender else "fp32"
        print(
            f"| {contender} | {rows * length / median:,.0f} | {ratio:.2f} | "
            f"{flops / median / peak[kind]:.0%} |"
        )


def main() -> None:
    """Measure every shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--only", choices=SHAPES, help="one shape")
    args = parser.parse_args()
    initialize(seed=0)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {_processor()}")
    for name in [args.only] if args.only else SHAPES:
        compare(name, args.rounds)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "CPU")


if __name__ == "__main__":
    main()
    os._exit(0)
