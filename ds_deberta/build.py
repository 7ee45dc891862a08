"""Puts a run together: knows every part, does nothing per step."""

import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch

from ds_deberta.agreement import check_same, on_all_ranks
from ds_deberta.checkpoint import Checkpointer, TrainState
from ds_deberta.compatibility import fit_configs
from ds_deberta.config import ModelConfig, PretrainConfig
from ds_deberta.data import DebertaTokenizer, Manifest, NGramMasker, ShardDataset, loader
from ds_deberta.data.loader import Batch
from ds_deberta.data.sampler import SkippedSamples
from ds_deberta.data.shards import write_durably
from ds_deberta.data.unigram import Unigram, UnigramLevel
from ds_deberta.distributed import (
    computes_in_bf16,
    is_main,
    logger,
    rank,
    sum_across_ranks,
    world_size,
)
from ds_deberta.ds_remarks import remarks
from ds_deberta.engine import (
    DeepSpeedFacts,
    describe,
    initialize_engine,
    load_ds_config,
    precision,
    zero_stage,
)
from ds_deberta.health import Health
from ds_deberta.horizon import Horizon
from ds_deberta.identity import identity_of, settings_of
from ds_deberta.kernels import AttentionFn, select_attention
from ds_deberta.metrics import MetricTracker, measure_peak_flops
from ds_deberta.model import (
    CONTINUED,
    DebertaConfig,
    DebertaForMaskedLM,
    DebertaForRTD,
    generator_config,
    load_model_config,
)
from ds_deberta.model.flops import forward_flops
from ds_deberta.objectives import Objective
from ds_deberta.objectives.mlm import MLMObjective
from ds_deberta.objectives.rtd import RTDObjective
from ds_deberta.optim import warmup_steps
from ds_deberta.warm_start import load_initial
from ds_deberta.weights import Role, Source, find_source

# They cost about a third of what training on them does: 11 steps of 64 x 512.
_EVALUATED_TOKENS = 2**20


def build_objective(
    run: PretrainConfig, tokenizer: DebertaTokenizer, device: torch.device, horizon: Horizon
) -> Objective:
    """Models, engines and the objective around them.

    Raises:
        ValueError: settings that do not go together, named.
    """
    configs = model_configs(run, tokenizer)
    ds_configs, attend, reason = on_all_ranks(lambda: settle(run, configs, device))
    _tell_precision(run, precision(next(iter(ds_configs.values()))))
    for remark in remarks(run.deepspeed_config, next(iter(ds_configs.values()))):
        logger.warning(remark)
    logger.info(reason)
    engines = {
        name: initialize_engine(
            model,
            ds_configs[name],
            optim=run.optim,
            lr=peak_learning_rate(run, name),
            horizon=horizon,
        )
        for name, model in build_models(run, configs, attend).items()
    }
    if run.objective == "mlm":
        return MLMObjective(engines["model"], num_tokens=tokenizer.num_tokens)
    return RTDObjective(
        engines["generator"],
        engines["discriminator"],
        embedding_sharing=run.model.embedding_sharing,
        num_tokens=tokenizer.num_tokens,
        rtd_lambda=run.rtd.rtd_lambda,
        temperature=run.rtd.temperature,
    )


def _tell_precision(run: PretrainConfig, dtype: torch.dtype) -> None:
    """Log what is computed in; refuse ranks whose devices make another thing of "auto"."""
    name = str(dtype).removeprefix("torch.")
    check_same("machines", {f"what they compute in by {run.deepspeed_config}": name})
    logger.info("precision: %s, by %s", name, run.deepspeed_config)
    if dtype == torch.bfloat16 and not computes_in_bf16():
        logger.warning(
            "this device only imitates bf16, which takes many times as long as fp32: "
            "ds_configs/zero1_auto.json and ds_configs/*_fp32.json do without it here"
        )


