"""The README.md of an export: what the model is, what it was trained on and how, and its use.

Facts come from the checkpoint and, as far as they are still there, from its run's config.json and
metrics.jsonl and the manifest of the data.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_deberta.data import Manifest

KINDS = {
    "model": "A DeBERTa encoder with its head of masked language modeling.",
    "generator": "The generator of a replaced token detection: an encoder with its head of masked "
    "language modeling.",
    "discriminator": "The discriminator of a replaced token detection: an encoder to fine-tune, "
    "with a head that tells which tokens of a text were replaced.",
}
RECIPE = (
    *("objective", "embedding_sharing", "num_training_steps", "train_batch_size"),
    *("max_seq_length", "mask_prob", "max_ngram", "learning_rate", "discriminator_learning_rate"),
    *("warmup", "lr_schedule", "weight_decay", "rtd_lambda", "temperature", "seed"),
    *("init_model", "init_generator", "init_discriminator"),
)
CURVES = {
    "model": ("mlm_loss", "mlm_accuracy", "perplexity"),
    "generator": ("generator_loss", "mlm_accuracy", "perplexity"),
    "discriminator": ("discriminator_loss", "rtd_gain", "rtd_auc", "replaced_fraction"),
}
FILL_MASK = """from transformers import pipeline

fill = pipeline("fill-mask", {path!r}, trust_remote_code=True)
for found in fill("This is a [MASK]."):
    print(found["token_str"], found["score"])"""
PLAIN_LAST_LAYER = """

Without `trust_remote_code`, transformers runs the last layer once and without absolute positions,
because it has no enhanced mask decoder. On held-out text of a nano model the loss was then 0.011
nats higher after 600 steps, and 0.002 after 963. Larger models were not measured."""
FINE_TUNE = """from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({path!r})
model = AutoModelForSequenceClassification.from_pretrained({path!r}, num_labels=2)
batch = tokenizer(["one text", "another one"], return_tensors="pt", padding=True)
print(model(**batch).logits)  # of a new head: train it"""


def model_card(name: str, checkpoint: Path, description: Mapping[str, Any]) -> str:
    """Return the README.md of one model.

    Args:
        name: model, generator or discriminator.
        checkpoint: the step_* folder that the model is of.
        description: what its checkpoint.json holds.
    """
    run = checkpoint.parent.parent
    settings = _read_object(run / "config.json") | description["identity"]
    step = description["state"]["step"]
    masks = name != "discriminator"
    use = (
        "```python\n" + (FILL_MASK if masks else FINE_TUNE).format(path=f"PATH/TO/{name}") + "\n```"
    )
    if masks and not description["models"][name]["position_biased_input"]:
        use += PLAIN_LAST_LAYER
    parts = [
        "---\nlibrary_name: transformers\nlicense: unknown\n"
        + ("pipeline_tag: fill-mask\n" if masks else "")
        + "tags:\n- deberta-v2\n---",
        f"# DeBERTa, {name}",
        f"{KINDS[name]} Pre-trained with ds_deberta; {checkpoint.name}, "
        f"{description['state']['consumed_samples']:,} rows of training. "
        "Its licence is not known here: set `license` above to yours.",
        "## Use\n\n" + use,
        "## Data\n\n" + _describe_data(settings),
        "## Size and recipe\n\n"
        + _table(_sizes(description["models"][name]) | _recipe(settings, name)),
        "## Last evaluation\n\n" + _describe_curves(run / "metrics.jsonl", name, step),
    ]
    return "\n\n".join(parts) + "\n"


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
    return {name: config[name] for name in names}


def _recipe(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    known = {key: settings[key] for key in RECIPE if settings.get(key) is not None}
    if name == "model":
        of_rtd = ("embedding_sharing", "discriminator_learning_rate", "rtd_lambda", "temperature")
        known = {key: value for key, value in known.items() if key not in of_rtd}
    return known


def _describe_data(settings: Mapping[str, Any]) -> str:
    try:
        manifest = Manifest.load(Path(settings["data_dir"]))
    except (KeyError, OSError, ValueError):
        return "The prepared data are no longer where the training read them."
    lines = [
        f"- {split}: {info.documents:,} documents, {info.rows:,} rows, {info.tokens:,} tokens"
        for split, info in manifest.splits.items()
    ]
    tokens = f"- vocabulary: {manifest.tokenizer.num_tokens:,} ids (`spm.model`)"
    return "\n".join([*lines, tokens, "", "Say here what text it is, and in which languages."])


def _describe_curves(metrics: Path, name: str, step: int) -> str:
    """Return the newest evaluation up to a step; a cut last line is passed over."""
    found: dict[str, Any] = {}
    try:
        lines = metrics.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and values.get("split") == "valid" and values["step"] <= step:
            found = values
    curves = {key: f"{found[key]:.4g}" for key in CURVES[name] if key in found}
    if not curves:
        return "There was no evaluation on held-out text."
    return _table({"step": found["step"]} | curves)


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "|-|-|", *(f"| {key} | {value} |" for key, value in rows.items())])


def _read_object(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
