"""The two pre-trained models against literal ones built from transformers' layers."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from ds_deberta.kernels import AttentionFn, cpu_attention, disentangled_attention
from ds_deberta.model import DebertaConfig, DebertaForMaskedLM, DebertaForRTD, DebertaModel

LENGTH = 150
CONFIG = DebertaConfig(
    vocab_size=60,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
CONV = replace(CONFIG, conv_kernel_size=3)
BERT = replace(CONFIG, relative_attention=False, pos_att_type=(), position_biased_input=True)


def randomize(model: nn.Module) -> None:
    """Weights so large that every part of the model shows in what comes out."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=rng) * (
                0.3 if parameter.ndim > 1 else 0.1
            )
            parameter.copy_(noise + 1.0 if name.endswith("LayerNorm.weight") else noise)


def make_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and predicted positions; the second row is padded and predicts less."""
    rng = torch.Generator().manual_seed(1)
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[1, 100:] = False
    ids = torch.randint(4, CONFIG.vocab_size, (2, LENGTH), generator=rng) * mask
    ids[0, 5] = CONFIG.pad_token_id  # a generator may sample padding for a token
    positions = torch.stack(
        [torch.randperm(99, generator=rng)[:20].sort().values + 1 for _ in range(2)]
    )
    positions[1, 12:] = 0  # unused
    return ids, mask, positions


def make_labels() -> Tensor:
    """Right tokens for `make_batch`; -100 where there is nothing to predict."""
    labels = torch.randint(4, 60, (2, 20), generator=torch.Generator().manual_seed(3))
    labels[1, 12:] = -100
    return labels


def their_encoder(config: DebertaConfig, model: nn.Module) -> transformers.DebertaV2Model:
    """The encoder of transformers around copies of our weights."""
    values = config.to_dict()
    theirs = transformers.DebertaV2Model(transformers.DebertaV2Config(**values))
    weights = {
        name.removeprefix("deberta."): value
        for name, value in model.state_dict().items()
        if name.startswith("deberta.")
    }
    result = theirs.load_state_dict(weights, strict=False)
    assert not result.missing_keys
    return theirs


def literal_masked_lm(
    config: DebertaConfig, model: DebertaForMaskedLM, ids: Tensor, mask: Tensor, positions: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """As the original: every layer and two decoder passes for all positions, rows picked last."""
    theirs = their_encoder(config, model)
    own = {
        name: value.detach().clone().requires_grad_() for name, value in model.state_dict().items()
    }
    outputs = theirs(ids, mask.long(), output_hidden_states=True)
    states = outputs.last_hidden_state
    if not config.position_biased_input:
        encoder, hidden = theirs.encoder, outputs.hidden_states[-2]
        table = own["deberta.embeddings.position_embeddings.weight"]
        states = table[: ids.shape[1]] + hidden
        for _ in range(2):
            states = encoder.layer[-1](
                hidden,
                encoder.get_attention_mask(mask.long()),
                query_states=states,
                relative_pos=encoder.get_rel_pos(hidden),
                rel_embeddings=encoder.get_rel_embedding(),
            )[0]
    head = {name.rsplit("lm_head.")[1]: value for name, value in own.items() if "lm_head" in name}
    states = F.gelu(states @ head["dense.weight"].T + head["dense.bias"])
    states = F.layer_norm(states, (32,), head["LayerNorm.weight"], head["LayerNorm.bias"], 1e-7)
    logits = states @ theirs.embeddings.word_embeddings.weight.T + head["bias"]
    logits = torch.stack([logits[row, positions[row]] for row in range(len(logits))])
    loss(logits).backward()
    gradients = {f"deberta.{name}": p.grad for name, p in theirs.named_parameters()}
    gradients |= {name: value.grad for name, value in own.items() if "lm_head" in name}
    if not config.position_biased_input:
        name = "deberta.embeddings.position_embeddings.weight"
        gradients[name] = own[name].grad
    return logits.detach(), gradients


def loss(logits: Tensor) -> Tensor:
    """A fixed random function of the logits that are used."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    weights[1, 12:] = 0.0
    return (logits * weights).mean()


