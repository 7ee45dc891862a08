"""How each preset is trained: the flags that `--model PRESET` fills in. The command line wins.

Learning rates, batch sizes, warm-up and steps of the large models are those of the original's
scripts; what differs says why. The architectures are in model/presets.py.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch

from ds_deberta.model import DebertaConfig, DebertaModel, load_model_config

# A discriminator at the generator's learning rate collapses easily (AUC 0.50-0.54 for the nano
# preset at 3e-3; reported for base at 5e-4). At 1e-4 and below, equal rates are known to work.
_DISCRIMINATOR_SHARE = 0.3

_MLM = {
    "learning_rate": 1e-4,
    "num_training_steps": 1_000_000,
}
_RTD = {
    "learning_rate": 1e-4,
    "discriminator_learning_rate": 1e-4,
    "train_batch_size": 256,
    "warmup": 10_000,
    "num_training_steps": 1_000_000,
    "rtd_lambda": 10,
    "max_ngram": 1,
}
_CONTINUE = _RTD | {
    "learning_rate": 5e-5,
    "discriminator_learning_rate": 5e-5,
    "num_training_steps": 100_000,
}
_XSMALL = _RTD | {
    "learning_rate": 3e-4,
    "discriminator_learning_rate": 3e-4 * _DISCRIMINATOR_SHARE,
    "train_batch_size": 64,
}

# Learns visibly on two CPU cores in minutes, on the demo corpus. The warm-up is a number of steps:
# it takes as many of them in a shorter run.
_NANO = {
    "learning_rate": 3e-3,
    "adam_beta2": 0.98,
    "warmup": 100,
    "train_batch_size": 64,
    "micro_batch_size": 64,
    "num_training_steps": 2300,
    "max_ngram": 1,
    "log_interval": 100,
    "dump_interval": 600,
    "num_workers": 0,
}

RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "mlm": {
        "bert-base": _MLM | {"train_batch_size": 256, "warmup": 10_000, "max_ngram": 1},
        "deberta-nano": _NANO,
        "deberta-base": _MLM | {"train_batch_size": 256, "warmup": 10_000, "max_ngram": 3},
        "xlarge-v2": _MLM | {"train_batch_size": 32, "warmup": 1_000, "max_ngram": 3},
        "xxlarge-v2": _MLM | {"train_batch_size": 32, "warmup": 1_000, "max_ngram": 3},
    },
    "rtd": {
        "deberta-v3-nano": _NANO
        | {"discriminator_learning_rate": 3e-3 * _DISCRIMINATOR_SHARE, "rtd_lambda": 50},
        "deberta-v3-xsmall": _XSMALL,
        "deberta-v3-xsmall-384": _XSMALL,
        "deberta-v3-small": _RTD,
        "deberta-v3-base": _RTD,
        "deberta-v3-large": _RTD,
        "deberta-v3-xsmall-continue": _CONTINUE,
        "deberta-v3-small-continue": _CONTINUE,
        "deberta-v3-base-continue": _CONTINUE,
        "deberta-v3-large-continue": _CONTINUE,
    },
}


def planned_length(model: str) -> int:
    """Tokens per row that a plan counts with where there are no data."""
    return 32 if model == "deberta-v3-nano" else 512  # the demo's rows; the original's


def recipe(objective: str, model: str) -> dict[str, Any]:
    """The flags of a preset; none for a model given as a path, or under the other objective."""
    return RECIPES.get(objective, {}).get(model, {})


def main() -> None:
    """`python -m ds_deberta.recipes OBJECTIVE PRESET`: silent for a preset, else lists them all.

    The scripts' check of their first word; ends with status 2 where it is neither a preset nor
    --help.
    """
    objective, preset = sys.argv[1:]
    if preset in RECIPES[objective]:
        return
    usage = f"./{objective}.sh PRESET [flags of run_pretrain.py]"
    if preset == "--help":
        print("\n".join([f"{usage}; they win over the preset's recipe", "", *_presets(objective)]))  # noqa: T201
        return
    problem = f"there is no preset {preset!r}" if preset else "name a preset"
    sys.stderr.write("\n".join([f"{problem}: {usage}", "", *_presets(objective)]) + "\n")
    sys.exit(2)


def _presets(objective: str) -> Iterator[str]:
    for name in RECIPES[objective]:
        config = load_model_config(name)
        yield (
            f"  {name:28}{config.num_hidden_layers:3} layers x {config.hidden_size:4}, "
            f"{backbone_parameters(config) / 1e6:7.1f}M parameters beside the embeddings"
        )


def backbone_parameters(config: DebertaConfig) -> int:
    """Parameters of an encoder, without the embedding tables, counted without making any."""
    with torch.device("meta"):
        model = DebertaModel(config)
    return sum(p.numel() for name, p in model.named_parameters() if name.startswith("encoder."))


if __name__ == "__main__":
    main()
