import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    DebertaConfig as HFDebertaV1Config,
)
from transformers import (
    DebertaModel,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
)

from ds_deberta.hf import export_parts
from ds_deberta.model import DebertaConfig, DebertaForMaskedLM, DebertaForRTD, generator_config
from ds_deberta.warm_start import load_pretrained, split_sum, start_generator
from ds_deberta.weights import find_source, public_names, read_weights
from tests.test_hf import POSITIONS, WORD_DELTA, WORDS, assert_equal, build

Weights = dict[str, Tensor]


def half(weights: Weights) -> Weights:
    return {name: weight.half() for name, weight in weights.items()}


@pytest.fixture
def pair(tiny_config: DebertaConfig) -> tuple[Weights, Weights]:
    """A generator and a gdes discriminator, rounded to fp16 as the public ones are."""
    models = build(tiny_config, "gdes")
    return tuple(half(models[name].state_dict()) for name in ("generator", "discriminator"))  # type: ignore[return-value]


def plain(weights: Weights) -> Weights:
    return weights


def old_prefix(weights: Weights) -> Weights:
    return {name.replace("deberta.", "bert.", 1): weight for name, weight in weights.items()}


def wrapped(weights: Weights) -> dict[str, Any]:
    return {"state_dict": {f"module.{name}": weight for name, weight in weights.items()}, "step": 3}


def bare_encoder(weights: Weights) -> Weights:
    return {name.removeprefix("deberta."): weight for name, weight in weights.items()}


def older_head(weights: Weights) -> Weights:
    head, theirs = "lm_predictions.lm_head.", "cls.predictions."
    renamed = {
        name.replace(f"{head}bias", f"{theirs}bias").replace(head, f"{theirs}transform."): weight
        for name, weight in weights.items()
    }
    decoder = {f"{theirs}decoder.weight": weights[WORDS]}
    return renamed | decoder | {f"{theirs}decoder.bias": weights[f"{head}bias"]}


LAYOUTS = [plain, old_prefix, wrapped, bare_encoder, older_head]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_generator_loads_bitwise_from_every_layout(
    layout: Callable[[Weights], Weights], pair, tiny_config, tmp_path: Path
):
    torch.save(layout(pair[0]), tmp_path / "pytorch_model.generator.bin")
    torch.save(pair[1], tmp_path / "pytorch_model.bin")
    for place in (tmp_path, tmp_path / "pytorch_model.generator.bin"):
        model = DebertaForMaskedLM(tiny_config)
        report = load_pretrained(model, place)
        assert (report.fresh, report.unused) == ({}, {})
        assert_equal(model.state_dict(), {k: w.float() for k, w in pair[0].items()})


@pytest.mark.parametrize("layout", [plain, old_prefix, wrapped])
@pytest.mark.parametrize("tables", ["delta", "merged", "both"])
def test_a_discriminator_loads_with_its_own_embeddings_from_every_layout(
    layout: Callable[[Weights], Weights], tables: str, pair, tiny_config, tmp_path: Path
):
    generator = {name: weight.float() for name, weight in pair[0].items()}
    stored = dict(pair[1])
    merged = (generator[WORDS] + stored[WORD_DELTA].float()).half()  # as the original writes it
    if tables != "delta":
        stored[WORDS] = merged
    if tables == "merged":
        del stored[WORD_DELTA]
    torch.save(layout(stored), tmp_path / "pytorch_model.bin")
    model = DebertaForRTD(tiny_config, embedding_sharing="gdes")
    report = load_pretrained(model, tmp_path, generator=generator)
    expected = {name: weight.float() for name, weight in pair[1].items()}
    if tables == "merged":
        delta = model.state_dict()[WORD_DELTA]
        assert torch.equal(generator[WORDS] + delta, merged.float())
        assert report.notes == (
            f"{WORD_DELTA} = {WORDS} - the generator's; their sum is it exactly",
        )
        expected[WORD_DELTA] = delta
    assert report.unused.keys() == ({WORDS} if tables == "both" else set())
    assert_equal(model.state_dict(), expected)

    independent = DebertaForRTD(tiny_config)
    load_pretrained(independent, tmp_path, generator=generator)
    table = independent.state_dict()[WORDS]
    torch.testing.assert_close(table, merged.float(), rtol=0, atol=5e-3)