def settle(
    run: PretrainConfig, configs: dict[str, DebertaConfig], device: torch.device
) -> tuple[dict[str, dict[str, Any]], AttentionFn, str]:
    """What models run on: all that is decided before there is one.

    Returns:
        The DeepSpeed configuration of each engine, the attention, and one line that says why it.

    Raises:
        ValueError: settings that do not go together, named.
    """
    refuse_mixing(run, configs)
    ds_configs = build_ds_configs(run, configs)
    dtype = precision(next(iter(ds_configs.values())))
    if run.objective == "rtd" and run.model.embedding_sharing == "es" and dtype == torch.float16:
        raise ValueError(
            "embedding_sharing es does not go with fp16: the two loss scales differ. "
            "Use bf16, or embedding_sharing gdes."
        )
    if run.model.compile and any(zero_stage(config) == 3 for config in ds_configs.values()):
        raise ValueError(
            "--compile does not go with ZeRO 3, whose weights are not there yet when a layer is "
            "compiled. Leave it out, or use a configuration up to ZeRO 2 (ds_configs/zero2_*.json)."
        )
    cxx = os.environ.get("CXX", "g++")
    if run.model.compile and device.type == "cpu" and shutil.which(cxx) is None:
        raise ValueError(
            f"--compile needs a C++ compiler on a CPU; got none by the name of {cxx}. Install it "
            "(apt-get install g++), name another one in CXX, or leave --compile out."
        )
    attend, reason = select_attention(
        run.model.attention,
        device=device,
        dtype=dtype,
        head_size=next(iter(configs.values())).head_size,  # a generator is as wide
    )
    return ds_configs, attend, reason


def model_configs(
    run: PretrainConfig, tokenizer: DebertaTokenizer | None
) -> dict[str, DebertaConfig]:
    """The architectures of a run by engine name, with the command line's changes in them.

    Without a tokenizer, for a plan: with the model's own number of words.
    """
    discriminator = load_model_config(run.model.model)
    if tokenizer is not None:
        discriminator = replace(discriminator, vocab_size=tokenizer.vocab_size)
    positions = max(discriminator.max_position_embeddings, run.data.row_length)
    discriminator = replace(discriminator, max_position_embeddings=positions)
    configs = {"generator": generator_config(discriminator), "discriminator": discriminator}
    if run.objective == "mlm":
        configs = {"model": discriminator}
    configs = {name: _changed(config, run.model) for name, config in configs.items()}
    is_continued = run.model.model in CONTINUED
    sources = init_sources(run)
    needed = "model" if run.objective == "mlm" else "discriminator"
    if is_continued and needed not in sources:
        more = "" if needed == "model" else ", and --init_generator where there is one"
        raise ValueError(
            f"{run.model.model} goes on from a checkpoint; give --init_{needed}{more} (see README)"
        )
    if not sources or tokenizer is None:
        return configs
    configs = fit_configs(configs, sources, tokenizer, takes_sizes=is_continued)
    positions = min(config.max_position_embeddings for config in configs.values())
    if run.data.row_length > positions:
        raise ValueError(
            f"max_seq_length must be at most {positions}, the positions that these weights know; "
            f"got {run.data.row_length}"
        )
    return {name: _changed(config, run.model) for name, config in configs.items()}


def init_sources(run: PretrainConfig) -> dict[Role, Source]:
    """Find what --init_* names, by engine name."""
    places: dict[Role, Path | None] = {
        "model": run.model.init_model,
        "generator": run.model.init_generator,
        "discriminator": run.model.init_discriminator,
    }
    return {role: find_source(place, role) for role, place in places.items() if place is not None}


def _changed(config: DebertaConfig, options: ModelConfig) -> DebertaConfig:
    """Apply the command line's changes to an architecture."""
    changes: dict[str, Any] = {}
    if options.relative_attention is not None:
        changes["relative_attention"] = options.relative_attention
        if not options.relative_attention:
            changes["pos_att_type"] = "none"
    if options.pos_att_type is not None:
        changes["pos_att_type"] = options.pos_att_type
    if options.dropout is not None:
        changes["hidden_dropout_prob"] = options.dropout
        changes["attention_probs_dropout_prob"] = options.dropout
    return DebertaConfig.from_dict(config.to_dict() | changes)


