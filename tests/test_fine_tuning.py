"""What users do with an exported discriminator in the libraries around transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from ds_deberta.hf import export_parts
from ds_deberta.model import DebertaConfig
from tests.test_hf import build

WORDS = "deberta.embeddings.word_embeddings.weight"
QUERY = "deberta.encoder.layer.0.attention.self.query_proj.weight"


@pytest.fixture(scope="module")
def discriminator(
    tiny_config: DebertaConfig, vocab_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    models = build(tiny_config, "gdes")
    weights = {name: model.state_dict() for name, model in models.items()}
    out_dir = tmp_path_factory.mktemp("exported")
    export_parts(weights, dict.fromkeys(weights, tiny_config), "gdes", vocab_file, out_dir)
    return out_dir / "discriminator"


@pytest.fixture(scope="module")
def batch(discriminator: Path) -> dict[str, torch.Tensor]:
    texts = ["the old king builds a city", "a river"]
    return AutoTokenizer.from_pretrained(discriminator)(texts, return_tensors="pt", padding=True)


@pytest.mark.parametrize(
    ("auto", "labels"),
    [
        (AutoModelForSequenceClassification, {"labels": torch.tensor([0, 1])}),
        (AutoModelForTokenClassification, {}),
        (
            AutoModelForQuestionAnswering,
            {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([2, 3])},
        ),
    ],
)
def test_an_export_can_be_fine_tuned(
    auto: Any, labels: dict[str, torch.Tensor], discriminator: Path, batch: dict[str, torch.Tensor]
):
    model = auto.from_pretrained(discriminator).train()
    stored = load_file(discriminator / "model.safetensors")
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], stored[name]) for name in (WORDS, QUERY))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses: list[float] = []
    for _ in range(6):
        loss = model(**batch, **(labels or {"labels": batch["input_ids"] % 2})).loss
        loss.backward()
        assert all(parameters[name].grad.abs().sum() > 0 for name in (WORDS, QUERY))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert torch.tensor(losses).isfinite().all()
    assert not torch.equal(parameters[QUERY], stored[QUERY])


@torch.no_grad()
def test_torch_export_takes_the_encoder_for_other_batches_and_lengths(
    discriminator: Path, batch: dict[str, torch.Tensor]
):
    model = AutoModel.from_pretrained(discriminator).eval()
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    any_size = {name: {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO} for name in given}
    program = torch.export.export(model, (), given, dynamic_shapes=any_size).module()
    longer = torch.randint(4, 300, (3, 30), generator=torch.Generator().manual_seed(0))
    for inputs in (given, {"input_ids": longer, "attention_mask": torch.ones_like(longer)}):
        found, right = program(**inputs).last_hidden_state, model(**inputs).last_hidden_state
        torch.testing.assert_close(found, right)
