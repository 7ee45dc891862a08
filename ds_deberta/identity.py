"""What a checkpoint says of its run's settings, for the resume that compares them.

All that moves the weights is in one of three: the identity, of which a resume refuses a change that
`--accept_changes` does not name; the placement, and all other settings, whose changes the log
lists.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ds_deberta.agreement import data_fingerprint
from ds_deberta.config import PretrainConfig
from ds_deberta.data import Manifest

_SCHEDULE = ("warmup", "lr_schedule", "decay_fraction", "lr_end")  # fitted to a longer training
_OF_ONE_START = (
    *("output_dir", "deepspeed_config", "resume", "accept_changes", "expect_world_size"),
    "push_to_hub",
)
# Of a DeepSpeed configuration: what follows from the number of processes, or is in the identity.
_NOT_LISTED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)


def identity_of(
    run: PretrainConfig, models: Mapping[str, Any], ds_config: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the facts that a resumed run must share, name -> value.

    Args:
        run: with all that was left to the data.
        models: the architectures by name, as plain values.
        ds_config: of `load_ds_config`.
    """
    is_rtd = run.objective == "rtd"
    optim = {name: value for name, value in asdict(run.optim).items() if name not in _SCHEDULE}
    # Where the flag is not given, the JSON's gradient_clipping counts.
    optim["max_grad_norm"] = ds_config.get("gradient_clipping", 0.0)
    return {
        "objective": run.objective,
        "models": models,
        "embedding_sharing": run.model.embedding_sharing if is_rtd else "nes",
        "seed": run.seed,
        "train_batch_size": run.train.train_batch_size,
        "max_seq_length": run.data.row_length,
        "max_ngram": run.data.max_ngram,
        "mask_prob": run.data.mask_prob,
        "data": data_fingerprint(Manifest.load(run.data.data_dir)),
        **(asdict(run.rtd) if is_rtd else {}),
        **optim,
    }


def settings_of(
    run: PretrainConfig, ds_config: Mapping[str, Any], identity: Mapping[str, Any]
) -> dict[str, Any]:
    """Return all other settings: flags by name, and DeepSpeed's with its "auto" filled in."""
    known = {*_OF_ONE_START, *identity}
    flags = {name: value for name, value in run.values().items() if name not in known}
    listed = {name: value for name, value in ds_config.items() if name not in _NOT_LISTED}
    return {"flags": flags, "deepspeed": listed}