def test_a_difference_to_another_generator_is_not_taken(pair, tiny_config, tmp_path: Path):
    merged = pair[0][WORDS] + pair[1][WORD_DELTA]
    torch.save(pair[1] | {WORDS: merged}, tmp_path / "pytorch_model.bin")
    other = {WORDS: pair[0][WORDS].float() + 1}
    model = DebertaForRTD(tiny_config, embedding_sharing="gdes")
    report = load_pretrained(model, tmp_path, generator=other)
    assert "belongs to another generator" in report.notes[0]
    total = other[WORDS] + model.state_dict()[WORD_DELTA]
    torch.testing.assert_close(total, merged.float(), rtol=0, atol=1e-6)
    assert WORD_DELTA in report.unused


def test_one_file_of_both_models_gives_each_its_half(pair, tiny_config, tmp_path: Path):
    both = {f"generator.{name}": weight for name, weight in pair[0].items()}
    both |= {f"discriminator.{name}": weight for name, weight in pair[1].items()}
    torch.save(both, tmp_path / "pytorch.model-000100.bin")
    for model, weights in (
        (DebertaForMaskedLM(tiny_config), pair[0]),
        (DebertaForRTD(tiny_config, embedding_sharing="gdes"), pair[1]),
    ):
        load_pretrained(model, tmp_path)
        assert_equal(model.state_dict(), {k: w.float() for k, w in weights.items()})


def test_the_report_names_every_left_over_tensor_and_why(pair, tiny_config, tmp_path: Path):
    names = ["lm_predictions.lm_head.bias", "classifier.weight", "strange.part", POSITIONS]
    left_over = dict.fromkeys(names, torch.zeros(2))
    headless = {k: w for k, w in pair[1].items() if not k.startswith("mask_predictions.c")}
    torch.save(headless | left_over, tmp_path / "weights.bin")
    model = DebertaForRTD(tiny_config, embedding_sharing="gdes")
    report = load_pretrained(model, tmp_path / "weights.bin")
    assert report.text("discriminator").splitlines() == [
        f"discriminator from {tmp_path / 'weights.bin'}: {len(headless)} tensors loaded",
        "  fresh (not in the source): mask_predictions.classifier.bias, "
        "mask_predictions.classifier.weight",
        "  ignored (another task's head): classifier.weight",
        f"  ignored (the input has no positions): {POSITIONS}",
        "  ignored (a masked language model's head): lm_predictions.lm_head.bias",
        "  ignored (unknown): strange.part",
    ]