def refuse_mixing(run: PretrainConfig, configs: dict[str, DebertaConfig]) -> None:
    """Refuse packed documents for a model whose convolution would mix them."""
    kernel_size = max(config.conv_kernel_size for config in configs.values())
    if kernel_size > 0 and Manifest.load(run.data.data_dir).packed:
        raise ValueError(
            f"conv_kernel_size must be 0 for the packed documents of {run.data.data_dir}, which a "
            f"convolution would mix; that of {run.model.model} is {kernel_size}. Choose another "
            "model, or prepare the data without --pack_documents."
        )


def peak_learning_rate(run: PretrainConfig, name: str) -> float:
    """The peak learning rate of the engine `name`."""
    own = run.optim.discriminator_learning_rate if name == "discriminator" else None
    return own or run.optim.learning_rate


def build_ds_configs(
    run: PretrainConfig, configs: dict[str, DebertaConfig], *, runs_here: bool = True
) -> dict[str, dict[str, Any]]:
    """The DeepSpeed configuration of each engine; see `load_ds_config`."""
    return {
        name: load_ds_config(
            run.deepspeed_config,
            DeepSpeedFacts(
                train_batch_size=run.train.train_batch_size,
                micro_batch_size=run.train.micro_batch(world_size()),
                hidden_size=config.hidden_size,
                lr=peak_learning_rate(run, name),
                optim=run.optim,
            ),
            runs_here=runs_here,
        )
        for name, config in configs.items()
    }


def build_models(
    run: PretrainConfig, configs: dict[str, DebertaConfig], attend: AttentionFn
) -> dict[str, DebertaForMaskedLM | DebertaForRTD]:
    """The models with their initial weights: fresh, or from --init_*. The same on every rank."""
    sharing = run.model.embedding_sharing
    models: dict[str, DebertaForMaskedLM | DebertaForRTD] = {}
    if run.objective == "mlm":
        models["model"] = DebertaForMaskedLM(configs["model"], attend)
    else:
        models["generator"] = DebertaForMaskedLM(configs["generator"], attend)
        models["discriminator"] = DebertaForRTD(
            configs["discriminator"], attend, embedding_sharing=sharing
        )
    for model in models.values():
        model.deberta.encoder.checkpoint_activations = run.model.activation_checkpointing
        if run.model.compile:
            model.deberta.encoder.compile_layers()
    load_initial(models, init_sources(run))
    for name, model in models.items():
        count = sum(p.numel() for p in model.parameters())
        logger.info("%s: %.1f M parameters", name, count / 1e6)
    return models


def build_masker(run: PretrainConfig, tokenizer: DebertaTokenizer) -> NGramMasker:
    """RTD: every predicted token becomes [MASK]. MLM: 80% [MASK], 10% kept, 10% random."""
    shares = (1.0, 0.0) if run.objective == "rtd" else (0.8, 0.1)
    return NGramMasker(
        special=tokenizer.special,
        is_word_start=tokenizer.is_word_start,
        num_tokens=tokenizer.num_tokens,
        max_seq_length=run.data.row_length,
        mask_prob=run.data.mask_prob,
        max_ngram=run.data.max_ngram,
        mask_token_prob=shares[0],
        keep_prob=shares[1],
    )


def build_train_batches(
    run: PretrainConfig, tokenizer: DebertaTokenizer, state: TrainState
) -> Iterator[list[Batch]]:
    """This rank's micro-batches, one list per optimizer step, from where the training stands."""
    micro_batch_size = run.train.micro_batch(world_size())
    return loader.build_train_batches(
        data_dir=run.data.data_dir,
        tokenizer=tokenizer,
        masker=build_masker(run, tokenizer),
        micro_batch_size=micro_batch_size,
        accumulation_steps=run.train.train_batch_size // (micro_batch_size * world_size()),
        seed=run.seed,
        rank=rank(),
        world_size=world_size(),
        consumed_samples=state.consumed_samples,
        skipped=SkippedSamples(run.data.skip_samples),
        num_workers=run.data.num_workers,
        pin_memory=torch.cuda.is_available(),
    )


