"""What does not go together is refused when a run is put together."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ds_deberta.build import (
    build_objective,
    describe_evaluation,
    evaluated_rows,
    evaluation_interval,
    refuse_mixing,
)
from ds_deberta.config import PretrainConfig, parse
from ds_deberta.horizon import Horizon
from ds_deberta.model import load_model_config
from ds_deberta.resolve import resolve
from tests.launch import ROOT


def run_of(model: str, data_dir: Path) -> PretrainConfig:
    flags = ["--objective", "mlm", "--model", model, "--data_dir", str(data_dir)]
    return resolve(parse([*flags, "--output_dir", "x"]))


def test_packed_documents_are_refused_for_a_model_with_a_convolution(packed_data_dir, tokenizer):
    run = run_of("xlarge-v2", packed_data_dir)
    message = "conv_kernel_size must be 0 for the packed documents of .* that of xlarge-v2 is 3"
    with pytest.raises(ValueError, match=message):
        build_objective(run, tokenizer, torch.device("cpu"), Horizon(9))


def test_compiling_is_refused_with_zero_3(data_dir, tokenizer):
    run = run_of("bert-base", data_dir)
    zero3 = ROOT / "ds_configs/zero3_fp32.json"
    run = replace(run, model=replace(run.model, compile=True), deepspeed_config=zero3)
    with pytest.raises(ValueError, match="--compile does not go with ZeRO 3"):
        build_objective(run, tokenizer, torch.device("cpu"), Horizon(9))


def test_compiling_is_refused_on_a_cpu_without_a_compiler(data_dir, tokenizer, monkeypatch):
    run = run_of("bert-base", data_dir)
    run = replace(run, model=replace(run.model, compile=True))
    monkeypatch.setenv("CXX", "no-such-g++")
    message = r"--compile needs a C\+\+ compiler on a CPU; got none by the name of no-such-g\+\+"
    with pytest.raises(ValueError, match=message):
        build_objective(run, tokenizer, torch.device("cpu"), Horizon(9))


@pytest.mark.parametrize(
    ("model", "data"),
    [("xlarge-v2", "data_dir"), ("bert-base", "packed_data_dir")],
)
def test_other_models_and_other_data_are_not(model: str, data: str, request):
    run = run_of(model, request.getfixturevalue(data))
    refuse_mixing(run, {"model": load_model_config(model)})


def test_an_evaluation_reads_a_million_tokens_unless_a_number_is_given(data_dir, monkeypatch):
    run = run_of("bert-base", data_dir)

    def read(eval_rows: int | None) -> tuple[int, int]:
        return evaluated_rows(replace(run, train=replace(run.train, eval_rows=eval_rows)))

    assert [read(rows) for rows in (None, 0, 5, 99)] == [(24, 24), (24, 24), (5, 24), (24, 24)]
    monkeypatch.setattr("ds_deberta.build._EVALUATED_TOKENS", 10 * 32)
    assert read(None) == (10, 24)
    assert read(0) == (24, 24)
    said = "10 of 24 held-out rows, every 1,000 steps and at the end"
    assert describe_evaluation(run) == said
    with pytest.raises(ValueError, match="eval_rows must not be negative"):
        read(-1)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, 1000),  # base, a million steps: ten times as often as checkpoints
        ({"num_training_steps": 2300}, 100),
        ({"num_training_steps": 2300, "train_batch_size": 1}, 160),  # 24 rows cost 8 steps
        ({"num_training_steps": 2300, "dump_interval": 40}, 40),
        ({"eval_interval": 7}, 7),
    ],
)
def test_evaluations_come_often_for_little_of_the_time(data_dir, settings, steps):
    run = run_of("bert-base", data_dir)
    run = replace(run, train=replace(run.train, **settings))
    assert evaluation_interval(run) == steps
