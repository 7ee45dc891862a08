import math

import pytest

from ds_deberta.data.unigram import UnigramLevel
from ds_deberta.distributed import logger
from ds_deberta.health import Health, HealthConfig
from ds_deberta.metrics import MetricTracker


@pytest.fixture
def metrics(tmp_path):
    return MetricTracker(tmp_path, total_steps=99, start_step=0, flops_per_token=1, peak_flops=1)


def announced(
    metrics, caplog, evaluations: list[dict], *, unigram: UnigramLevel | None = None, **config
) -> list[bool]:
    """After which evaluation a collapse was announced; the first two are in the warm-up."""
    logger.propagate = True  # for caplog
    health = Health(HealthConfig(**config), metrics, warmup_steps=3, unigram=unigram)
    found = []
    for step, values in enumerate(evaluations, 1):
        caplog.clear()
        health.check_evaluation(step, values)
        found.append("has collapsed" in caplog.text)
        assert bool(health.collapsed) == (any(found) and config.get("stop_on_collapse", False))
    return found


@pytest.mark.parametrize("stop", [False, True])
def test_an_auc_near_chance_in_a_row_is_a_collapse(metrics, caplog, stop):
    aucs = [0.5, 0.5, 0.51, 0.6, 0.5, 0.53, 0.54, 0.5, 0.7]
    evaluations = [{"rtd_auc": auc} for auc in aucs]
    found = announced(metrics, caplog, evaluations, collapse_evaluations=3, stop_on_collapse=stop)
    assert found == [False] * 6 + [True, True, False]


def test_a_rising_loss_in_a_row_is_a_collapse(metrics, caplog):
    losses = [9.0, 9.5, 6.0, 7.0, 6.5, 6.6, 6.7, math.nan, 6.0, 6.0]
    evaluations = [{"generator_loss": loss, "rtd_auc": 0.8} for loss in losses]
    found = announced(metrics, caplog, evaluations, collapse_evaluations=2)
    assert [i for i, is_announced in enumerate(found) if is_announced] == [6, 7]


DEAD, ALIVE = (6.3, 0.0375), (5.7, 0.08)  # losses fall all the while


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("prefix", ["generator", "mlm"])
def test_a_model_at_the_level_of_token_frequencies_is_a_collapse(metrics, caplog, prefix, stop):
    """Its loss falls a little, and AUC looks as in good runs."""
    seen = [DEAD, DEAD, DEAD, ALIVE, DEAD, DEAD, DEAD, ALIVE]
    evaluations = [
        {f"{prefix}_loss": loss - 0.001 * i, "mlm_accuracy": accuracy, "rtd_auc": 0.56}
        for i, (loss, accuracy) in enumerate(seen)
    ]
    level = UnigramLevel(6.2, 0.0375)
    found = announced(
        metrics, caplog, evaluations, unigram=level, collapse_evaluations=3, stop_on_collapse=stop
    )
    assert found == [False] * 6 + [True, False]


@pytest.mark.parametrize(
    ("loss", "accuracy", "is_dead"),
    [(6.21, 0.2, True), (6.0, 0.0375, True), (6.0, 0.05, False), (math.nan, math.nan, False)],
)
def test_loss_or_accuracy_at_the_level_is_enough(metrics, loss, accuracy, is_dead):
    health = Health(
        HealthConfig(collapse_evaluations=1, stop_on_collapse=True),
        metrics,
        warmup_steps=0,
        unigram=UnigramLevel(6.2, 0.0375),
    )
    health.check_evaluation(1, {"mlm_loss": loss, "mlm_accuracy": accuracy})
    assert ("no better than one that ignores the context" in health.collapsed) == is_dead


def test_an_undefined_auc_is_no_sign(metrics, caplog):
    evaluations = [{"rtd_auc": math.nan}] * 9
    assert not any(announced(metrics, caplog, evaluations, collapse_evaluations=1))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_skipped_steps": 0}, "max_skipped_steps must be at least 1"),
        ({"collapse_evaluations": 0}, "collapse_evaluations must be at least 1"),
        ({"hang_timeout": 1801.0}, "hang_timeout must be 0 to 1800 seconds"),
    ],
)
def test_bad_values_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        HealthConfig(**kwargs)