def build_valid_batches(run: PretrainConfig, tokenizer: DebertaTokenizer) -> Iterable[Batch] | None:
    """This rank's share of the held-out rows; None if the data have none."""
    evaluated, _ = evaluated_rows(run)
    if not evaluated:
        return None
    return loader.build_valid_batches(
        data_dir=run.data.data_dir,
        tokenizer=tokenizer,
        masker=build_masker(run, tokenizer),
        micro_batch_size=run.train.micro_batch(world_size()),
        seed=run.seed,
        rows=evaluated,
        rank=rank(),
        world_size=world_size(),
        pin_memory=torch.cuda.is_available(),
    )


def evaluated_rows(run: PretrainConfig) -> tuple[int, int]:
    """How many rows each evaluation reads, of how many that are held out.

    None are if the data were prepared with `--valid_fraction 0`.
    """
    manifest = Manifest.load(run.data.data_dir)
    split = manifest.splits.get("valid")
    held_out = split.rows if split else 0
    wanted = run.train.eval_rows
    if wanted is None:
        wanted = _EVALUATED_TOKENS // manifest.max_seq_length
    return min(wanted or held_out, held_out), held_out


def evaluation_interval(run: PretrainConfig) -> int:
    """Optimizer steps between evaluations: as asked for, or soon enough to notice a collapse."""
    if run.train.eval_interval:
        return run.train.eval_interval
    # A row costs a third of what training on it does.
    cost = evaluated_rows(run)[0] / (3 * run.train.train_batch_size)
    rare_enough = max(100, run.train.num_training_steps // 1000, math.ceil(20 * cost))
    return min(run.train.dump_interval, rare_enough)


def build_checkpointer(run: PretrainConfig, tokenizer: DebertaTokenizer) -> Checkpointer:
    """Checkpoints that know what they may be resumed with.

    Raises:
        ValueError: `--resume never` where there are checkpoints already; `--accept_changes` of
            what can not change.
    """
    configs = model_configs(run, tokenizer)
    ds_config = next(iter(build_ds_configs(run, configs).values()))
    models = {name: config.to_dict() for name, config in configs.items()}
    identity = identity_of(run, models, ds_config)
    checkpointer = Checkpointer(
        run.output_dir,
        keep=run.train.keep_checkpoints,
        identity=identity,
        placement={"world size": world_size()} | describe(ds_config),
        settings=settings_of(run, ds_config, identity),
        contents={"models": models, "embedding_sharing": identity["embedding_sharing"]},
        vocab_file=tokenizer.vocab_file,
        accept_changes=run.accept_changes,
    )
    if run.resume == "never" and (latest := checkpointer.latest()):
        raise ValueError(
            f"{latest} exists and --resume is never; use --resume auto to go on from it, or "
            "another --output_dir"
        )
    return checkpointer


def training_flops(run: PretrainConfig, configs: Mapping[str, DebertaConfig]) -> int:
    """Operations of training on one row: three forward passes of each model."""
    length = run.data.row_length
    predictions = round(run.data.mask_prob * length)
    return 3 * sum(
        forward_flops(
            config, length=length, predictions=None if name == "discriminator" else predictions
        )
        for name, config in configs.items()
    )


def describe_batch(run: PretrainConfig) -> str:
    """How a step's rows are dealt out."""
    rows = run.train.micro_batch(world_size())
    micro_batches = run.train.train_batch_size // (rows * world_size())
    return f"{world_size()} processes x {micro_batches} micro-batches x {rows} rows"


def describe_length(run: PretrainConfig) -> str:
    """How long the training is."""
    steps, rows = (
        run.train.num_training_steps,
        Manifest.load(run.data.data_dir).splits["train"].rows,
    )
    epochs = steps * run.train.train_batch_size / rows
    minutes = run.train.max_minutes
    return f"{steps:,} steps, {epochs:,.2f} epochs over {rows:,} rows" + (
        f"; or {minutes:g} minutes, if these end first, with a schedule that fits"
        if minutes
        else ""
    )


def describe_evaluation(run: PretrainConfig) -> str:
    """What each evaluation reads."""
    evaluated, held_out = evaluated_rows(run)
    if not evaluated:
        return (
            f"none, because {run.data.data_dir} has no held-out rows: this run does not evaluate, "
            "and cannot see a collapse"
        )
    steps = evaluation_interval(run)
    return f"{evaluated:,} of {held_out:,} held-out rows, every {steps:,} steps and at the end"


def build_metrics(
    run: PretrainConfig, tokenizer: DebertaTokenizer, device: torch.device, state: TrainState
) -> MetricTracker:
    """Opens the run's folder for writing: config.json, metrics.jsonl and TensorBoard."""
    configs = model_configs(run, tokenizer)
    dtype = precision(next(iter(build_ds_configs(run, configs).values())))
    if is_main():
        run.output_dir.mkdir(parents=True, exist_ok=True)
        _write_config(run, state.step)
    logger.info("configuration, also in %s:\n%s", run.output_dir / "config.json", run.to_json())
    logger.info("the training: %s", describe_length(run))
    logger.info("each step: %s", describe_batch(run))
    logger.info("each evaluation: %s", describe_evaluation(run))
    metrics = MetricTracker(
        run.output_dir,
        total_steps=run.train.num_training_steps,
        start_step=state.step,
        flops_per_token=training_flops(run, configs) / run.data.row_length,
        peak_flops=measure_peak_flops(device, dtype) * world_size(),
    )
    metrics.log_text("config", run.to_json())
    return metrics


def _write_config(run: PretrainConfig, step: int) -> None:
    """Write config.json. One that differs is kept, with the step up to which it counted."""
    file, content = run.output_dir / "config.json", run.to_json().encode() + b"\n"
    if file.exists() and file.read_bytes() != content:
        name = f"config.step_{step:07d}"
        names = (f"{name}_{number}.json" if number > 1 else f"{name}.json" for number in count(1))
        kept = next(path for path in map(run.output_dir.joinpath, names) if not path.exists())
        file.rename(kept)
        logger.info("the settings before this start differ: %s", kept)
    write_durably(file, lambda stream: stream.write(content))


def build_health(
    run: PretrainConfig,
    tokenizer: DebertaTokenizer,
    valid_batches: Iterable[Batch] | None,
    metrics: MetricTracker,
    device: torch.device,
) -> Health:
    """What looks out for skipped updates and collapse. Every rank must call it."""
    level = unigram_level(run, tokenizer, valid_batches, device)
    if level:
        logger.info(
            "a model that ignores the context would reach loss %.4f and accuracy %.2f%% in each "
            "evaluation",
            level.loss,
            100 * level.accuracy,
        )
    warmup = warmup_steps(run.optim, run.train.num_training_steps)
    return Health(run.health, metrics, warmup_steps=warmup, unigram=level)


def unigram_level(
    run: PretrainConfig,
    tokenizer: DebertaTokenizer,
    valid_batches: Iterable[Batch] | None,
    device: torch.device,
) -> UnigramLevel | None:
    """What token frequencies alone give in an evaluation; None if there is nothing to evaluate."""
    if valid_batches is None:
        return None
    train_rows = ShardDataset(run.data.data_dir, "train", Manifest.load(run.data.data_dir))
    unigram = Unigram.of(train_rows, tokenizer.num_tokens, tokenizer.special)
    totals = unigram.score_batches(valid_batches, build_masker(run, tokenizer))
    loss, correct, count = sum_across_ranks(torch.from_numpy(totals).to(device)).tolist()
    return UnigramLevel(loss / count, correct / count) if count else None
