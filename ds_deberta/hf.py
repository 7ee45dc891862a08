"""Weights out and in: Hugging Face folders, public checkpoints, our own exports.

One exported folder per model:

- config.json, model.safetensors: the encoder, for AutoModel.from_pretrained;
- tokenizer.json, tokenizer_config.json, spm.model: the vocabulary, for AutoTokenizer;
- heads.safetensors: what Hugging Face has no place for, the heads and the position table of the
  enhanced mask decoder.

Our parameters carry the public names, so nothing is renamed on the way out; on the way in, the
layouts of other writers are brought to these names in one place, `public_names`.
"""

import argparse
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ds_deberta.checkpoint import read_description
from ds_deberta.distributed import logger
from ds_deberta.engine import consolidated_weights
from ds_deberta.hf_tokenizer import write_tokenizer
from ds_deberta.model import (
    DebertaConfig,
    DebertaForMaskedLM,
    DebertaForRTD,
    EmbeddingSharing,
)

WORDS = "deberta.embeddings.word_embeddings."
POSITIONS = "deberta.embeddings.position_embeddings."
HEADS_FILE = "heads.safetensors"
WEIGHT_FILES = (  # the first that a folder has
    "model.safetensors",
    "model-*.safetensors",
    "pytorch_model.bin",
    "pytorch_model-*.bin",
)
ADVICE = "Choose the model and the vocabulary that the file was made with (--model, --data_dir)."

# What a source may have and a model not: other heads, other ways to make the embeddings.
MAY_BE_UNUSED = re.compile(
    r"(lm_predictions|mask_predictions|cls|pooler|classifier|qa_outputs)\..*"
    r"|deberta\.embeddings\.((word|position)_embeddings\._?weight|position_ids)"
)
# What a model may have and a source not, besides the enhanced mask decoder's positions.
MAY_BE_FRESH = re.compile(r"(lm_predictions|mask_predictions)\..*")


@dataclass(frozen=True)
class LoadReport:
    """What became of every name in `load_pretrained`."""

    loaded: tuple[str, ...]
    """Parameters that were read."""
    fresh: tuple[str, ...]
    """Parameters that the source lacks; they keep their values."""
    unused: tuple[str, ...]
    """Names of the source that the model has no place for."""


def export_checkpoint(checkpoint: Path, out_dir: Path) -> list[Path]:
    """Export every model of a checkpoint; needs nothing but the checkpoint's own folder.

    Args:
        checkpoint: a step_* folder of a run.
        out_dir: gets a folder for each model; none of them may exist.

    Raises:
        ValueError: not a checkpoint of ours.
    """
    description = read_description(checkpoint)
    configs = {name: DebertaConfig.from_dict(c) for name, c in description["models"].items()}
    weights = {name: consolidated_weights(checkpoint / name) for name in configs}
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


def load_pretrained(
    module: DebertaForMaskedLM | DebertaForRTD,
    source: Path,
    *,
    generator: Mapping[str, Tensor] | None = None,
) -> LoadReport:
    """Read weights into a model; whatever does not fit is an error.

    Args:
        module: not yet partitioned by DeepSpeed.
        source: an export of ours, a Hugging Face folder, or a .safetensors or .bin file.
        generator: the generator's weights, loaded before. A discriminator of gdes needs them where
            the source has the merged table only: then E_delta = E_D - E_G.
    """
    weights = public_names(read_weights(source))
    own = module.state_dict()
    keys = {name: key for name in own if (key := _source_key(name, weights))}
    fresh, unused = own.keys() - keys.keys(), weights.keys() - keys.values()
    _refuse(f"{source} has weights that the model lacks", unused, MAY_BE_UNUSED)
    decoder = set() if module.deberta.position_biased_input else {f"{POSITIONS}weight"}
    _refuse(f"{source} lacks weights of the model", fresh - decoder, MAY_BE_FRESH)
    values: dict[str, Tensor] = {}
    for name, key in keys.items():
        _check_shape(source, key, weights[key].shape, own[name].shape)
        values[name] = weights[key]
        if key != name:  # the model keeps the difference, the source has the sum
            if generator is None:
                raise ValueError(
                    f"{source} has only the sum {key} of the generator's and the discriminator's "
                    "embeddings; to take it apart, load the generator too (--init_generator)"
                )
            values[name] = _float(weights[key]) - _float(generator[key])
    module.load_state_dict(values, strict=False)
    return LoadReport(tuple(keys), tuple(sorted(fresh)), tuple(sorted(unused)))


def read_weights(source: Path) -> dict[str, Tensor]:
    """Read all tensors of a file or folder to the CPU."""
    weights: dict[str, Tensor] = {}
    for file in _weight_files(source):
        if file.suffix == ".safetensors":
            weights |= load_file(file)
        else:
            weights |= torch.load(file, map_location="cpu", weights_only=True)
    return weights


def public_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring the layouts of public files to the names of our parameters."""
    bare_encoder = re.compile(r"^(?=(embeddings|encoder)\.)")
    return {bare_encoder.sub("deberta.", name): weight for name, weight in weights.items()}


def _write_weights(weights: Mapping[str, Tensor], config: DebertaConfig, folder: Path) -> None:
    encoder: dict[str, Tensor] = {}
    heads: dict[str, Tensor] = {}
    for name, weight in weights.items():
        is_decoder_table = name.startswith(POSITIONS) and not config.position_biased_input
        has_place = name.startswith("deberta.") and not is_decoder_table
        (encoder if has_place else heads)[name] = _float(weight).contiguous()
    save_file(encoder, folder / "model.safetensors", {"format": "pt"})
    save_file(heads, folder / HEADS_FILE, {"format": "pt"})


def _weight_files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    for pattern in WEIGHT_FILES:
        if files := sorted(source.glob(pattern)):
            return [*files, *source.glob(HEADS_FILE)]
    raise FileNotFoundError(
        f"{source} must be a file of weights, or a folder with one of {', '.join(WEIGHT_FILES)}"
    )


def _source_key(name: str, weights: Mapping[str, Tensor]) -> str | None:
    """Return where a parameter's value is: under its name, or within the merged table."""
    merged = re.sub(r"\._weight$", ".weight", name)
    return next((key for key in (name, merged) if key in weights), None)


def _refuse(what: str, names: Iterable[str], allowed: re.Pattern[str]) -> None:
    names = sorted(name for name in names if not allowed.fullmatch(name))
    if names:
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        raise ValueError(f"{what}: {shown}. {ADVICE}")


def _check_shape(source: Path, key: str, found: torch.Size, expected: torch.Size) -> None:
    if found != expected:
        is_vocabulary = key.startswith(WORDS) and found[1:] == expected[1:]
        raise ValueError(
            f"the {'vocabulary sizes' if is_vocabulary else 'shapes'} must be equal; {key} has "
            f"{list(found)} in {source} and {list(expected)} in the model. {ADVICE}"
        )


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
