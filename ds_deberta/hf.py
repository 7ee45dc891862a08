"""Weights out: Hugging Face folders.

One exported folder per model:

- config.json, model.safetensors: the encoder, for AutoModel.from_pretrained;
- tokenizer.json, tokenizer_config.json, spm.model: the vocabulary, for AutoTokenizer;
- heads.safetensors: what Hugging Face has no place for, the heads and the position table of the
  enhanced mask decoder.

Our parameters carry the public names, so nothing is renamed on the way out. The way in: weights.py.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ds_deberta.checkpoint import read_description
from ds_deberta.distributed import logger
from ds_deberta.hf_tokenizer import write_tokenizer
from ds_deberta.model import DebertaConfig, EmbeddingSharing
from ds_deberta.weights import HEADS_FILE, POSITIONS, WORDS, find_source, read_weights


def export_checkpoint(checkpoint: Path, out_dir: Path) -> list[Path]:
    """Export every model of a checkpoint; needs nothing but the checkpoint's own folder.

    Args:
        checkpoint: a step_* folder of a run.
        out_dir: gets a folder for each model; none of them may exist.

    Raises:
        ValueError: not a checkpoint of ours, or a damaged one.
    """
    description = read_description(checkpoint)
    configs = {name: DebertaConfig.from_dict(c) for name, c in description["models"].items()}
    weights = {name: read_weights(find_source(checkpoint, name)) for name in configs}
    sharing = description["embedding_sharing"]
    return export_parts(weights, configs, sharing, checkpoint / "spm.model", out_dir)


def export_parts(
    weights_by_model: Mapping[str, Mapping[str, Tensor]],
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
    discriminator: Mapping[str, Tensor],
    generator: Mapping[str, Tensor] | None,
    sharing: EmbeddingSharing,
) -> dict[str, Tensor]:
    """Return the discriminator's weights with embeddings of its own, under public names."""
    merged = dict(discriminator)
    if sharing == "nes":
        return merged
    if generator is None:
        raise ValueError(f"a discriminator of {sharing} needs the generator's weights; give both")
    for table in (WORDS, POSITIONS):
        delta = merged.pop(f"{table}_weight", None)
        if delta is not None:
            merged[f"{table}weight"] = _float(generator[f"{table}weight"]) + _float(delta)
        elif sharing == "es":
            merged[f"{table}weight"] = generator[f"{table}weight"]
    return merged


def write_pretrained(
    weights: Mapping[str, Tensor], config: DebertaConfig, vocab_file: Path, out_dir: Path
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
    hf_facts = {
        "architectures": ["DebertaV2Model"],
        "model_type": "deberta-v2",
        "transformers_version": version("transformers"),
    }
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=f".{out_dir.name}.") as temporary:
        folder = Path(temporary) / out_dir.name
        folder.mkdir()
        _write_weights(weights, config, folder)
        text = json.dumps(config.to_dict() | hf_facts, indent=2, sort_keys=True) + "\n"
        (folder / "config.json").write_text(text)
        write_tokenizer(vocab_file, folder, max_length=config.max_position_embeddings)
        for file in folder.iterdir():  # safetensors writes for the owner only
            file.chmod((folder / "config.json").stat().st_mode)
        os.replace(folder, out_dir)


def _write_weights(weights: Mapping[str, Tensor], config: DebertaConfig, folder: Path) -> None:
    encoder: dict[str, Tensor] = {}
    heads: dict[str, Tensor] = {}
    for name, weight in weights.items():
        is_decoder_table = name.startswith(POSITIONS) and not config.position_biased_input
        has_place = name.startswith("deberta.") and not is_decoder_table
        (encoder if has_place else heads)[name] = _float(weight).contiguous()
    save_file(encoder, folder / "model.safetensors", {"format": "pt"})
    save_file(heads, folder / HEADS_FILE, {"format": "pt"})


def _float(weight: Tensor) -> Tensor:
    return weight.detach().to("cpu", torch.float32)


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
