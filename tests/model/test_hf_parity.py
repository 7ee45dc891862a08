"""The encoder against transformers' DebertaV2Model: same weights, hidden states and gradients."""

import pytest
import torch
import transformers
from torch import Tensor

from ds_deberta.model import DebertaConfig, DebertaForMaskedLM, DebertaForRTD, DebertaModel

VOCAB, HIDDEN = 50, 32
RELATIVE = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
}
CASES = {
    "both": RELATIVE,
    "c2p": RELATIVE | {"pos_att_type": ["c2p"]},
    "p2c": RELATIVE | {"pos_att_type": ["p2c"]},
    "no term": RELATIVE | {"pos_att_type": []},
    "bert": {"norm_rel_ebd": "layer_norm"},
    "biased": RELATIVE | {"position_biased_input": True},
    "conv": RELATIVE | {"conv_kernel_size": 3, "conv_act": "gelu"},
    "own keys": RELATIVE | {"share_att_key": False},
    "own keys c2p": RELATIVE | {"share_att_key": False, "pos_att_type": ["c2p"]},
    "no norm": RELATIVE | {"norm_rel_ebd": "none"},
    "few buckets": RELATIVE | {"position_buckets": 32, "max_relative_positions": 400},
    "no buckets": RELATIVE | {"position_buckets": -1},
    "defaults of transformers": {"relative_attention": True, "pos_att_type": "c2p|p2c"},
}


def their_config(case: str) -> transformers.DebertaV2Config:
    return transformers.DebertaV2Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **CASES[case],
    )


def make_pair(case: str) -> tuple[DebertaModel, transformers.DebertaV2Model]:
    """Both models with the same weights, large enough that every term of the scores matters."""
    config = their_config(case)
    theirs = transformers.DebertaV2Model(config)
    ours = DebertaModel(DebertaConfig.from_dict(config.to_dict()))
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            noise = torch.randn(parameter.shape, generator=rng) * (
                0.3 if parameter.ndim > 1 else 0.1
            )
            parameter.copy_(noise + 1.0 if name.endswith("LayerNorm.weight") else noise)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def make_batch(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and loss weights; one full row and one that is padded, where nothing counts."""
    rng = torch.Generator().manual_seed(length)
    ids = torch.randint(1, VOCAB, (2, length), generator=rng)
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, length * 2 // 3 :] = False
    weights = torch.randn(2, length, HIDDEN, generator=rng) * mask[..., None] / length
    return ids * mask, mask, weights


def run(model: torch.nn.Module, ids: Tensor, mask: Tensor, weights: Tensor):
    """Hidden states where they count, and the gradient of every parameter."""
    hidden = model(ids, mask)
    if not isinstance(hidden, Tensor):
        hidden = hidden.last_hidden_state
    (hidden * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return hidden[mask.bool()], gradients


@pytest.mark.parametrize("length", [17, 64, 160, 300])
@pytest.mark.parametrize("case", CASES)
def test_hidden_states_and_all_gradients_equal_those_of_transformers(case: str, length: int):
    ours, theirs = make_pair(case)
    batch = make_batch(length)
    our_hidden, our_gradients = run(ours, *batch)
    hidden, gradients = run(theirs, batch[0], batch[1].long(), batch[2])
    torch.testing.assert_close(our_hidden, hidden, atol=1e-5, rtol=0)
    assert our_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        if gradient is None or our_gradients[name] is None:  # a weight that the case does not use
            assert all(g is None or not g.any() for g in (gradient, our_gradients[name])), name
        else:
            torch.testing.assert_close(
                our_gradients[name], gradient, atol=1e-5, rtol=1e-5, msg=name
            )


def test_every_case_is_a_different_model():
    """Nothing above holds for want of a difference."""
    batch = make_batch(300)
    hidden = {case: run(make_pair(case)[0], *batch)[0] for case in CASES}
    for case, states in hidden.items():
        for other in CASES:
            if other != case:
                assert (states - hidden[other]).abs().max() > 1e-2, (case, other)


def test_a_padded_row_equals_the_row_without_padding():
    ours, _ = make_pair("both")
    ids, mask, _ = make_batch(160)
    count = int(mask[1].sum())
    alone = ours(ids[1:, :count], mask[1:, :count])
    torch.testing.assert_close(ours(ids, mask)[1:, :count], alone, atol=1e-5, rtol=0)


# Besides these, the keys of transformers' models and ours are the same.
OURS_ALONE = {
    "mlm": {"deberta.embeddings.position_embeddings.weight"},  # the enhanced mask decoder's
    "rtd": {
        f"mask_predictions.{name}"
        for name in (
            "LayerNorm.weight",
            "LayerNorm.bias",
            "dense.weight",
            "dense.bias",
            "classifier.weight",
            "classifier.bias",
        )
    },
}


@pytest.mark.parametrize("case", CASES)
def test_keys_equal_those_of_transformers_but_for_the_written_list(case: str):
    config = their_config(case)
    config.legacy = False
    own = DebertaConfig.from_dict(config.to_dict())
    theirs = {n: p.shape for n, p in transformers.DebertaV2ForMaskedLM(config).state_dict().items()}
    mlm = {name: value.shape for name, value in DebertaForMaskedLM(own).state_dict().items()}
    extra = set() if config.position_biased_input else OURS_ALONE["mlm"]
    assert mlm.keys() - theirs.keys() == extra
    assert theirs.keys() <= mlm.keys()
    assert all(mlm[name] == shape for name, shape in theirs.items())
    encoder = {name for name in theirs if name.startswith("deberta.")}
    assert DebertaForRTD(own).state_dict().keys() == encoder | OURS_ALONE["rtd"]
