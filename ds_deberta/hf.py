"""Weights out: Hugging Face folders.

    OUT/export.json              which checkpoint the models are of
    OUT/generator/ OUT/discriminator/ (or OUT/model/), each with
        config.json, model.safetensors   the whole model in fp32, under public names: ours, but for
                                         a masked language model's head (see `_HEAD`)
        heads.safetensors                that head under our names, for readers of those
        modeling_ds_deberta.py           classes for what transformers lacks (trust_remote_code)
        tokenizer.json, tokenizer_config.json, spm.model   the vocabulary, for AutoTokenizer
        README.md                        the model card

transformers has no class for the enhanced mask decoder and for a discriminator's head. Without
remote code it passes over their weights. The way in: weights.py.
"""

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from ds_deberta.checkpoint import check_files, read_description
from ds_deberta.distributed import logger
from ds_deberta.hf_tokenizer import write_tokenizer
from ds_deberta.model import DebertaConfig, EmbeddingSharing
from ds_deberta.model_card import model_card
from ds_deberta.model_state import Share, write_shares
from ds_deberta.weights import HEADS_FILE, POSITIONS, WORDS, Stored, find_source, open_weights

RECORD = "export.json"
_HEAD = {
    "lm_predictions.lm_head.dense.": "cls.predictions.transform.dense.",
    "lm_predictions.lm_head.LayerNorm.": "cls.predictions.transform.LayerNorm.",
    "lm_predictions.lm_head.bias": "cls.predictions.bias",
}
"""Our names of a masked language model's head -> those that every version of transformers has.

With `legacy: false` it has ours too, but versions up to 5.17 at least cannot load that.
"""
_CODE = Path(__file__).with_name("modeling_ds_deberta.py")


def update_export(checkpoint: Path, folder: Path) -> bool:
    """Make a folder the export of a checkpoint, unless it is that already.

    The old export stays until the new one is whole. Whatever a killed process left is removed.

    Returns:
        False if there was nothing to do.

    Raises:
        OSError: the models could not be written; the old export is still there.
        ValueError: as `export_checkpoint`.
    """
    new, old = folder.with_suffix(".tmp"), folder.with_suffix(".old.tmp")
    _tidy(folder, new, old)
    if is_export_of(folder, checkpoint):
        return False
    try:
        export_checkpoint(checkpoint, new)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        _tidy(folder, new, old)
    return True


def _tidy(folder: Path, new: Path, old: Path) -> None:
    """Remove what an export leaves on its way; of a failed one, the old folder comes back."""
    if old.exists() and not folder.exists():
        old.rename(folder)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)


def is_export_of(folder: Path, checkpoint: Path) -> bool:
    """Return whether a folder holds the models of this checkpoint."""
    try:
        record = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return False
    description = read_description(checkpoint)
    files = [folder / name / "model.safetensors" for name in description["models"]]
    return record == _record(checkpoint, description) and all(file.is_file() for file in files)


def export_checkpoint(checkpoint: Path, out_dir: Path) -> list[Path]:
    """Export every model of a checkpoint; needs nothing but the checkpoint's own folder.

    Tensors are read and written one by one.

    Args:
        checkpoint: a step_* folder of a run.
        out_dir: gets a folder for each model, none of which may exist, and in the end a record of
            the checkpoint.

    Raises:
        OSError: the models could not be written.
        ValueError: not a checkpoint of ours, or a damaged one.
    """
    description = read_description(checkpoint)
    configs = {name: DebertaConfig.from_dict(c) for name, c in description["models"].items()}
    sources = {name: find_source(checkpoint, name) for name in configs}
    read = [str(file.relative_to(checkpoint)) for s in sources.values() for file in s.files]
    check_files(checkpoint, {name: description["files"][name] for name in read})
    weights = {name: open_weights(source) for name, source in sources.items()}
    sharing = description["embedding_sharing"]
    folders = export_parts(weights, configs, sharing, checkpoint / "spm.model", out_dir)
    for folder in folders:
        card = model_card(folder.name, checkpoint, description)
        (folder / "README.md").write_text(card, encoding="utf-8")
    text = json.dumps(_record(checkpoint, description), indent=2) + "\n"
    (out_dir / RECORD).write_text(text)
    return folders


def _record(checkpoint: Path, description: Mapping[str, Any]) -> dict[str, Any]:
    """Say which checkpoint models are of, such that no other one is described alike."""
    return {
        "checkpoint": checkpoint.name,
        "step": description["state"]["step"],
        "sha256": description["sha256"],
    }


