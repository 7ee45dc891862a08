"""Whole runs that meet bad numbers, or collapse: what they do, write down and end with."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ds_deberta.data import (
    DebertaTokenizer,
    Manifest,
    ShardWriter,
    SplitInfo,
    TokenizerInfo,
)
from tests.checkpoints import tensors
from tests.launch import ROOT, run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

POISONED = (24, 39)  # of batches of 4: the steps 7 to 10


def lines(folder: Path, split: str) -> list[dict]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["split"] == split]


@pytest.fixture(scope="module")
def repeated_words(vocab_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data whose rows are one token over and over: the context tells all."""
    folder = tmp_path_factory.mktemp("repeated")
    (folder / "spm.model").write_bytes(vocab_file.read_bytes())
    tokenizer = DebertaTokenizer(folder / "spm.model")
    info = TokenizerInfo(file="spm.model", sha256=tokenizer.sha256, num_tokens=tokenizer.num_tokens)
    splits, rng = {}, np.random.default_rng(0)
    for split, rows in (("train", 400), ("valid", 40)):
        writer = ShardWriter(folder / split)
        for word in rng.integers(10, 40, rows):
            writer.write(np.full(30, word, dtype=np.int32))
        shards = tuple(writer.close())
        splits[split] = SplitInfo(rows=rows, tokens=30 * rows, documents=rows, shards=shards)
    Manifest(tokenizer=info, max_seq_length=32, keep_documents_apart=False, splits=splits).save(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def done(
    data_dir: Path,
    repeated_words: Path,
    tiny_model_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> SimpleNamespace:
    """Runs on two ranks: one that comes through, one that gives up and goes on, a fresh one; one
    that does not learn, and one that does.
    """
    folder = tmp_path_factory.mktemp("runs")
    common = [
        *("--model", str(tiny_model_file), "--data_dir", str(data_dir)),
        *("--deepspeed_config", str(ROOT / "ds_configs/zero2_fp32.json"), "--dropout", "0.1"),
        *("--max_seq_length", "32", "--train_batch_size", "4", "--num_workers", "0"),
        *("--lr_schedule", "constant", "--num_training_steps", "14", "--dump_interval", "5"),
    ]
    mlm = ["--objective", "mlm", *common, "--warmup", "3"]
    skipping = [*mlm, "--log_interval", "1", "--max_skipped_steps", "3"]
    rtd = ["--objective", "rtd", *common, "--warmup", "0", "--learning_rate", "1e-9"]
    commands = {
        "through": [*mlm, "--log_interval", "6"],
        "given_up": skipping,
        "gone_on": [*skipping, "--skip_samples", "24-39"],
        "fresh": [*skipping, "--skip_samples", "35-39,24-34"],
        "collapsed": [*rtd, "--eval_interval", "2", "--stop_on_collapse", "true"],
        "learning": [
            *(*rtd, "--data_dir", str(repeated_words), "--learning_rate", "1e-2"),
            *("--train_batch_size", "8", "--warmup", "5", "--num_training_steps", "50"),
            *("--eval_interval", "10", "--stop_on_collapse", "true"),
        ],
    }
    names = {"gone_on": "given_up"}  # in the other's folder
    runs = [[*c, "--output_dir", str(folder / names.get(n, n))] for n, c in commands.items()]
    worker = ROOT / "tests/workers/poisoned_runs.py"
    found = []
    for some in (runs[:2], runs[2:]):  # to look at what the one that gave up left
        arguments = (json.dumps(some), *map(str, POISONED), str(folder))
        run_ranks(worker, *arguments, world_size=2)
        statuses = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
        assert statuses[0] == statuses[1]
        newest = max((folder / "given_up/checkpoints").iterdir()).name
        said = (folder / "0.txt").read_text()
        skipped = lines(folder / "given_up", "skipped")
        found.append(
            SimpleNamespace(statuses=statuses[0], newest=newest, said=said, skipped=skipped)
        )
    return SimpleNamespace(folder=folder, before=found[0], after=found[1])


def test_a_few_bad_steps_are_counted_and_written_down(done):
    assert done.before.statuses[0] == 0
    folder = done.folder / "through"
    assert [(r["step"], r["first_sample"], r["last_sample"]) for r in lines(folder, "skipped")] == [
        (step, 4 * step - 4, 4 * step - 1) for step in (7, 8, 9, 10)
    ]
    assert all(r["skipped"] == ["model"] for r in lines(folder, "skipped"))
    assert "no update of the model: loss or gradients are not finite; samples 24-27" in (
        done.before.said
    )
    assert [r["skipped_steps_model"] for r in lines(folder, "train")] == [0, 4, 4]


def test_a_bad_step_does_not_poison_the_means(done):
    """Step 12's line is of the steps 7 to 12: of the two good ones among them."""
    assert all(math.isfinite(r["mlm_loss"]) for r in lines(done.folder / "through", "train"))
    assert all(r["mlm_loss"] is None for r in lines(done.folder / "through", "skipped"))


def test_bad_steps_in_a_row_end_the_run_on_all_ranks(done):
    """With the samples' numbers, and with the checkpoint from before as the newest."""
    assert done.before.statuses[1] == 1
    assert done.before.newest == "step_0000005"
    assert [row["step"] for row in done.before.skipped] == [7, 8, 9]
    assert "3 updates of the model in a row were skipped" in done.before.said
    assert "at samples 24-35" in done.before.said


def test_a_run_goes_on_past_skipped_samples_as_if_they_had_never_been(done):
    assert done.after.statuses[:2] == [0, 0]
    assert done.after.skipped == []
    gone_on, fresh = (
        tensors(done.folder / name / "checkpoints/step_0000014/model")
        for name in ("given_up", "fresh")
    )
    assert all(torch.equal(gone_on[name], fresh[name]) for name in fresh)
    position = json.loads(
        (done.folder / "fresh/checkpoints/step_0000014/checkpoint.json").read_text()
    )
    assert position["state"]["consumed_samples"] == 14 * 4 + 16


def test_a_collapsed_run_is_saved_and_ends_on_all_ranks(done):
    assert done.after.statuses[2] == 1
    folder = done.folder / "collapsed"
    rows = lines(folder, "collapse")
    assert "unigram" in {row["sign"] for row in rows}
    assert {(row["step"], row["evaluations"]) for row in rows} == {(rows[0]["step"], 3)}
    saved = max((folder / "checkpoints").iterdir()).name
    assert saved == f"step_{rows[0]['step']:07d}"
    assert f"step {rows[0]['step']}, saved: " in done.after.said
    assert "no better than one that ignores the context" in done.after.said
    assert "at 3 evaluations in a row: this has collapsed" in done.after.said


def test_a_run_that_learns_is_no_collapse(done):
    """Its first evaluations, at the level of token frequencies, are not enough."""
    assert done.after.statuses[3] == 0
    folder = done.folder / "learning"
    assert lines(folder, "collapse") == []
    assert lines(folder, "valid")[-1]["step"] == 50
