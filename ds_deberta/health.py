"""Is the training well? Counts skipped updates and signs of collapse, and ends what is lost."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ds_deberta.data.unigram import UnigramLevel
from ds_deberta.distributed import COLLECTIVE_TIMEOUT
from ds_deberta.metrics import MetricTracker, reduce_metrics
from ds_deberta.objectives import Engine, Metrics

# A discriminator whose AUC stays under this tells replaced tokens no better than chance.
COLLAPSE_AUC = 0.55
# A model that ignores the context comes about as near to the level of token frequencies.
UNIGRAM_MARGIN = 0.05  # nats
_COLLECTIVE_TIMEOUT = COLLECTIVE_TIMEOUT.total_seconds()


class TrainingLostError(RuntimeError):
    """Going on would be a waste. Raised on all ranks together."""


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """When something is wrong."""

    max_skipped_steps: int = 20
    """Updates of a model skipped in a row, for loss or gradients were not finite, that end the run.
    In fp16 the first ones look for the loss scale: allow initial_scale_power and some more."""
    collapse_evaluations: int = 3
    """Evaluations in a row, after the warm-up, that mean a collapse: with an AUC near chance, a
    rising loss, or a generator (or MLM) no better than a model that ignores the context."""
    stop_on_collapse: bool = False
    """Save and end the run when it has collapsed, with status 1; else it is only announced."""
    hang_timeout: float = 1800.0
    """Seconds without a step, an evaluated batch or a checkpoint after which a process leaves its
    stacks in <output_dir>/stacks and ends; 0: never."""

    def __post_init__(self) -> None:
        for name in ("max_skipped_steps", "collapse_evaluations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.hang_timeout <= _COLLECTIVE_TIMEOUT:
            raise ValueError(
                f"hang_timeout must be 0 to {_COLLECTIVE_TIMEOUT:.0f} seconds, after which "
                f"collectives give up of themselves; got {self.hang_timeout}"
            )


class Health:
    """Watches steps and evaluations. All ranks see the same, and so come to the same end.

    Counts begin anew when a run is resumed, which gives a changed setting time to help.

    Args:
        config: how much is too much.
        metrics: where to write what is seen.
        warmup_steps: a collapse is not looked for earlier.
        unigram: what a model that ignores the context reaches in the same evaluations; None if
            there are none.
    """

    def __init__(
        self,
        config: HealthConfig,
        metrics: MetricTracker,
        *,
        warmup_steps: int,
        unigram: UnigramLevel | None = None,
    ) -> None:
        self._config = config
        self._metrics = metrics
        self._warmup_steps = warmup_steps
        self._unigram = unigram
        self.longest_warmup = math.inf
        """The warm-up ends here, if not earlier."""
        self.collapsed = ""
        """What tells of the collapse that the run is to end for."""
        self._skipped: Counter[str] = Counter()  # by engine, in a row
        self._skipped_from = 0  # the first sample of the row
        self._signs: Counter[str] = Counter()  # of collapse, in a row
        self._last_losses: dict[str, float] = {}

    def check_step(
        self, step: int, engines: Mapping[str, Engine], measured: Metrics, samples: tuple[int, int]
    ) -> bool:
        """True if all engines took the step; if not, it is written down.

        Every rank must call it.

        Args:
            step: its number.
            engines: by name, after their updates.
            measured: in this step.
            samples: numbers of the first and the last one it was made of.

        Raises:
            TrainingLostError: so many in a row that it will not get better.
        """
        if not self._skipped:
            self._skipped_from = samples[0]
        skipped = [name for name, engine in engines.items() if not engine.applied]
        self._skipped = Counter({name: self._skipped[name] + 1 for name in skipped})
        if not skipped:
            return True
        names = " and ".join(skipped)
        losses = {
            name: value
            for name, value in reduce_metrics([measured], scores_of=[measured]).items()
            if name.endswith("_loss")
        }
        shown = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
        self._metrics.warn(
            "skipped",
            step,
            f"no update of the {names}: loss or gradients are not finite; samples "
            f"{samples[0]}-{samples[1]}, {shown}",
            {"skipped": skipped, "first_sample": samples[0], "last_sample": samples[1]} | losses,
        )
        if max(self._skipped.values()) >= self._config.max_skipped_steps:
            span = f"{self._skipped_from}-{samples[1]}"
            raise TrainingLostError(
                f"step {step}: {self._config.max_skipped_steps} updates of the {names} in a row "
                f"were skipped, for loss or gradients were not finite, at samples {span}. The "
                "weights are those from before; the same command goes on from the last "
                f"checkpoint. Add --skip_samples {span} if the data are bad; or lower "
                "--learning_rate, or take bf16 or fp32 instead of fp16."
            )
        return False

    def check_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Announce a collapse; `collapsed` then says so if the run is to end.

        Args:
            step: after which it was made.
            values: as `reduce_metrics` gives them.
        """
        if step < min(self._warmup_steps, self.longest_warmup):
            return
        signs = self._signs_in(values)
        self._signs = Counter({name: self._signs[name] + 1 for name in signs})
        for name, count in self._signs.items():
            if count >= self._config.collapse_evaluations:
                message = f"{signs[name]}, at {count} evaluations in a row: this has collapsed"
                self._metrics.warn("collapse", step, message, {"sign": name, "evaluations": count})
                if self._config.stop_on_collapse:
                    self.collapsed = self.collapsed or message

    def _signs_in(self, values: Mapping[str, float]) -> dict[str, str]:
        signs = {}
        auc = values.get("rtd_auc", math.nan)
        if auc < COLLAPSE_AUC:
            signs["rtd_auc"] = (
                f"the discriminator tells replaced tokens no better than chance (AUC {auc:.3f}; "
                "lower --discriminator_learning_rate, to 0.3 of the generator's, say)"
            )
        for name in ("generator_loss", "mlm_loss"):
            if name in values:
                signs |= self._ignorance(values[name], values.get("mlm_accuracy", math.nan))
                before = self._last_losses.get(name, math.inf)
                if not values[name] <= before:  # NaN does not fall either
                    signs[name] = (
                        f"{name} rises (from {before:.4f} to {values[name]:.4f}; lower "
                        "--learning_rate)"
                    )
                if math.isfinite(values[name]):
                    self._last_losses[name] = values[name]
        return signs

    def _ignorance(self, loss: float, accuracy: float) -> dict[str, str]:
        """The sign of a generator (or MLM) that has learned how frequent tokens are, no more."""
        level = self._unigram
        if level is None or not (loss >= level.loss - UNIGRAM_MARGIN or accuracy <= level.accuracy):
            return {}
        return {
            "unigram": (
                "the model that predicts masked tokens is no better than one that ignores the "
                f"context (loss {loss:.4f}, accuracy {accuracy:.2%}; token frequencies alone give "
                f"{level.loss:.4f} and {level.accuracy:.2%}; lower --learning_rate, or lengthen "
                "--warmup)"
            )
        }