def compare_gradients(model: nn.Module, gradients: dict[str, Tensor | None]) -> None:
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert ours.keys() == gradients.keys()
    compared = 0
    for name, gradient in gradients.items():
        if gradient is None:
            assert ours[name] is None, name
        else:
            torch.testing.assert_close(ours[name], gradient, atol=1e-5, rtol=1e-5, msg=name)
            compared += int(gradient.abs().max() > 1e-3)
    assert compared > 0.8 * len(gradients)


@pytest.mark.parametrize("config", [CONFIG, CONV, BERT], ids=["deberta", "conv", "bert"])
def test_masked_lm_equals_the_original_decoder_with_every_gradient(config: DebertaConfig):
    model = DebertaForMaskedLM(config)
    randomize(model)
    ids, mask, positions = make_batch()
    logits = model.logits(ids, mask, positions)
    assert logits.shape == (2, 20, CONFIG.vocab_size)
    loss(logits).backward()
    truth, gradients = literal_masked_lm(config, model, ids, mask, positions)
    torch.testing.assert_close(logits, truth, atol=1e-4, rtol=1e-5)  # logits of about 30
    compare_gradients(model, gradients)


@pytest.mark.parametrize("config", [CONFIG, BERT], ids=["deberta", "bert"])
def test_masked_lm_loss_is_that_of_its_logits_with_every_gradient(config: DebertaConfig):
    model = DebertaForMaskedLM(config)
    randomize(model)
    batch, labels = make_batch(), make_labels()
    logits = model.logits(*batch)
    truth = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    (truth / 28).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    uniforms = torch.rand(2, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    output = model(*batch, labels, uniforms, num_tokens=50, temperature=0.7)
    (output.loss / 28).backward()
    torch.testing.assert_close(output.loss, truth, atol=0, rtol=1e-6)
    assert torch.equal(output.predictions, logits[..., :50].argmax(-1))  # of live ids
    assert output.samples.shape == labels.shape
    assert output.samples.max() < 50
    compare_gradients(model, gradients)
    assert model(*batch, labels).samples is None


def test_the_decoder_is_not_the_last_layer():
    """Else the test above could not tell the decoder from the encoder."""
    model = DebertaForMaskedLM(CONFIG)
    randomize(model)
    ids, mask, positions = make_batch()
    encoded = model.deberta(ids, mask).gather(1, positions[..., None].expand(-1, -1, 32))
    decoded = model.deberta(ids, mask, predicted_positions=positions)
    assert (encoded - decoded).abs().max() > 0.1


@pytest.mark.parametrize("config", [CONFIG, BERT], ids=["deberta", "bert"])
def test_predicting_some_positions_equals_predicting_all(config: DebertaConfig):
    model = DebertaForMaskedLM(config)
    randomize(model)
    ids, mask, positions = make_batch()
    everywhere = model.logits(ids, mask, torch.arange(LENGTH).expand(2, -1))
    picked = everywhere.gather(1, positions[..., None].expand(-1, -1, CONFIG.vocab_size))
    torch.testing.assert_close(model.logits(ids, mask, positions), picked, atol=1e-4, rtol=1e-5)


def test_only_predicted_rows_of_the_position_table_get_a_gradient():
    model = DebertaForMaskedLM(CONFIG)
    randomize(model)
    ids, mask, positions = make_batch()
    loss(model.logits(ids, mask, positions)).backward()
    gradient = model.deberta.embeddings.position_embeddings.weight.grad
    used = torch.cat([positions[0], positions[1, :12]]).unique()
    assert gradient.any(1).nonzero()[:, 0].tolist() == used.tolist()


def test_rtd_head_equals_the_original():
    model = DebertaForRTD(CONFIG)
    randomize(model)
    ids, mask, _ = make_batch()
    logits = model(ids, mask)
    theirs = their_encoder(CONFIG, model)
    hidden = theirs(ids, mask.long()).last_hidden_state
    head = {
        name.removeprefix("mask_predictions."): value.detach().clone().requires_grad_()
        for name, value in model.state_dict().items()
        if name.startswith("mask_predictions.")
    }
    states = F.layer_norm(
        hidden[:, 0:1, :] + hidden, (32,), head["LayerNorm.weight"], head["LayerNorm.bias"], 1e-7
    )
    states = F.gelu(states @ head["dense.weight"].T + head["dense.bias"])
    truth = (states @ head["classifier.weight"].T + head["classifier.bias"])[..., 0]
    assert truth[mask].std() > 0.1
    torch.testing.assert_close(logits[mask], truth[mask], atol=1e-5, rtol=1e-5)
    (logits[mask].sin().mean()).backward()
    (truth[mask].sin().mean()).backward()
    gradients = {f"deberta.{name}": p.grad for name, p in theirs.named_parameters()}
    gradients |= {f"mask_predictions.{name}": value.grad for name, value in head.items()}
    compare_gradients(model, gradients)


def make_discriminators(
    config: DebertaConfig,
) -> tuple[DebertaForRTD, DebertaForRTD, DebertaForMaskedLM]:
    """One with gdes and a delta, one with nes whose tables are the sum, and the generator."""
    generator, shared = DebertaForMaskedLM(config), DebertaForRTD(config, embedding_sharing="gdes")
    randomize(generator)
    randomize(shared)
    own = DebertaForRTD(config)
    weights = shared.state_dict()
    for table in ("word", "position"):
        name = f"deberta.embeddings.{table}_embeddings"
        if f"{name}._weight" in weights:
            base = generator.state_dict()[f"{name}.weight"]
            weights[f"{name}.weight"] = base + weights.pop(f"{name}._weight")
    own.load_state_dict(weights, strict=True)
    return shared, own, generator


@pytest.mark.parametrize("config", [CONFIG, BERT], ids=["deberta", "bert"])
def test_gdes_equals_own_tables_that_are_the_sum(config: DebertaConfig):
    shared, own, generator = make_discriminators(config)
    ids, mask, _ = make_batch()
    base = generator.deberta.embeddings.lookup(ids, mask).detach()
    logits, truth = shared(ids, mask, base), own(ids, mask)
    torch.testing.assert_close(logits[mask], truth[mask], atol=1e-5, rtol=1e-5)
    logits[mask].sin().mean().backward()
    truth[mask].sin().mean().backward()
    gradients = {
        name.replace("_embeddings.weight", "_embeddings._weight")
        if "embeddings.word" in name or "embeddings.position" in name
        else name: parameter.grad
        for name, parameter in own.named_parameters()
    }
    compare_gradients(shared, gradients)
    assert not any(parameter.grad is not None for parameter in generator.parameters())


@pytest.mark.parametrize("config", [CONFIG, BERT], ids=["deberta", "bert"])
def test_es_uses_the_generators_tables_and_gives_them_the_gradient(config: DebertaConfig):
    _, own, generator = make_discriminators(config)
    shared = DebertaForRTD(config, embedding_sharing="es")
    tables = ("word_embeddings", "position_embeddings")
    assert not any(table in name for name in shared.state_dict() for table in tables)
    weights = {n: v for n, v in own.state_dict().items() if not any(table in n for table in tables)}
    shared.load_state_dict(weights, strict=True)
    names = [n for n in own.state_dict() if n not in weights]
    own.load_state_dict({n: generator.state_dict()[n] for n in names}, strict=False)
    ids, mask, _ = make_batch()
    logits = shared(ids, mask, generator.deberta.embeddings.lookup(ids, mask))
    truth = own(ids, mask)
    torch.testing.assert_close(logits[mask], truth[mask], atol=1e-5, rtol=1e-5)
    logits[mask].sin().mean().backward()
    truth[mask].sin().mean().backward()
    for name in names:
        ours, theirs = generator.get_parameter(name).grad, own.get_parameter(name).grad
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_gdes_starts_at_the_generator():
    torch.manual_seed(0)
    shared = DebertaForRTD(CONFIG, embedding_sharing="gdes")
    delta = shared.get_parameter("deberta.embeddings.word_embeddings._weight")
    assert delta.shape == (60, 32)
    assert not delta.any()


@pytest.mark.parametrize(("sharing", "given"), [("gdes", False), ("es", False), ("nes", True)])
def test_base_embeddings_must_fit_the_sharing_method(sharing, given: bool):
    model = DebertaForRTD(CONFIG, embedding_sharing=sharing)
    ids, mask, _ = make_batch()
    base = torch.zeros(2, LENGTH, 32) if given else None
    with pytest.raises(ValueError, match=f"base_embeddings must be given.* for {sharing}"):
        model(ids, mask, base)


def test_initial_weights_are_those_of_the_original():
    torch.manual_seed(0)
    config = replace(CONV, hidden_size=128, vocab_size=500, initializer_range=0.05)
    model = DebertaForMaskedLM(config)
    for name, value in model.state_dict().items():
        if "conv.conv" in name:
            assert value.abs().max() <= (3 * 128) ** -0.5  # torch's own
        elif value.ndim == 2:
            assert abs(value.std() - 0.05) < 0.002, name
            assert abs(value.mean()) < 0.002, name
        else:
            assert (value == float(name.endswith("LayerNorm.weight"))).all(), name
    assert model.deberta.embeddings.word_embeddings.weight[0].std() > 0.03  # padding as well


def test_the_seed_decides_the_initial_weights():
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(DebertaForMaskedLM(CONFIG).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    name = "lm_predictions.lm_head.dense.weight"
    assert not torch.equal(states[0][name], states[2][name])


def test_dropout_is_drawn_in_training_only_and_from_the_seed():
    config = replace(CONV, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    model = DebertaForMaskedLM(config)
    randomize(model)
    batch = make_batch()
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(model.logits(*batch))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    model.eval()
    assert torch.equal(model.logits(*batch), model.logits(*batch))


def test_a_bf16_model_stays_in_bf16_and_near_fp32():
    model = DebertaForMaskedLM(CONV)
    batch = make_batch()
    truth = model.logits(*batch)
    logits = model.bfloat16().logits(*batch)
    assert logits.dtype == torch.bfloat16
    assert (logits - truth).norm() / truth.norm() < 0.02
    loss(logits.float()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    discriminator = DebertaForRTD(CONFIG, embedding_sharing="gdes").bfloat16()
    base = model.deberta.embeddings.lookup(*batch[:2]).detach()
    assert discriminator(*batch[:2], base).dtype == torch.bfloat16


def test_two_backward_passes_give_the_same_bits():
    gradients = []
    for _ in range(2):
        model = DebertaForMaskedLM(CONV)
        randomize(model)
        model(*make_batch(), make_labels()).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True) if a is not None)


@pytest.mark.parametrize("attend", [disentangled_attention, cpu_attention])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_a_model_compiles_to_one_graph(attend: AttentionFn, dropout_p: float):
    """And drops the same elements then."""
    config = replace(CONFIG, hidden_dropout_prob=dropout_p, attention_probs_dropout_prob=dropout_p)
    model = DebertaForMaskedLM(config, attend)
    randomize(model)
    batch = (*make_batch(), make_labels(), torch.rand(2, 20, dtype=torch.float64))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    outputs, gradients = [], []
    for function in (compiled, model):
        torch.manual_seed(0)
        model.zero_grad()
        outputs.append(function(*batch))
        outputs[-1].loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    ours, truth = outputs
    torch.testing.assert_close(ours.loss, truth.loss, atol=1e-4, rtol=1e-5)
    assert torch.equal(ours.predictions, truth.predictions)
    assert torch.equal(ours.samples, truth.samples)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_what_the_models_cannot_do_is_an_error():
    with pytest.raises(ValueError, match="num_hidden_layers must be at least 2"):
        DebertaForMaskedLM(replace(CONFIG, num_hidden_layers=1))
    model = DebertaModel(replace(CONFIG, max_position_embeddings=100))
    ids, mask, _ = make_batch()
    with pytest.raises(ValueError, match="must fit max_position_embeddings 100; got 150"):
        model(ids, mask)


def test_activation_checkpointing_keeps_less_and_gives_the_same_bits() -> None:
    config = replace(CONFIG, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    ids, mask, positions = make_batch()
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = DebertaForMaskedLM(config)
        model.deberta.encoder.checkpoint_activations = checkpointed
        saved: list[int] = []  # bytes that the forward pass keeps
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, saved=saved: saved.append(tensor.nbytes) or tensor, lambda t: t
        ):
            loss = model(ids, mask, positions, make_labels()).loss
        loss.backward()
        results.append((sum(saved), [parameter.grad for parameter in model.parameters()]))
    (all_bytes, expected), (few_bytes, gradients) = results
    assert few_bytes < all_bytes / 3
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
