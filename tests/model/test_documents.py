"""A document in a packed row is as good as alone, and nothing passes from one into another."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ds_deberta.kernels import disentangled_attention
from ds_deberta.kernels.cpu_attention import cpu_attention
from ds_deberta.model import DebertaConfig, DebertaForMaskedLM, DebertaForRTD
from ds_deberta.model.documents import document_starts, first_states, is_token
from tests.model.test_heads import BERT, CONFIG, make_discriminators, randomize

LENGTH = 64
DOCUMENTS = ((13, 20, 5, 26), (40, 9))  # the first row is full, the second one has padding
ATTENTION = [disentangled_attention, cpu_attention]
CONFIGS = [CONFIG, replace(CONFIG, pos_att_type=("p2c",), position_buckets=8), BERT]

configs = pytest.mark.parametrize("config", CONFIGS, ids=["deberta", "p2c", "bert"])
attentions = pytest.mark.parametrize("attend", ATTENTION, ids=["reference", "cpu"])


def make_rows() -> tuple[Tensor, Tensor]:
    """Ids and document numbers of two packed rows, [CLS] 1 and [SEP] 2 around each document."""
    rng = torch.Generator().manual_seed(5)
    ids = torch.randint(4, 60, (2, LENGTH), generator=rng)
    documents = torch.zeros(2, LENGTH, dtype=torch.int32)
    for row, lengths in enumerate(DOCUMENTS):
        for number, part in enumerate(spans(lengths), 1):
            documents[row, part] = number
            ids[row, part.start], ids[row, part.stop - 1] = 1, 2
    return ids * (documents != 0), documents


def spans(lengths: tuple[int, ...]) -> list[slice]:
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]


def parts() -> list[tuple[int, slice]]:
    return [(row, part) for row, lengths in enumerate(DOCUMENTS) for part in spans(lengths)]


def one_document(ids: Tensor, row: int, part: slice) -> tuple[Tensor, Tensor]:
    """It alone in a row of its own."""
    alone = ids[row : row + 1, part]
    return alone, torch.ones_like(alone, dtype=torch.bool)


def test_starts_are_those_of_the_own_document():
    _, documents = make_rows()
    starts = document_starts(documents)
    for row, part in parts():
        assert starts[row, part].eq(part.start).all()
    assert document_starts(torch.zeros(1, 5, dtype=torch.int32)).eq(0).all()
    hidden = torch.randn(2, LENGTH, 3)
    for row, part in parts():
        firsts = first_states(hidden, documents)[row, part]
        assert torch.equal(firsts, hidden[row, part.start].expand_as(firsts))


def test_bool_masks_cost_nothing():
    mask = torch.ones(2, 5, dtype=torch.bool)
    assert is_token(mask) is mask
    assert document_starts(mask) is None
    hidden = torch.randn(2, 5, 3)
    assert torch.equal(first_states(hidden, mask), hidden[:, :1])


@configs
@attentions
def test_a_packed_document_is_classified_as_it_is_alone(config: DebertaConfig, attend):
    model = DebertaForRTD(config, attend)
    randomize(model)
    ids, documents = make_rows()
    hidden, logits = model.deberta(ids, documents), model(ids, documents)
    for row, part in parts():
        alone = one_document(ids, row, part)
        for packed, truth in ((hidden, model.deberta(*alone)), (logits, model(*alone))):
            assert truth.std() > 0.1
            torch.testing.assert_close(packed[row, part], truth[0], atol=2e-5, rtol=1e-5)
    joined = model(ids, documents != 0)
    assert (joined - logits)[documents > 1].abs().max() > 0.1  # there was something to keep apart


@configs
@attentions
def test_a_packed_document_is_predicted_as_it_is_alone(config: DebertaConfig, attend):
    model = DebertaForMaskedLM(config, attend)
    randomize(model)
    ids, documents = make_rows()
    everywhere = torch.arange(LENGTH).expand(2, -1)
    logits = model.logits(ids, documents, everywhere)
    for row, part in parts():
        alone = one_document(ids, row, part)
        truth = model.logits(*alone, everywhere[:1, : part.stop - part.start])
        torch.testing.assert_close(logits[row, part], truth[0], atol=1e-4, rtol=1e-5)
    picked = torch.tensor([[1, 20, 21, 22, 60], [3, 42, 48, 0, 0]])
    few = model.logits(ids, documents, picked)
    truth = logits.gather(1, picked[..., None].expand(-1, -1, config.vocab_size))
    torch.testing.assert_close(few, truth, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("config", [CONFIG, BERT], ids=["deberta", "bert"])
def test_gdes_equals_own_tables_for_packed_documents_too(config: DebertaConfig):
    shared, own, generator = make_discriminators(config)
    ids, documents = make_rows()
    base = generator.deberta.embeddings.lookup(ids, documents).detach()
    truth = own(ids, documents)
    torch.testing.assert_close(shared(ids, documents, base), truth, atol=2e-5, rtol=1e-5)


def gradients_of_documents(model: nn.Module, outputs, documents: Tensor) -> None:
    """A loss on one document moves the input embeddings of that one alone, bit for bit."""
    seen: list[Tensor] = []
    model.deberta.embeddings.word_embeddings.register_forward_hook(
        lambda module, args, output: seen.append(output)
    )
    values = outputs()
    for row, part in parts():
        (gradient,) = torch.autograd.grad(values[row, part].sin().sum(), seen[0], retain_graph=True)
        own = torch.zeros(2, LENGTH, dtype=torch.bool)
        own[row, part] = True
        assert gradient[own].any(-1).all()
        assert gradient[~own].eq(0).all()


@configs
@attentions
def test_no_gradient_passes_between_documents(config: DebertaConfig, attend):
    ids, documents = make_rows()
    discriminator, generator = DebertaForRTD(config, attend), DebertaForMaskedLM(config, attend)
    everywhere = torch.arange(LENGTH).expand(2, -1)
    for model, outputs in (
        (discriminator, lambda: discriminator.deberta(ids, documents)),
        (discriminator, lambda: discriminator(ids, documents)),
        (generator, lambda: generator.logits(ids, documents, everywhere)),
    ):
        randomize(model)
        gradients_of_documents(model, outputs, documents)


def test_a_document_gets_the_same_weight_gradients_packed_and_alone():
    ids, documents = make_rows()
    model = DebertaForRTD(CONFIG)
    randomize(model)
    tokens = documents != 0
    model(ids, documents)[tokens].sin().sum().backward()
    packed = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    for row, part in parts():
        model(*one_document(ids, row, part)).sin().sum().backward()
    for name, parameter in model.named_parameters():
        scale = parameter.grad.abs().max()
        torch.testing.assert_close(packed[name] / scale, parameter.grad / scale, atol=2e-5, rtol=0)


def test_the_context_sums_its_gradient_in_fp32():
    hidden = torch.ones(1, 600, 1, dtype=torch.bfloat16, requires_grad=True)
    documents = torch.ones(1, 600, dtype=torch.int32)
    documents[:, 300:] = 2
    first_states(hidden, documents).sum().backward()
    assert hidden.grad[0, 0, 0] == hidden.grad[0, 300, 0] == 300
    assert hidden.grad.count_nonzero() == 2
