import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from ds_deberta.compatibility import fit_configs
from ds_deberta.hf import export_parts
from ds_deberta.model import DebertaConfig, generator_config
from ds_deberta.weights import find_source
from tests.test_hf import build
from tests.test_warm_start import Weights, half


def write_public(
    folder: Path, config: DebertaConfig, vocab_file: Path | None, *, has_config: bool = True
) -> dict[str, Weights]:
    """A folder as the public ones on the hub: fp16, merged embeddings, the generator beside."""
    folder.mkdir(exist_ok=True)
    generator = generator_config(config)
    weights = {
        "discriminator": half(build(config, "nes")["discriminator"].state_dict()),
        "generator": half(build(generator, "nes")["generator"].state_dict()),
    }
    torch.save(weights["discriminator"], folder / "pytorch_model.bin")
    torch.save(weights["generator"], folder / "pytorch_model.generator.bin")
    if has_config:
        values = config.to_dict() | {"model_type": "deberta-v2", "finetuning_task": "none"}
        (folder / "config.json").write_text(json.dumps(values))
    if vocab_file is not None:
        (folder / "spm.model").write_bytes(vocab_file.read_bytes())
    return weights


ROLES = ("discriminator", "generator")


@pytest.mark.parametrize("has_config", [True, False])
def test_sizes_come_from_the_source(
    has_config: bool, tiny_config: DebertaConfig, vocab_file: Path, tokenizer, tmp_path: Path
):
    public = replace(tiny_config, num_hidden_layers=6, intermediate_size=48, vocab_size=340)
    write_public(tmp_path, public, vocab_file, has_config=has_config)
    start = replace(tiny_config, num_hidden_layers=12, hidden_size=64, num_attention_heads=4)
    sources = {role: find_source(tmp_path, role) for role in ROLES}
    asked = {"generator": generator_config(start), "discriminator": start}
    fitted = fit_configs(asked, sources, tokenizer, takes_sizes=True)
    assert fitted["discriminator"].to_dict() == public.to_dict()
    assert fitted["generator"].to_dict() == generator_config(public).to_dict()
    if has_config:
        with pytest.raises(ValueError, match="does not fit the model: it has hidden_size 32, not"):
            fit_configs(asked, sources, tokenizer, takes_sizes=False)


def test_contradictions_are_errors_before_any_weight_is_read(
    tiny_config: DebertaConfig, vocab_file: Path, tokenizer, tmp_path: Path
):
    def refused(message: str, place: Path = tmp_path, role: Any = "discriminator") -> None:
        with pytest.raises(ValueError, match=message):
            fit_configs(
                {"generator": tiny_config, "discriminator": tiny_config},
                {role: find_source(place, role)},
                tokenizer,
                takes_sizes=False,
            )

    write_public(tmp_path, tiny_config, None)
    fit_configs(
        {"discriminator": tiny_config},
        {"discriminator": find_source(tmp_path, "discriminator")},
        tokenizer,
        takes_sizes=False,
    )
    values = json.loads((tmp_path / "config.json").read_text())

    def config(**changes: Any) -> None:
        (tmp_path / "config.json").write_text(json.dumps(values | changes))

    config(num_hidden_layers=3, vocab_size=500)
    refused(r"config\.json must describe .*num_hidden_layers 3, not 2")
    config(num_attention_heads=4)
    refused("does not fit the model: it has num_attention_heads 4, not 2")
    config(position_buckets=4, pad_token_id=3)
    refused("pad_token_id must be 0")
    (tmp_path / "config.json").write_text("{")
    refused(r"config\.json is not JSON")
    config()
    (tmp_path / "pytorch_model.generator.bin").unlink()
    refused("must be a generator; .* holds a discriminator", role="generator")
    piece = max(tokenizer.pieces(range(4, 300)), key=len).encode()
    changed = vocab_file.read_bytes().replace(piece, b"!" * len(piece))
    (tmp_path / "spm.model").write_bytes(changed)
    refused(rf"the vocabularies must be the same; id \d+ is '{piece.decode()}' in .* and '!!+' in")
    (tmp_path / "spm.model").write_text("nothing")
    refused("is not a sentencepiece model")

    save_file({"other": torch.ones(2)}, tmp_path / "other.safetensors")
    refused("must hold the weights of a DeBERTa encoder; .* other", tmp_path / "other.safetensors")
    few, many = tmp_path / "few", tmp_path / "many"
    write_public(few, replace(tiny_config, vocab_size=280), None)
    refused("a row for each id .* 280 rows, .* 301 ids", few)
    write_public(many, replace(tiny_config, vocab_size=384), None)
    refused("has 384 rows and .* makes 320. .* place that spm.model beside", many)


def test_a_tokenizer_json_tells_a_vocabulary_too(
    tiny_config: DebertaConfig, vocab_file: Path, tokenizer, tmp_path: Path
):
    weights = {"discriminator": build(tiny_config, "nes")["discriminator"].state_dict()}
    [folder] = export_parts(
        weights, {"discriminator": tiny_config}, "nes", vocab_file, tmp_path / "export"
    )
    (folder / "spm.model").unlink()
    source = {"discriminator": find_source(folder, "discriminator")}
    config = {"discriminator": tiny_config}
    assert fit_configs(config, source, tokenizer, takes_sizes=False).keys() == config.keys()
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"[MASK]"', '"[MISC]"'))
    with pytest.raises(ValueError, match=r"id 300 is '\[MASK\]' in .* and '\[MISC\]' in"):
        fit_configs(config, source, tokenizer, takes_sizes=False)


def test_words_added_to_the_tokenizer_of_the_weights_are_not_lost(
    tiny_config: DebertaConfig, vocab_file: Path, tokenizer, tmp_path: Path
):
    def fit(folder: Path) -> None:
        source = {"discriminator": find_source(folder, "discriminator")}
        fit_configs({"discriminator": tiny_config}, source, tokenizer, takes_sizes=False)

    weights = {"discriminator": build(tiny_config, "nes")["discriminator"].state_dict()}
    configs = {"discriminator": tiny_config}
    [folder] = export_parts(weights, configs, "nes", vocab_file, tmp_path / "export")
    theirs = AutoTokenizer.from_pretrained(folder)
    theirs.save_pretrained(folder)  # with the special tokens as added ones
    fit(folder)
    theirs.add_tokens(["kubernetes"])
    theirs.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"adds 'kubernetes' \(id 301\)"):
        fit(folder)
    (folder / "spm.model").unlink()
    with pytest.raises(ValueError, match=r"id 301 is None in .* and 'kubernetes' in"):
        fit(folder)