def export_parts(
    weights_by_model: Mapping[str, Mapping[str, Stored | Tensor]],
    configs: Mapping[str, DebertaConfig],
    sharing: EmbeddingSharing,
    vocab_file: Path,
    out_dir: Path,
) -> list[Path]:
    """Write a folder for each model: `model`, or `generator` and `discriminator`."""
    folders: list[Path] = []
    for name, weights in weights_by_model.items():
        if name == "discriminator":
            weights = merge_embeddings(weights, weights_by_model.get("generator"), sharing)
            if not configs[name].position_biased_input:  # "es": only the generator's decoder does
                weights.pop(f"{POSITIONS}weight", None)
        folders.append(out_dir / name)
        write_pretrained(weights, configs[name], vocab_file, folders[-1])
    return folders


def merge_embeddings(
    discriminator: Mapping[str, Stored | Tensor],
    generator: Mapping[str, Stored | Tensor] | None,
    sharing: EmbeddingSharing,
) -> dict[str, Stored]:
    """Return the discriminator's weights with embeddings of its own, under public names."""
    merged = {name: Stored.of(weight) for name, weight in discriminator.items()}
    if sharing == "nes":
        return merged
    if generator is None:
        raise ValueError(f"a discriminator of {sharing} needs the generator's weights; give both")
    for table in (WORDS, POSITIONS):
        delta = merged.pop(f"{table}_weight", None)
        if delta is not None:
            merged[f"{table}weight"] = Stored.of(generator[f"{table}weight"]).plus(delta)
        elif sharing == "es":
            merged[f"{table}weight"] = Stored.of(generator[f"{table}weight"])
    return merged


def write_pretrained(
    weights: Mapping[str, Stored | Tensor],
    config: DebertaConfig,
    vocab_file: Path,
    out_dir: Path,
) -> None:
    """Write a Hugging Face folder, in fp32. It appears whole or not at all.

    Args:
        weights: by public names, embeddings merged.
        config: of the model.
        vocab_file: a sentencepiece model.
        out_dir: must not exist, or be empty.
    """
    assert not any(name.endswith("._weight") for name in weights), "merge the embeddings first"
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise FileExistsError(f"{out_dir} must be new or empty; remove it or choose another")
    facts = config.to_dict() | describe(weights, config)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=f".{out_dir.name}.") as temporary:
        folder = Path(temporary) / out_dir.name
        folder.mkdir()
        _write_weights(weights, folder)
        (folder / "config.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
        if "auto_map" in facts:
            (folder / _CODE.name).write_bytes(_CODE.read_bytes())
        write_tokenizer(vocab_file, folder, max_length=config.max_position_embeddings)
        os.replace(folder, out_dir)


def describe(names: Iterable[str], config: DebertaConfig) -> dict[str, Any]:
    """Return what config.json says to transformers beyond the architecture.

    Args:
        names: of the weights; they show which head there is.
        config: of the model.
    """
    facts: dict[str, Any] = {
        "architectures": ["DebertaV2Model"],
        "model_type": "deberta-v2",
        "transformers_version": version("transformers"),
    }
    heads = {name.split(".")[0] for name in names}
    if "lm_predictions" in heads:
        facts |= {"architectures": ["DebertaV2ForMaskedLM"], "legacy": True}
        if not config.position_biased_input:
            facts["auto_map"] = {
                "AutoModelForMaskedLM": f"{_CODE.stem}.DebertaV2ForEnhancedMaskedLM"
            }
    elif "mask_predictions" in heads:
        facts["auto_map"] = {
            "AutoModelForPreTraining": f"{_CODE.stem}.DebertaV2ForReplacedTokenDetection"
        }
    return facts


def _write_weights(weights: Mapping[str, Stored | Tensor], folder: Path) -> None:
    """Write one tensor after the other, always in the same order."""
    stored = {name: Stored.of(weights[name]) for name in sorted(weights)}
    head = {name: weight for name, weight in stored.items() if name.startswith(tuple(_HEAD))}
    whole = {_public_name(name): weight for name, weight in stored.items()}
    for file, tensors in (("model.safetensors", whole), (HEADS_FILE, head)):
        shapes = {name: weight.shape for name, weight in tensors.items()}
        write_shares([Share(file, shapes, (each.read() for each in tensors.values()))], folder)


def _public_name(name: str) -> str:
    ours = next((prefix for prefix in _HEAD if name.startswith(prefix)), "")
    return _HEAD.get(ours, "") + name.removeprefix(ours)


def main() -> None:
    """`python -m ds_deberta.hf CHECKPOINT OUT`."""
    parser = argparse.ArgumentParser(
        prog="python -m ds_deberta.hf",
        description="Export the models of a checkpoint to Hugging Face folders.",
    )
    parser.add_argument("checkpoint", type=Path, help="a folder RUN/checkpoints/step_*")
    parser.add_argument("out", type=Path, help="folder to write to")
    args = parser.parse_args()
    try:
        for folder in export_checkpoint(args.checkpoint, args.out):
            logger.info("wrote %s", folder)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
