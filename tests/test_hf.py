import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    dynamic_module_utils,
    pipeline,
)

from ds_deberta.hf import export_parts, merge_embeddings, write_pretrained
from ds_deberta.model import DebertaConfig, DebertaForMaskedLM, DebertaForRTD, EmbeddingSharing
from ds_deberta.warm_start import load_pretrained

Models = dict[str, DebertaForMaskedLM | DebertaForRTD]

WORDS = "deberta.embeddings.word_embeddings.weight"
WORD_DELTA = "deberta.embeddings.word_embeddings._weight"
POSITIONS = "deberta.embeddings.position_embeddings.weight"
POSITION_DELTA = "deberta.embeddings.position_embeddings._weight"

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "deberta": {},
    "bert": {"relative_attention": False, "pos_att_type": (), "position_biased_input": True},
    "position-biased": {"position_biased_input": True},
    "v2": {"conv_kernel_size": 3, "conv_act": "gelu", "share_att_key": False},
}
HEADS = {"model": "cls", "generator": "cls", "discriminator": "mask_predictions"}


def build(config: DebertaConfig, sharing: EmbeddingSharing | None) -> Models:
    """Models whose every parameter (deltas, biases) shows where it goes; None: one MLM model."""
    models: Models = {"model": DebertaForMaskedLM(config)}
    if sharing is not None:
        models = {
            "generator": DebertaForMaskedLM(config),
            "discriminator": DebertaForRTD(config, embedding_sharing=sharing),
        }
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for model in models.values():
            for parameter in model.eval().parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return models


def export(
    models: Models,
    config: DebertaConfig,
    sharing: EmbeddingSharing,
    vocab_file: Path,
    out_dir: Path,
) -> list[Path]:
    weights = {name: model.state_dict() for name, model in models.items()}
    return export_parts(weights, dict.fromkeys(weights, config), sharing, vocab_file, out_dir)


