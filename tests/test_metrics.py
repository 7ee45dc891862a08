import json
import math
import re
import sys

import pytest
import torch
from tqdm import tqdm

from ds_deberta.distributed import logger
from ds_deberta.metrics import MetricTracker, reduce_metrics
from ds_deberta.objectives import Metrics


def metrics(loss: float, count: float, **scores) -> Metrics:
    pair = torch.tensor(loss * count), torch.tensor(count)
    return Metrics({"generator_loss": pair}, tokens=torch.tensor(int(count)), **scores)


def rtd_metrics(logits: list[float], replaced: list[bool], mask: list[bool]) -> Metrics:
    x, y, m = (torch.tensor([value]) for value in (logits, replaced, mask))
    each = torch.nn.functional.binary_cross_entropy_with_logits(x, y.float(), reduction="none")
    return Metrics(
        {
            "discriminator_loss": ((each * m).sum(), m.sum()),
            "replaced_fraction": ((y & m).sum(), m.sum()),
        },
        tokens=m.sum(),
        scores=(x, y, m),
    )


@pytest.fixture
def tracker(tmp_path):
    return make_tracker(tmp_path)


def make_tracker(folder, start_step=0):
    return MetricTracker(
        folder,
        total_steps=100,
        start_step=start_step,
        flops_per_token=1e6,
        peak_flops=1e9,
    )


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_means_are_weighted_by_their_counts():
    values = reduce_metrics([metrics(2.0, 10), metrics(5.0, 20)])
    assert values["generator_loss"] == pytest.approx(4.0)
    assert values["perplexity"] == pytest.approx(math.exp(4.0))


def test_ranking_and_gain_equal_their_definitions():
    """AUC by counting pairs, gain from the entropy of the realised rate; padding left out."""
    torch.manual_seed(0)
    logits = torch.randn(60).round(decimals=1)  # with ties
    replaced = torch.rand(60) < torch.sigmoid(logits)
    mask = torch.rand(60) < 0.8
    halves = [
        rtd_metrics(logits[a:b].tolist(), replaced[a:b].tolist(), mask[a:b].tolist())
        for a, b in ((0, 25), (25, 60))
    ]
    values = reduce_metrics(halves, scores_of=halves)

    good, bad = logits[mask & replaced], logits[mask & ~replaced]
    wins = (good[:, None] > bad).double() + 0.5 * (good[:, None] == bad)
    assert values["rtd_auc"] == pytest.approx(wins.mean().item(), abs=1e-6)
    p = replaced[mask].double().mean().item()
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert values["rtd_gain"] == pytest.approx(entropy - values["discriminator_loss"])


def test_quality_is_undefined_where_nothing_was_replaced():
    step = rtd_metrics([0.1, 0.2], [False, False], [True, True])
    values = reduce_metrics([step], scores_of=[step])
    assert math.isnan(values["rtd_auc"])
    assert values["rtd_gain"] < 0


def test_a_log_covers_all_steps_since_the_last_one(tracker, tmp_path):
    for loss in (1.0, 3.0):
        tracker.update(metrics(loss, 10))
    tracker.log(2, {"learning_rate": 0.5})
    tracker.update(metrics(7.0, 10))
    tracker.log(3, {"learning_rate": 0.25})
    first, second = rows(tmp_path)
    assert (first["step"], first["split"], first["generator_loss"]) == (2, "train", 2.0)
    assert (second["generator_loss"], second["learning_rate"]) == (7.0, 0.25)
    assert first["tokens_per_second"] > 0
    assert first["mfu"] == pytest.approx(first["tokens_per_second"] * 1e-3)


def test_the_bar_moves_with_every_step_and_stands_where_the_run_stopped(
    tmp_path, monkeypatch, capsys
):
    """Also with steps that were not applied, and without a value read from the device."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(tqdm, "monitor_interval", 0)
    tracker = make_tracker(tmp_path, start_step=40)
    on_device = Metrics({}, tokens=torch.empty((), device="meta"))  # has no value to read
    for applied in (True, False, True):
        tracker.update(on_device, applied=applied)
        tracker._bar.refresh()
        logger.warning("a line of the log")
    tracker.close()
    shown = re.findall(r"\d+/100", capsys.readouterr().err)
    assert list(dict.fromkeys(shown)) == ["40/100", "41/100", "42/100", "43/100"]


def test_an_undefined_value_is_null_in_the_file(tracker, tmp_path):
    tracker.log_eval(5, {"rtd_auc": math.nan})
    assert rows(tmp_path) == [{"step": 5, "split": "valid", "rtd_auc": None}]


def test_a_resumed_run_drops_what_it_will_write_again(tracker, tmp_path):
    for step in (10, 20, 30):
        tracker.log_eval(step, {"generator_loss": float(step)})
    tracker.close()
    make_tracker(tmp_path, start_step=20).log_eval(30, {"generator_loss": -1.0})
    assert [(row["step"], row["generator_loss"]) for row in rows(tmp_path)] == [
        (10, 10.0),
        (20, 20.0),
        (30, -1.0),
    ]


@pytest.mark.parametrize("cut", ['{"step": 11, "gener', '{"step": 1\n', "\0" * 99, "\n\nnull\n \n"])
def test_a_line_that_a_crash_cut_short_is_dropped_and_announced(tracker, tmp_path, caplog, cut):
    logger.propagate = True  # for caplog
    tracker.log_eval(10, {"generator_loss": 10.0})
    tracker.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + cut)
    make_tracker(tmp_path, start_step=10).log_eval(20, {"generator_loss": 20.0})
    assert [row["step"] for row in rows(tmp_path)] == [10, 20]
    assert re.search(r"line [24], which a crash cut short", caplog.text)


def test_blank_lines_are_dropped_wherever_they_are(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_text('\n{"step": 1}\n \n{"step": 2}\n\n\n')
    make_tracker(tmp_path, start_step=10)
    assert rows(tmp_path) == [{"step": 1}, {"step": 2}]
    assert "cut short" not in caplog.text


@pytest.mark.parametrize("damage", ["not JSON", "[1]", '{"split": "train"}'])
def test_a_damaged_line_is_named(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{damage}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2, must be a JSON object"):
        make_tracker(tmp_path, start_step=10)


def test_a_step_that_was_not_applied_counts_for_speed_alone(tracker, tmp_path):
    tracker.update(metrics(math.nan, 10), applied=False)
    tracker.log(1, {"learning_rate": 0.5})
    tracker.update(metrics(3.0, 10))
    tracker.update(metrics(math.nan, 10), applied=False)
    tracker.log(3, {"learning_rate": 0.5})
    first, second = rows(tmp_path)
    assert "generator_loss" not in first
    assert first["tokens_per_second"] > 0
    assert second["generator_loss"] == 3.0


def test_a_warning_reaches_the_file_and_the_console(tracker, tmp_path, caplog):
    logger.propagate = True  # for caplog
    tracker.warn("skipped", 5, "something is wrong", {"samples": [1, 2], "loss": math.nan})
    assert rows(tmp_path) == [{"step": 5, "split": "skipped", "samples": [1, 2], "loss": None}]
    assert "WARNING step 5: something is wrong" in caplog.text
