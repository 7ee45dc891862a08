import copy
import itertools
import math

import pytest
import torch
from torch import nn

from ds_deberta import optim
from ds_deberta.model import DebertaConfig, DebertaForMaskedLM
from ds_deberta.optim import OptimConfig, build_optimizer, lr_factor, param_groups


def factors(total: int, **kwargs) -> list[float]:
    config = OptimConfig(**kwargs)
    return [lr_factor(step, config=config, total_steps=total) for step in range(total)]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd", "constant"])
def test_schedules_are_continuous_and_never_start_at_zero(schedule):
    values = factors(1000, warmup=100, lr_schedule=schedule)
    assert values[0] == pytest.approx(0.01)
    assert max(values) == values[100] == 1.0
    assert max(abs(a - b) for a, b in itertools.pairwise(values)) <= 0.01 + 1e-12


def test_linear_decay_ends_one_update_before_zero():
    assert factors(100, warmup=0)[-1] == pytest.approx(0.01)
    assert factors(100, warmup=0, lr_end=0.1)[-1] == pytest.approx(0.1 + 0.9 * 0.01)


def test_wsd_is_flat_until_its_decay():
    values = factors(1000, warmup=10, lr_schedule="wsd", decay_fraction=0.2)
    assert set(values[10:800]) == {1.0}
    assert values[900] == pytest.approx(0.5)


def test_warmup_below_one_is_a_fraction():
    assert factors(1000, warmup=0.1) == factors(1000, warmup=100)


def test_biases_and_layer_norms_are_not_decayed():
    module = nn.ModuleDict({"dense": nn.Linear(2, 2), "LayerNorm": nn.LayerNorm(2)})
    decay, no_decay = param_groups(module, 0.01)
    assert [id(p) for p in decay["params"]] == [id(module["dense"].weight)]
    assert len(no_decay["params"]) == 3
    assert no_decay["weight_decay"] == 0.0


@pytest.mark.parametrize("bias_correction", [True, False])
def test_adamw_is_the_written_formula(bias_correction):
    """The original's update (XAdam) without bias correction, the usual AdamW with it."""
    torch.manual_seed(0)
    module = nn.Linear(5, 4, bias=False)
    config = OptimConfig(epsilon=1e-6, weight_decay=0.01, bias_correction=bias_correction)
    optimizer = build_optimizer(module, config, lr=0.01)
    p = module.weight.detach().double().clone()
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for step in range(1, 6):
        gradient = torch.randn(4, 5)
        module.weight.grad = gradient.clone()
        optimizer.step()
        g = gradient.double()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        c1, c2 = (1 - 0.9**step, 1 - 0.999**step) if bias_correction else (1.0, 1.0)
        p = p - 0.01 * (m / c1 / ((v / c2).sqrt() + 1e-6) + 0.01 * p)
    torch.testing.assert_close(module.weight.detach().double(), p, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rounded", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1536, 384), (3072, 768), (191, 263), (1013, 509)])
def test_a_norm_is_that_of_all_gradients_to_single_precision(shape, rounded):
    """As in float64. torch's own, on a CPU, is off by up to 4e-5 for matrices like these."""
    torch.manual_seed(0)
    module = nn.Linear(*shape)
    grads = [torch.randn_like(param).to(rounded).float() for param in module.parameters()]
    for param, grad in zip(module.parameters(), grads, strict=True):
        param.grad = grad
    norm = build_optimizer(module, OptimConfig(), lr=0.01).clip(1.0)
    truth = torch.cat([grad.double().flatten() for grad in grads]).norm()
    torch.testing.assert_close(norm.double(), truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bias_correction", [True, False])
def test_rows_of_a_gradient_update_the_whole_table(monkeypatch, bias_correction):
    """Blocks of 3 rows, the last one short; clipped; ids twice, none in the middle block."""
    monkeypatch.setattr(optim, "_BLOCK_ELEMENTS", 3 * 4)
    config = OptimConfig(weight_decay=0.01, bias_correction=bias_correction)
    torch.manual_seed(0)
    modules = [nn.ModuleDict({"table": nn.Embedding(8, 4), "bias": nn.Linear(1, 2)})]
    modules.append(copy.deepcopy(modules[0]))
    modules[0]["table"].sparse = True
    optimizers = [build_optimizer(module, config, lr=0.01) for module in modules]
    for ids in ([0, 7, 7, 1], [2, 6, 0, 0], [7, 7, 1, 7]):
        norms = []
        for module, optimizer in zip(modules, optimizers, strict=True):
            rows = module["table"](torch.tensor(ids))
            (rows.square().sum() + module["bias"].bias.sum()).backward()
            assert module["table"].weight.grad.is_sparse == module["table"].sparse
            if module["table"].sparse:
                norms.append(optimizer.clip(0.1))
            else:
                norms.append(nn.utils.clip_grad_norm_(module.parameters(), 0.1))
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(*norms)
    rows, whole = (optimizer.state_dict() for optimizer in optimizers)
    torch.testing.assert_close(rows, whole)
    torch.testing.assert_close(*(dict(module.named_parameters()) for module in modules))


@pytest.mark.parametrize("is_shared", [False, True], ids=["one user", "shared"])
@pytest.mark.parametrize("rows", [[2], [2, 1]], ids=["in parts", "a second one as a whole"])
def test_a_gradient_in_parts_updates_the_whole_table(monkeypatch, rows, is_shared):
    """Clipped; where the table is shared, a lookup gives more rows, as `es` does."""
    monkeypatch.setattr(optim, "_BLOCK_ELEMENTS", 7 * 16)
    torch.manual_seed(0)
    config = DebertaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    models = [DebertaForMaskedLM(config).eval()]
    models.append(copy.deepcopy(models[0]))
    models[1].defer_table_gradient()
    table = models[1].deberta.embeddings.word_embeddings
    table.sparse = True
    optimizers = [build_optimizer(model, OptimConfig(), lr=0.01) for model in models]
    for _ in range(3):
        batches = [torch.randint(0, 40, (count, 6)) for count in rows]
        norms = []
        for model, optimizer in zip(models, optimizers, strict=True):
            for ids in batches:
                positions = torch.tensor([[1, 4]]).expand(len(ids), 2)
                loss = model(ids, ids > 0, positions, ids.gather(1, positions)).loss
                if is_shared:
                    loss += model.deberta.embeddings.word_embeddings(ids).square().sum()
                loss.backward()
            if model is models[1]:
                assert not table.weight.table_gradient.is_empty
                assert (table.weight.grad is None) == (len(rows) == 1 and not is_shared)
            norms.append(optimizer.clip(0.5))
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(*norms)
        assert table.weight.table_gradient.is_empty
    torch.testing.assert_close(*(optimizer.state_dict()["state"] for optimizer in optimizers))
    torch.testing.assert_close(*(dict(model.named_parameters()) for model in models))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"learning_rate": 0}, "learning_rate must be positive"),
        ({"warmup": -1}, "warmup must be"),
        ({"adam_beta2": 1.5}, "adam_beta2 must lie in"),
        ({"decay_fraction": 0.2}, "belongs to the schedule wsd"),
        ({"max_grad_norm": -math.inf}, "max_grad_norm must not be negative"),
    ],
)
def test_bad_values_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**kwargs)
