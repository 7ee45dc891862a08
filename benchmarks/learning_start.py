"""When does a preset's generator, or MLM, begin to use the context? For several seeds.

    python benchmarks/learning_start.py --preset deberta-v3-nano --data_dir data/demo \
        --steps 2300 400 --seeds 10 [flags of run_pretrain.py]

A model first learns how frequent tokens are, which needs no context, and stays at that level for a
while; a bad recipe never leaves it. Each row is a training with its own seed (weights, order and
masks), of the given number of steps, that is ended as soon as the loss on held-out rows is 0.1 nats
below that level and the accuracy 1.5 times as high; or after half of its steps.

The generator is trained alone: with `--embedding_sharing gdes` or `nes` no gradient of the
discriminator reaches it. The dropout of presets that have it is drawn otherwise than in a run.
"""

import argparse
import logging
import os
import time
from itertools import islice
from pathlib import Path

from ds_deberta import build
from ds_deberta.checkpoint import TrainState
from ds_deberta.config import parse
from ds_deberta.data import Manifest, ShardDataset, load_tokenizer
from ds_deberta.data.unigram import Unigram, UnigramLevel
from ds_deberta.distributed import initialize, seed_step
from ds_deberta.horizon import Horizon
from ds_deberta.metrics import processor
from ds_deberta.objectives.mlm import MLMObjective
from ds_deberta.recipes import RECIPES
from ds_deberta.resolve import resolve
from ds_deberta.trainer import evaluate

HELD_OUT_ROWS = 512
BELOW, ABOVE = 0.1, 1.5  # nats below the level's loss, times its accuracy


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", default="deberta-v3-nano")
    add("--data_dir", type=Path, default=Path("data/demo"))
    add("--steps", type=int, nargs="+", default=[2300], help="of the whole training")
    add("--seeds", type=int, default=10)
    add("--first_seed", type=int, default=0)
    add("--every", type=int, default=10, help="steps between evaluations")
    args, flags = parser.parse_known_args()
    print(f"{args.preset} on {args.data_dir}, {' '.join(flags)}: {processor()}\n")
    print("| steps | seed | leaves it after | loss | accuracy | the level | CPU |")
    print("|-|-|-|-|-|-|-|")
    for steps in args.steps:
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            command = ["--model", args.preset, "--data_dir", str(args.data_dir), *flags]
            command += ["--num_training_steps", str(steps), "--seed", str(seed)]
            print(start_of(command, args.preset, steps, seed, args.every), flush=True)


def start_of(command: list[str], preset: str, steps: int, seed: int, every: int) -> str:
    """Train until the level is left; a row of the table."""
    objective = next(name for name, presets in RECIPES.items() if preset in presets)
    run = resolve(parse(["--objective", objective, "--output_dir", os.devnull, *command]))
    logging.disable(logging.INFO)
    device = initialize(run.seed)
    tokenizer = load_tokenizer(run.data.data_dir)
    engines = build.build_objective(run, tokenizer, device, Horizon(steps)).engines
    model = MLMObjective(engines["model" if objective == "mlm" else "generator"])
    batches = build.build_train_batches(run, tokenizer, TrainState())
    rows = run.train.micro_batch(1)
    held_out = list(islice(build.build_valid_batches(run, tokenizer) or [], HELD_OUT_ROWS // rows))
    masker = build.build_masker(run, tokenizer)
    train_rows = ShardDataset(run.data.data_dir, "train", Manifest.load(run.data.data_dir))
    unigram = Unigram.of(train_rows, tokenizer.num_tokens, tokenizer.special)
    totals = unigram.score_batches(held_out, masker)
    level = UnigramLevel(*(totals[:2] / totals[2]))

    start = time.process_time()
    values: dict[str, float] = {}
    for step in range(1, steps // 2 + 1):
        seed_step(run.seed, step - 1)
        model.train_step([batch.to(device) for batch in next(batches)])
        if step % every == 0:
            values, _ = evaluate(model, held_out, device)
            has_left = values["mlm_loss"] < level.loss - BELOW
            if has_left and values["mlm_accuracy"] > ABOVE * level.accuracy:
                left = f"{step} steps, {step / steps:.1%} of the run"
                break
    else:
        left = f"**not within {steps // 2} steps**"
    return (
        f"| {steps} | {seed} | {left} | {values['mlm_loss']:.2f} | {values['mlm_accuracy']:.1%} "
        f"| {level.loss:.2f}, {level.accuracy:.1%} | {time.process_time() - start:.0f} s |"
    )


if __name__ == "__main__":
    main()