@torch.no_grad()
def test_deberta_v1_gives_the_hidden_states_of_transformers(tmp_path: Path):
    theirs = DebertaModel(
        HFDebertaV1Config(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=32,
            relative_attention=True,
            pos_att_type="c2p|p2c",
            position_biased_input=False,
            type_vocab_size=0,
        )
    ).eval()
    rng = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    theirs.save_pretrained(tmp_path)
    config = DebertaConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        position_buckets=-1,
        share_att_key=False,
        norm_rel_ebd="none",
    )
    ours = DebertaForRTD(config).eval()
    report = load_pretrained(ours, tmp_path)
    assert {name.split(".")[0] for name in report.fresh} == {"mask_predictions"}
    assert report.unused == {}
    input_ids = torch.randint(1, 64, (2, 20), generator=rng)
    mask = torch.arange(20) < torch.tensor([[20], [13]])
    expected = theirs(input_ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(ours.deberta(input_ids, mask)[mask], expected[mask])


@pytest.mark.parametrize("legacy", [True, False])
@torch.no_grad()
def test_a_masked_language_model_of_transformers_gives_its_logits(
    legacy: bool, tiny_config: DebertaConfig, tmp_path: Path
):
    """Without the enhanced mask decoder, which transformers does not have."""
    config = replace(tiny_config, position_biased_input=True)
    theirs = DebertaV2ForMaskedLM(DebertaV2Config(**config.to_dict(), legacy=legacy)).eval()
    rng = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    theirs.save_pretrained(tmp_path)
    ours = DebertaForMaskedLM(config).eval()
    report = load_pretrained(ours, tmp_path, role="model")
    assert (report.fresh, report.unused) == ({}, {})
    input_ids = torch.randint(4, 300, (2, 20), generator=rng)
    mask = torch.ones(2, 20, dtype=torch.bool)
    positions = torch.tensor([[0, 3, 7], [1, 2, 19]])
    logits = theirs(input_ids, attention_mask=mask.long()).logits
    expected = torch.stack([row[where] for row, where in zip(logits, positions, strict=True)])
    torch.testing.assert_close(ours.logits(input_ids, mask, positions), expected, rtol=0, atol=2e-5)


def test_without_a_generator_it_starts_from_the_discriminator(
    tiny_config: DebertaConfig, vocab_file: Path, tmp_path: Path
):
    config = replace(tiny_config, num_hidden_layers=4)
    weights = build(config, "nes")["discriminator"].state_dict()
    export_parts({"discriminator": weights}, {"discriminator": config}, "nes", vocab_file, tmp_path)
    source = find_source(tmp_path, "discriminator")
    generator = DebertaForMaskedLM(generator_config(config))
    report = start_generator(generator, source)
    assert "layers 0, 2 and a fresh head" in report.text("generator")
    assert report.fresh.keys() == {
        name for name in generator.state_dict() if name.startswith("lm_") or name == POSITIONS
    }
    own = generator.state_dict()
    for name, weight in weights.items():
        if name.startswith("deberta.encoder.layer.2."):
            assert torch.equal(own[name.replace("layer.2.", "layer.1.")], weight)
        elif ".layer.1." in name or ".layer.3." in name or name.startswith("mask_"):
            assert name in report.unused
        else:
            assert torch.equal(own[name], weight)
    discriminator = DebertaForRTD(config, embedding_sharing="gdes")
    load_pretrained(discriminator, source, generator=own)
    assert not discriminator.state_dict()[WORD_DELTA].any()

    delta = {name: w for name, w in weights.items() if name != WORDS} | {WORD_DELTA: weights[WORDS]}
    save_file(delta, tmp_path / "delta.safetensors")
    with pytest.raises(ValueError, match=r"only the differences .* give that generator too"):
        start_generator(generator, find_source(tmp_path / "delta.safetensors", "discriminator"))


def test_split_sum_restores_every_rounded_sum():
    rng = torch.Generator().manual_seed(0)
    part = torch.randn(200_000, generator=rng)
    scale = torch.exp(4 * torch.randn(200_000, generator=rng))
    other = torch.randn(200_000, generator=rng) * scale
    total = part + other
    found, rounding = split_sum(total, part)
    assert rounding == 0.0
    assert torch.equal(part + found, total)


class Runs:
    """A pickle that would run code."""

    def __reduce__(self) -> tuple:
        return print, ("run",)


def test_files_that_are_not_just_tensors_are_refused_and_never_run(tmp_path: Path, capsys):
    file = tmp_path / "weights.bin"

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            read_weights(find_source(file, "model"))
        assert capsys.readouterr().out == ""

    torch.save({"weight": torch.ones(2), "more": Runs()}, file)
    refused("is refused: .*print")
    file.write_bytes(pickle.dumps({"more": Runs()}))
    refused("is refused: ")
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    refused("is refused: .* or it is no file of weights")
    torch.save({"weight": torch.ones(2000)}, file)
    file.write_bytes(file.read_bytes()[:3000])
    refused("is damaged|is refused")
    torch.save([torch.ones(2)], file)
    refused("must hold tensors by name; it holds a list")
    torch.save({"weight": torch.ones(2), "step": 3}, file)
    refused("must hold tensors by name; step is none")
    torch.save({"bert.x": torch.ones(2), "deberta.x": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match=r"deberta\.x has the meaning of deberta\.x"):
        public_names(read_weights(find_source(file, "model")), role="model", num_heads=1)
    file.rename(tmp_path / "weights.safetensors")
    file = tmp_path / "weights.safetensors"
    refused("is no safetensors file")


def test_a_name_that_is_nowhere_says_what_to_place_where(monkeypatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="there is no nowhere/at/all; --init_generator"):
        find_source(Path("nowhere/at/all"), "generator")
    with pytest.raises(FileNotFoundError, match=r"generator\.bin and config\.json.* place them"):
        find_source(Path("owner/no-such-model"), "generator")


def test_a_hub_name_fetches_what_the_role_needs(monkeypatch, tmp_path: Path):
    asked: list[list[str]] = []

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        assert name == "owner/model"
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    save_file({WORDS: torch.ones(3, 2)}, tmp_path / "model.safetensors")
    source = find_source(Path("owner/model"), "discriminator")
    assert (source.name, source.files) == ("owner/model", (tmp_path / "model.safetensors",))
    with pytest.raises(FileNotFoundError, match=r"generator was not published. Leave out"):
        find_source(Path("owner/model"), "generator")
    torch.save({WORDS: torch.zeros(3, 2)}, tmp_path / "pytorch_model.generator.bin")
    source = find_source(Path("owner/model"), "generator")
    assert not read_weights(source)[WORDS].any()
    is_generator = ["pytorch_model.generator.bin" in patterns for patterns in asked]
    assert is_generator == [False, True, True]
