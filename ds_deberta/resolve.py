"""Settings that depend on the data: filled in once, after parsing, before anything reads them.

And what is to be said of a run's settings before it starts: what they waste, or leave out.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

from ds_deberta.config import PretrainConfig
from ds_deberta.data import MANIFEST_FILE, Manifest
from ds_deberta.optim import warmup_steps
from ds_deberta.recipes import RECIPES, planned_length


def resolve(run: PretrainConfig, *, needs_data: bool = True) -> PretrainConfig:
    """Return the run with a value for each setting that was left to the data.

    Args:
        run: as parsed.
        needs_data: False for a plan, which without data counts with the preset's own values.

    Raises:
        ValueError: the data are damaged, or needed and not there.
        FileNotFoundError: there are none.
    """
    has_data = needs_data or (run.data.data_dir / MANIFEST_FILE).is_file()
    manifest = Manifest.load(run.data.data_dir) if has_data else None
    if run.data.max_seq_length is None:
        length = manifest.max_seq_length if manifest else planned_length(run.model.model)
        run = replace(run, data=replace(run.data, max_seq_length=length))
    if run.train.epochs is not None:
        if manifest is None:
            raise ValueError(
                f"--epochs counts the rows of the data, and there are none at {run.data.data_dir}. "
                "Give --data_dir, or --num_training_steps instead."
            )
        samples = run.train.epochs * manifest.splits["train"].rows
        steps = math.ceil(samples / run.train.train_batch_size)
        run = replace(run, train=replace(run.train, num_training_steps=steps, epochs=None))
    return run


def describe_padding(run: PretrainConfig) -> str:
    """Say what padding to --max_seq_length costs; "" where the rows are as long."""
    data = run.data
    if not (data.data_dir / MANIFEST_FILE).is_file():
        return ""
    own = Manifest.load(data.data_dir).max_seq_length
    if own >= data.row_length:
        return ""
    return (
        f"rows of {own} are padded to {data.row_length}: {data.row_length / own:.3g} times the "
        "work. Leave out --max_seq_length, or prepare the data with longer rows."
    )


def describe_schedule(run: PretrainConfig) -> str:
    """Say how many steps there are, and how many of them warm up.

    Raises:
        ValueError: all of them would.
    """
    steps = run.train.num_training_steps
    warmup = warmup_steps(run.optim, steps)
    if warmup >= max(2, steps):  # a warm-up of one step is none: it begins at the peak
        raise ValueError(
            f"--warmup must be shorter than the run, {steps:,} steps by --num_training_steps; got "
            f"{warmup:,} steps, in which the learning rate would only rise. Try --warmup 0.06, a "
            "fraction of the run."
        )
    return f"{steps:,} steps, {warmup:,} of them warm-up"


def warnings_of(run: PretrainConfig) -> Iterator[str]:
    """Say what a user may not have meant: padding, a recipe that is not used."""
    if padding := describe_padding(run):
        yield padding
    name = run.model.model
    objectives = [objective for objective, presets in RECIPES.items() if name in presets]
    if objectives and run.objective not in objectives:
        yield (
            f"{name} is a preset of --objective {objectives[0]}: with {run.objective} only its "
            "architecture is used, not its recipe. Batch size, learning rates, warm-up and steps "
            "are those of the flags and their defaults."
        )
