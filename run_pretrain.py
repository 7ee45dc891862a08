"""Pre-train DeBERTa by masked language modeling (mlm) or replaced token detection (rtd).

    deepspeed run_pretrain.py --objective rtd --model deberta-v3-base --data_dir data/wikipedia \
        --output_dir runs/base --deepspeed_config ds_configs/zero1_bf16.json

Runs under `deepspeed`, `torchrun`, or as `python run_pretrain.py` for one process. `--help` lists
the flags.
"""

import os
import sys
import traceback
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ds_deberta import build
from ds_deberta.agreement import check_agreement, check_data, check_output_dir, on_all_ranks
from ds_deberta.checkpoint import SaveError
from ds_deberta.config import Command, PretrainConfig, parse_command
from ds_deberta.data import load_tokenizer
from ds_deberta.data.sampler import SkippedSamples
from ds_deberta.distributed import barrier, find_place, initialize, is_main, logger, shutdown
from ds_deberta.exports import Exports
from ds_deberta.health import TrainingLostError
from ds_deberta.hf import update_export
from ds_deberta.hf_tokenizer import read_vocabulary
from ds_deberta.horizon import Horizon
from ds_deberta.hub import check_push, push_export
from ds_deberta.leftovers import own_temporary_folder
from ds_deberta.plan import plan
from ds_deberta.resolve import describe_schedule, resolve, warnings_of
from ds_deberta.run_lock import only_run_in
from ds_deberta.stop import StopRequest
from ds_deberta.trainer import train
from ds_deberta.validate import validate
from ds_deberta.watchdog import Watchdog


def pretrain(run: PretrainConfig) -> int:
    """Train, evaluate and export what the configuration says, or go on where it stopped.

    Returns:
        The status to end with: 0, or after a stop on request 128 and the signal's number
        (SIGTERM: 143, Ctrl-C: 130, SIGUSR1: 138); all is saved then. 1 if to continue would be a
        waste.

    Raises:
        SystemExit: with a message; status 2 for what the user can mend, 1 where the training
            ended and its last checkpoint could not be written.
    """
    with ExitStack() as held:
        return _pretrain(run, held)


def _pretrain(run: PretrainConfig, held: ExitStack) -> int:
    try:
        device = initialize(run.seed, expect_world_size=run.expect_world_size)
        run = on_all_ranks(partial(resolve, run))
        check_agreement(run)
        check_output_dir(run.output_dir)
        lock = only_run_in(run.output_dir)
        on_all_ranks(lambda: held.enter_context(lock) if is_main() else None)
        check_data(run.data.data_dir)
        if run.push_to_hub:
            on_all_ranks(partial(_check_push, run.push_to_hub))
        for warning in warnings_of(run):
            logger.warning(warning)
        logger.info(describe_schedule(run))
        tokenizer = load_tokenizer(run.data.data_dir)
        read_vocabulary(tokenizer.vocab_file)  # or the run could end with nothing to export
        horizon = Horizon(run.train.num_training_steps, run.train.max_minutes)
        objective = build.build_objective(run, tokenizer, device, horizon)
        checkpointer = build.build_checkpointer(run, tokenizer)
        state = checkpointer.resume(objective.engines)
        horizon.resume(state.step, state.seconds)
        train_batches = build.build_train_batches(run, tokenizer, state)
        valid_batches = build.build_valid_batches(run, tokenizer)
        metrics = build.build_metrics(run, tokenizer, device, state)
    except (ValueError, OSError) as error:
        if is_main():
            sys.stderr.write(f"run_pretrain.py: {error}\n")
        raise SystemExit(2) from None

    was_complete = state.step >= horizon.total_steps
    health = build.build_health(run, tokenizer, valid_batches, metrics, device)
    watchdog = Watchdog(run.output_dir / "stacks", run.health.hang_timeout)
    lost = None
    with StopRequest() as stop, watchdog:
        try:
            train(
                objective,
                train_batches,
                valid_batches,
                state,
                horizon,
                checkpointer,
                metrics,
                replace(run.train, eval_interval=build.evaluation_interval(run)),
                health,
                stop,
                watchdog,
                export=Exports(run.output_dir, run.train.export_interval).update,
                seed=run.seed,
                skipped=SkippedSamples(run.data.skip_samples),
                tokenizer=tokenizer,
                device=device,
            )
        except (TrainingLostError, SaveError) as error:
            lost = error
    metrics.close()
    if lost:
        if is_main():
            sys.stderr.write(f"run_pretrain.py: {lost}\n")
        barrier()
        return 1
    if stop.signal:
        logger.info("stopped after step %d; the same command goes on from there", state.step)
        barrier()
        return stop.status
    if was_complete:
        logger.info("the training was complete already")
    assert checkpointer.current is not None  # the last step was saved
    status = export(run, checkpointer.current)
    barrier()
    return status


def export(run: PretrainConfig, checkpoint: Path) -> int:
    """Export a run's last checkpoint, unless that has been done; returns the status to end with."""
    folder = run.output_dir / "export"
    try:
        is_new = on_all_ranks(lambda: is_main() and update_export(checkpoint, folder))
    except ValueError as error:
        if is_main():
            sys.stderr.write(
                f"run_pretrain.py: {checkpoint} could not be exported to {folder}: {error}. The "
                "checkpoint is kept. Remove the cause; the same command then exports it.\n"
            )
        return 1
    if is_new:
        logger.info("exported %s", checkpoint)
    if run.push_to_hub and is_main():
        try:
            for address in push_export(folder, run.push_to_hub):
                logger.info("pushed to %s", address)
        except ValueError as error:
            sys.stderr.write(f"run_pretrain.py: {error}\n")
            return 1
    logger.info("the models, for transformers' AutoModel: %s", folder)
    logger.info("the curves: tensorboard --logdir %s", run.output_dir / "tensorboard")
    return 0


def _check_push(name: str) -> None:
    if is_main():
        check_push(name)


def look_ahead(command: Command) -> int:
    """Check (`--validate`) or plan (`--plan`) a run; returns the status to end with."""
    status = 0
    try:
        place = find_place(os.environ)
        if place.local_rank:
            return 0
        for is_right, line in validate(command.run, place) if command.validate else ():
            print(line, flush=True)  # noqa: T201
            status = status if is_right else 2
        if command.plan and place.rank == 0:
            run = resolve(command.run, needs_data=False)
            for line in plan(run, command.plan, command.tokens_per_second):
                print(line, flush=True)  # noqa: T201
    except (ValueError, FileNotFoundError) as error:
        sys.stderr.write(f"run_pretrain.py: {error}\n")
        return 2
    return status


if __name__ == "__main__":
    command = parse_command()
    if command.validate or command.plan:
        sys.exit(look_ahead(command))
    status: Any = 1
    try:
        with own_temporary_folder():
            status = pretrain(command.run)
            shutdown()
    except SystemExit as end:
        status = end.code
    except BaseException:  # also when another rank is gone: this one must not stay for its sake
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    # Past this point only libraries' threads are left, and gloo's sometimes abort the exit.
    os._exit(status)