@pytest.fixture(scope="module")
def exported(tiny_config, vocab_file, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator and a gdes discriminator, for reading only."""
    out_dir = tmp_path_factory.mktemp("exported")
    export(build(tiny_config, "gdes"), tiny_config, "gdes", vocab_file, out_dir)
    return out_dir


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize(
    ("architecture", "sharing"),
    [
        *product(("deberta", "bert"), (None, "gdes", "es", "nes")),
        ("position-biased", "gdes"),
        ("v2", None),
    ],
)
@torch.no_grad()
def test_auto_model_loads_every_weight_and_gives_our_hidden_states(
    architecture: str,
    sharing: EmbeddingSharing | None,
    tiny_config: DebertaConfig,
    vocab_file: Path,
    tmp_path: Path,
):
    config = replace(tiny_config, **ARCHITECTURES[architecture])
    models = build(config, sharing)
    folders = export(models, config, sharing or "nes", vocab_file, tmp_path)
    assert [folder.name for folder in folders] == list(models)

    input_ids = torch.randint(4, 300, (3, 20), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(20) < torch.tensor([[20], [13], [1]])
    for folder in folders:
        theirs, info = AutoModel.from_pretrained(folder, output_loading_info=True)
        assert info.keys() >= {"missing_keys", "unexpected_keys", "mismatched_keys"}
        heads = {name.split(".")[0] for name in info.pop("unexpected_keys")}
        assert heads == {HEADS[folder.name]}
        assert not any(info.values()), info
        base = None
        if folder.name == "discriminator" and sharing != "nes":
            base = models["generator"].deberta.embeddings.lookup(input_ids, mask)
        ours = models[folder.name].deberta(input_ids, mask, base)
        states = theirs.eval()(input_ids, attention_mask=mask.long()).last_hidden_state
        torch.testing.assert_close(states[mask], ours[mask], rtol=0, atol=1e-5)


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, bool]:
    """What loads a model with the code of its export, which transformers copies to a cache."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    return {"trust_remote_code": True}


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
@torch.no_grad()
def test_both_heads_give_our_logits_in_transformers(
    architecture: str,
    trusted: dict[str, bool],
    tiny_config: DebertaConfig,
    vocab_file: Path,
    tmp_path: Path,
):
    """Masked language models without the enhanced mask decoder do so without remote code."""
    config = replace(tiny_config, **ARCHITECTURES[architecture])
    models = build(config, "gdes")
    generator, discriminator = export(models, config, "gdes", vocab_file, tmp_path / "out")
    input_ids = torch.randint(4, 300, (3, 20), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(20) < torch.tensor([[20], [13], [1]])
    options = {} if config.position_biased_input else trusted
    ours = models["generator"].logits(input_ids, mask, torch.arange(20).expand(3, 20))
    theirs, info = AutoModelForMaskedLM.from_pretrained(
        generator, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    logits = theirs(input_ids, attention_mask=mask.long()).logits
    torch.testing.assert_close(logits[mask], ours[mask], rtol=0, atol=1e-5)
    alone = theirs(input_ids[1:2, :13], labels=input_ids[1:2, :13])  # no padding, no mask
    torch.testing.assert_close(alone.logits, ours[1:2, :13], rtol=0, atol=1e-5)
    loss = torch.nn.functional.cross_entropy(ours[1, :13], input_ids[1, :13])
    torch.testing.assert_close(alone.loss, loss, rtol=0, atol=1e-5)

    base = models["generator"].deberta.embeddings.lookup(input_ids, mask)
    ours = models["discriminator"](input_ids, mask, base)
    theirs, info = AutoModelForPreTraining.from_pretrained(
        discriminator, output_loading_info=True, **trusted
    )
    assert not any(info.values()), info
    labels = (input_ids % 2).where(mask, -100)
    output = theirs(input_ids, attention_mask=mask.long(), labels=labels)
    torch.testing.assert_close(output.logits[mask], ours[mask], rtol=0, atol=1e-5)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(ours[mask], labels[mask].float())
    torch.testing.assert_close(output.loss, loss, rtol=0, atol=1e-5)


def test_without_remote_code_the_plain_classes_load_and_ask_nothing(exported: Path):
    """The trained head is there; what transformers lacks is passed over."""
    theirs, info = AutoModelForMaskedLM.from_pretrained(
        exported / "generator", output_loading_info=True
    )
    assert type(theirs).__module__.startswith("transformers.models.deberta_v2")
    assert not any(info.values()), info
    ours = load_file(exported / "generator/heads.safetensors")
    head = theirs.cls.predictions
    assert torch.equal(head.transform.dense.weight, ours["lm_predictions.lm_head.dense.weight"])
    assert torch.equal(head.decoder.bias, ours["lm_predictions.lm_head.bias"])
    assert head.decoder.weight is theirs.deberta.embeddings.word_embeddings.weight
    theirs, info = AutoModelForSequenceClassification.from_pretrained(
        exported / "discriminator", output_loading_info=True
    )
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"classifier", "pooler"}
    assert {name.split(".")[0] for name in info["unexpected_keys"]} == {"mask_predictions"}


def test_the_fill_mask_pipeline_works_from_the_folder(exported: Path, trusted: dict[str, bool]):
    for options, kind in (({}, "DebertaV2ForMaskedLM"), (trusted, "DebertaV2ForEnhancedMaskedLM")):
        fill = pipeline("fill-mask", str(exported / "generator"), **options)
        assert type(fill.model).__name__ == kind
        assert len(fill("the king builds a [MASK] .", top_k=3)) == 3


def test_what_transformers_saves_again_keeps_head_and_code(
    exported: Path, trusted: dict[str, bool], tiny_config: DebertaConfig, tmp_path: Path
):
    for name, auto in (
        ("generator", AutoModelForMaskedLM),
        ("discriminator", AutoModelForPreTraining),
    ):
        auto.from_pretrained(exported / name, **trusted).save_pretrained(tmp_path / name)
        expected = load_file(exported / name / "model.safetensors")
        assert_equal(load_file(tmp_path / name / "model.safetensors"), expected)
        assert (tmp_path / name / "modeling_ds_deberta.py").is_file()
    assert load_pretrained(DebertaForMaskedLM(tiny_config), tmp_path / "generator").fresh == {}
    saved = json.loads((tmp_path / "generator" / "config.json").read_text())
    assert DebertaConfig.from_dict(saved).to_dict() == tiny_config.to_dict()


def test_an_export_holds_the_whole_model_in_fp32_under_public_names(exported: Path, tiny_config):
    for name in ("generator", "discriminator"):
        folder = exported / name
        values = json.loads((folder / "config.json").read_text())
        assert DebertaConfig.from_dict(values).to_dict() == tiny_config.to_dict()
        weights = load_file(folder / "model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {torch.float32}
        assert {name.split(".")[0] for name in weights} == {"deberta", HEADS[name]}
        assert (POSITIONS in weights) == (name == "generator")
        assert not [name for name in weights if "_weight" in name]
        assert len({file.stat().st_mode for file in folder.iterdir()}) == 1
    assert not (exported / "discriminator/heads.safetensors").exists()
    heads = load_file(exported / "generator/heads.safetensors")
    own = DebertaForMaskedLM(tiny_config).state_dict()
    assert heads.keys() == {name for name in own if name.startswith("lm_predictions.")}


def test_an_export_with_its_heads_in_a_file_of_their_own_still_loads(
    exported: Path, tiny_config: DebertaConfig, tmp_path: Path
):
    """So versions before this one wrote them, and no head beside the encoder."""
    for name, model in (
        ("generator", DebertaForMaskedLM(tiny_config)),
        ("discriminator", DebertaForRTD(tiny_config)),
    ):
        load_pretrained(model, exported / name)
        weights = {name: weight.clone() for name, weight in model.state_dict().items()}
        heads = {n: w for n, w in weights.items() if "predictions" in n or n == POSITIONS}
        (tmp_path / name).mkdir()
        save_file(heads, tmp_path / name / "heads.safetensors")
        rest = {n: w for n, w in weights.items() if n not in heads}
        save_file(rest, tmp_path / name / "model.safetensors")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
        report = load_pretrained(model, tmp_path / name)
        assert (report.fresh, report.unused) == ({}, {})
        assert_equal(model.state_dict(), weights)


@pytest.mark.parametrize("architecture", ["deberta", "bert"])
def test_generator_and_nes_discriminator_come_back_bitwise(
    architecture: str, tiny_config: DebertaConfig, vocab_file: Path, tmp_path: Path
):
    config = replace(tiny_config, **ARCHITECTURES[architecture])
    models = build(config, "nes")
    folders = export(models, config, "nes", vocab_file, tmp_path)
    for folder, loaded in zip(folders, build(config, "nes").values(), strict=True):
        with torch.no_grad():
            for parameter in loaded.parameters():
                parameter.fill_(torch.nan)
        report = load_pretrained(loaded, folder)
        assert (report.fresh, report.unused) == ({}, {})
        assert_equal(loaded.state_dict(), models[folder.name].state_dict())


@pytest.mark.parametrize("architecture", ["deberta", "bert"])
def test_gdes_discriminator_comes_back_with_the_same_embeddings_bitwise(
    architecture: str, tiny_config: DebertaConfig, vocab_file: Path, tmp_path: Path
):
    config = replace(tiny_config, **ARCHITECTURES[architecture])
    models = build(config, "gdes")
    generator = models["generator"].state_dict()
    before = models["discriminator"].state_dict()
    _, folder = export(models, config, "gdes", vocab_file, tmp_path / "first")
    loaded = DebertaForRTD(config, embedding_sharing="gdes")
    report = load_pretrained(loaded, folder, generator=generator)
    assert (report.fresh, report.unused) == ({}, {})
    assert all(note.endswith("their sum is it exactly") for note in report.notes)
    after = loaded.state_dict()

    deltas = [WORD_DELTA, POSITION_DELTA] if config.position_biased_input else [WORD_DELTA]
    assert len(report.notes) == len(deltas)
    for name in deltas:  # another difference, by the rounding of the sum, but the same sum
        table = generator[name.replace("_weight", "weight")]
        assert torch.equal(table + after[name], table + before[name])
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-7)
        before[name] = after[name]
    assert_equal(after, before)

    again = {"generator": models["generator"], "discriminator": loaded}
    _, second = export(again, config, "gdes", vocab_file, tmp_path / "second")
    for file in folder.iterdir():
        assert (second / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize(
    ("architecture", "tables"), [("deberta", (WORDS,)), ("bert", (POSITIONS, WORDS))]
)
def test_es_discriminator_comes_back_without_tables(
    architecture: str,
    tables: tuple[str, ...],
    tiny_config: DebertaConfig,
    vocab_file: Path,
    tmp_path: Path,
):
    config = replace(tiny_config, **ARCHITECTURES[architecture])
    models = build(config, "es")
    _, folder = export(models, config, "es", vocab_file, tmp_path)
    loaded = DebertaForRTD(config, embedding_sharing="es")
    assert tuple(load_pretrained(loaded, folder).unused) == tables
    assert_equal(loaded.state_dict(), models["discriminator"].state_dict())
    stored, generator = load_file(folder / "model.safetensors"), models["generator"].state_dict()
    assert_equal(
        {name: stored[name] for name in tables}, {name: generator[name] for name in tables}
    )


def test_merge_embeddings():
    generator = {WORDS: torch.tensor([1.0, 2.0]), POSITIONS: torch.tensor([3.0])}
    delta = {WORD_DELTA: torch.tensor([0.5, -2.0], dtype=torch.bfloat16)}
    own = {WORDS: torch.tensor([5.0, 6.0])}
    other = {"deberta.encoder.rel_embeddings.weight": torch.tensor([7.0])}

    def merge(discriminator, generator, sharing: EmbeddingSharing) -> dict[str, Tensor]:
        merged = merge_embeddings(discriminator, generator, sharing)
        return {name: weight.read() for name, weight in merged.items()}

    assert_equal(merge(other | delta, generator, "gdes"), other | {WORDS: torch.tensor([1.5, 0.0])})
    assert_equal(merge(other, generator, "es"), other | generator)
    assert_equal(merge(other | own, generator, "nes"), other | own)
    assert_equal(merge(other | own, None, "nes"), other | own)
    with pytest.raises(ValueError, match="gdes needs the generator's weights"):
        merge_embeddings(other | delta, None, "gdes")


def test_a_public_discriminator_with_delta_and_left_over_weights(tiny_config, tmp_path: Path):
    """The layout of the public v3-xsmall: fp16, merged table and delta, both heads."""
    models = build(tiny_config, "gdes")
    generator = models["generator"].half().state_dict()
    stored = models["discriminator"].half().state_dict()
    left_over = {name: generator[name] for name in generator if "lm_predictions" in name}
    left_over |= dict.fromkeys((POSITIONS, POSITION_DELTA), generator[POSITIONS])
    merged = generator[WORDS] + stored[WORD_DELTA]
    torch.save(stored | left_over | {WORDS: merged}, tmp_path / "pytorch_model.bin")
    torch.save(generator, tmp_path / "pytorch_model.generator.bin")  # beside it on the hub

    for source in (tmp_path, tmp_path / "pytorch_model.bin"):
        loaded = DebertaForRTD(tiny_config, embedding_sharing="gdes")
        report = load_pretrained(loaded, source)
        assert set(report.unused) == left_over.keys() | {WORDS}
        assert report.fresh == {}
        assert_equal(loaded.state_dict(), {name: weight.float() for name, weight in stored.items()})

    independent = DebertaForRTD(tiny_config, embedding_sharing="nes")
    assert WORD_DELTA in load_pretrained(independent, tmp_path).unused
    assert torch.equal(independent.state_dict()[WORDS], merged.float())


def test_a_hugging_face_folder_and_a_bare_encoder_leave_the_heads_fresh(
    exported: Path, tiny_config: DebertaConfig, tmp_path: Path
):
    AutoModel.from_pretrained(exported / "discriminator").save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("deberta."): weight for name, weight in stored.items()}
    save_file(bare, tmp_path / "bare.safetensors")

    whole = load_file(exported / "discriminator" / "model.safetensors")
    encoder = {name: weight for name, weight in whole.items() if name.startswith("deberta.")}
    for source in (tmp_path, tmp_path / "bare.safetensors"):
        for model, fresh in (
            (DebertaForRTD(tiny_config), "mask_predictions"),
            (DebertaForMaskedLM(tiny_config), "lm_predictions"),
        ):
            before = {name: weight.clone() for name, weight in model.state_dict().items()}
            report = load_pretrained(model, source)
            assert set(report.loaded) == encoder.keys()
            assert {name.split(".")[0] for name in report.fresh if name != POSITIONS} == {fresh}
            assert (POSITIONS in report.fresh) == (fresh == "lm_predictions")
            assert_equal(model.state_dict(), before | encoder)


def test_what_does_not_fit_is_an_error_and_changes_nothing(
    exported: Path, tiny_config: DebertaConfig, tmp_path: Path
):
    def refuses(
        model: DebertaForMaskedLM | DebertaForRTD, source: Path, message: str, **generator: Any
    ) -> None:
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            load_pretrained(model, source, **generator)
        assert_equal(model.state_dict(), before)

    def changed(**changes: Any) -> DebertaForMaskedLM:
        return DebertaForMaskedLM(replace(tiny_config, **changes))

    generator, discriminator = exported / "generator", exported / "discriminator"
    rows = tiny_config.vocab_size
    larger = rf"vocabulary sizes must be equal.*\[{rows}, 32\].*\[{rows + 64}, 32\]"
    refuses(changed(vocab_size=rows + 64), generator, larger)
    refuses(changed(intermediate_size=64), generator, "shapes must be equal; .*intermediate")
    refuses(changed(num_hidden_layers=3), generator, r"lacks weights .*layer\.2\.\S+ and 12 more")
    save_file(changed(num_hidden_layers=3).state_dict(), tmp_path / "deeper.safetensors")
    refuses(changed(), tmp_path / "deeper.safetensors", r"that the model lacks: .*layer\.2\.")
    refuses(changed(**ARCHITECTURES["bert"]), generator, "that the model lacks: .*rel_embeddings")
    refuses(changed(position_biased_input=True), discriminator, f"lacks .* model: {POSITIONS}")

    gdes = DebertaForRTD(tiny_config, embedding_sharing="gdes")
    refuses(gdes, discriminator, "has only the sum .* load the generator too")
    save_file(gdes.state_dict(), tmp_path / "delta.safetensors")
    refuses(DebertaForRTD(tiny_config), tmp_path / "delta.safetensors", f"lacks .* model: {WORDS}")
    with pytest.raises(FileNotFoundError, match="must be a file of weights, or a folder"):
        load_pretrained(changed(), tmp_path / "..")


def test_an_export_is_whole_or_absent(exported: Path, tiny_config, vocab_file, tmp_path: Path):
    with pytest.raises(FileExistsError, match="must be new or empty"):
        write_pretrained({}, tiny_config, vocab_file, exported / "generator")
    out_dir = tmp_path / "runs" / "out"
    with pytest.raises(FileNotFoundError):
        write_pretrained({}, tiny_config, tmp_path / "none.model", out_dir)
    assert list(out_dir.parent.iterdir()) == []
    out_dir.mkdir()
    write_pretrained({}, tiny_config, vocab_file, out_dir)
    assert list(out_dir.parent.iterdir()) == [out_dir]
