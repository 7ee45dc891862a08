"""The model card of an export, and its upload to the hub."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard

from ds_deberta import hub
from ds_deberta.model_card import model_card
from run_pretrain import export


def describe(objective: str, models: dict[str, Any]) -> dict[str, Any]:
    return {
        "identity": {"objective": objective, "learning_rate": 0.003, "embedding_sharing": "gdes"},
        "models": models,
        "state": {"step": 600, "consumed_samples": 38400},
    }


def test_a_card_has_data_recipe_and_last_evaluation(data_dir: Path, tiny_config, tmp_path: Path):
    checkpoint = tmp_path / "mine" / "checkpoints" / "step_0000600"
    checkpoint.mkdir(parents=True)
    sizes = json.loads(json.dumps(tiny_config.to_dict()))
    description = describe("rtd", {"generator": sizes, "discriminator": sizes})
    (tmp_path / "mine" / "config.json").write_text(
        json.dumps({"data_dir": str(data_dir), "rtd_lambda": 50.0})
    )
    lines = [
        {"step": step, "split": split, "rtd_auc": auc, "generator_loss": 4.7}
        for step, split, auc in ((300, "valid", 0.5), (600, "valid", 0.625), (600, "train", 0.9))
    ]
    lines.append({"step": 900, "split": "valid", "rtd_auc": 0.99})  # after this checkpoint
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "mine" / "metrics.jsonl").write_text(text + '{"step": 9')

    card = ModelCard(model_card("discriminator", checkpoint, description))
    assert card.data.library_name == "transformers"
    assert card.data.license == "unknown"
    for fact in ("train: 600 documents, 200 rows", "| rtd_auc | 0.625 |", "| rtd_lambda | 50.0 |"):
        assert fact in card.text
    assert 'AutoTokenizer.from_pretrained("PATH/TO/discriminator")'.replace('"', "'") in card.text

    generator = ModelCard(model_card("generator", checkpoint, description))
    assert generator.data.pipeline_tag == "fill-mask"
    assert "| generator_loss | 4.7 |" in generator.text
    assert "no enhanced mask decoder" in generator.text
    assert "no enhanced mask decoder" not in card.text

    (tmp_path / "mine" / "metrics.jsonl").write_text(
        '{"step": 600, "split": "valid", "mlm_loss": 3}'
    )
    plain = sizes | {"position_biased_input": True}  # transformers has the whole model
    masked = model_card("model", checkpoint, describe("mlm", {"model": plain}))
    assert "| mlm_loss | 3 |" in masked
    assert "no enhanced mask decoder" not in masked

    alone = tmp_path / "a" / "b" / "step_0000600"  # a checkpoint without its run
    card = model_card("model", alone, describe("mlm", {"model": sizes}))
    assert "no longer where the training read them" in card
    assert "There was no evaluation" in card
    assert "| learning_rate | 0.003 |" in card
    assert "embedding_sharing" not in card


class FakeApi:
    """The hub, which may be out of reach."""

    uploaded: list[tuple[str, str]] = []  # noqa: RUF012
    error: Exception | None = None

    def whoami(self) -> None:
        if self.error:
            raise self.error

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> Any:
        self.whoami()
        assert private
        assert exist_ok
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        assert commit_message
        self.uploaded.append((repo_id, folder_path.name))


def test_a_push_is_refused_before_the_training_or_uploads_every_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(hub, "HfApi", FakeApi)
    monkeypatch.setattr(FakeApi, "uploaded", [])
    monkeypatch.setattr(hub, "get_token", lambda: None)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match="must be NAME or OWNER/NAME; got 'a/b/c'"):
        hub.check_push("a/b/c")
    with pytest.raises(ValueError, match="needs a token of the hub; there is none"):
        hub.check_push("mine")
    monkeypatch.setattr(hub, "get_token", lambda: "secret")
    hub.check_push("mine")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        hub.check_push("mine")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)

    folder = tmp_path / "run" / "export"
    for name in ("discriminator", "generator"):
        (folder / name).mkdir(parents=True)
    monkeypatch.setattr("run_pretrain.update_export", lambda *_: True)
    run: Any = SimpleNamespace(output_dir=tmp_path / "run", push_to_hub="mine")
    assert export(run, tmp_path) == 0
    assert FakeApi.uploaded == [("me/mine", "discriminator"), ("me/mine-generator", "generator")]

    monkeypatch.setattr(FakeApi, "error", hub.HTTPError("no route to host"))
    with pytest.raises(ValueError, match="it says no route to host"):
        hub.check_push("mine")
    assert export(run, tmp_path) == 1
    assert "The export is kept; the same command pushes it again" in capsys.readouterr().err
