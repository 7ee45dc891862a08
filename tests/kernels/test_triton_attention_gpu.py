"""The Triton attention on a real GPU, where the other tests of it run too: bf16 and training."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton", reason="triton is not installed")
if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)

from ds_deberta.kernels import disentangled_attention, select_attention, triton_attention
from ds_deberta.model import DebertaConfig, DebertaForMaskedLM

pytestmark = pytest.mark.gpu
SIZES = (4, 4)  # batch, heads
STEPS = 200


def make_inputs(length: int, size: int, queries: int | None = None) -> tuple[list, dict]:
    """What bf16 holds exactly; the documents are packed, and the last row is padded."""
    rng = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, device="cuda").bfloat16()

    deltas = torch.arange(1 - length, length, device="cuda")
    documents = torch.arange(length, device="cuda").repeat(SIZES[0], 1) * 3 // length + 1
    documents[-1, length - length // 4 :] = 0
    states = [
        draw(*SIZES, queries or length, size),
        *(draw(*SIZES, length, size) for _ in range(2)),
        *(draw(SIZES[1], 64, size) for _ in range(2)),
    ]
    options = {
        "slots": (deltas // 4 + 32).clamp(0, 63),
        "documents": documents,
        "scale": (3 * size) ** -0.5,
    }
    if queries is not None:
        shape = (SIZES[0], queries)
        positions = torch.randint(0, length, shape, generator=rng, device="cuda")
        options["query_positions"] = positions
    return states, options


def run(attend, states: list, options: dict, dtype: torch.dtype) -> list[torch.Tensor]:
    """The output and the gradients."""
    states = [x.to(dtype).requires_grad_() for x in states]
    output = attend(*states, **options)
    rng = torch.Generator("cuda").manual_seed(1)
    weights = torch.randn(output.shape, generator=rng, device="cuda").bfloat16()
    output.backward(weights.to(dtype))
    return [output.detach(), *(x.grad for x in states)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("length", "size", "queries"),
    [
        (128, 64, None),
        (512, 64, None),
        (512, 64, 80),
        (300, 32, None),
        (77, 128, 9),
        (2100, 64, None),
    ],
)
def test_errors_are_those_of_the_dtype(length: int, size: int, queries: int | None, dtype):
    states, options = make_inputs(length, size, queries)
    truth = run(disentangled_attention, states, options, torch.float64)
    theirs = run(disentangled_attention, states, options, dtype)
    fused = run(triton_attention.disentangled_attention, states, options, dtype)
    for ours, reference, exact in zip(fused, theirs, truth, strict=True):
        error = (ours.double() - exact).norm() / exact.norm()
        assert error <= 1.5 * (reference.double() - exact).norm() / exact.norm()
        assert F.cosine_similarity(ours.double().flatten(), exact.flatten(), 0) > 0.9999


@pytest.mark.parametrize("queries", [None, 80])
def test_two_runs_give_the_same_bits_with_dropout(queries: int | None):
    states, options = make_inputs(512, 64, queries)
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        attend = triton_attention.disentangled_attention
        results.append(run(attend, states, options | {"dropout_p": 0.1}, torch.bfloat16))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


@pytest.mark.parametrize("queries", [None, 80])
def test_chunks_make_no_difference(queries: int | None):
    """All launches but those of the first chunk go past Triton's look-up of what it compiled."""
    states, options = make_inputs(512, 64, queries)
    results = []
    for workspace_bytes in (2**20, 2**22, 2**30):
        torch.manual_seed(5)
        chunked = options | {"dropout_p": 0.1, "workspace_bytes": workspace_bytes}
        attend = triton_attention.disentangled_attention
        results.append(run(attend, states, chunked, torch.bfloat16))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("wrap", ["checkpoint", "compile"])
def test_checkpointing_and_compiling_change_nothing(wrap: str):
    states, options = make_inputs(512, 64)
    options |= {"dropout_p": 0.1}

    def checkpointed(*args, **kwargs):
        return checkpoint(
            triton_attention.disentangled_attention, *args, use_reentrant=False, **kwargs
        )

    plain = triton_attention.disentangled_attention
    wrapped = torch.compile(plain, fullgraph=True) if wrap == "compile" else checkpointed
    if wrap == "compile":  # which draws its seeds from a generator of its own
        options["dropout_p"] = 0.0
    results = []
    for attend in (plain, wrapped):
        torch.manual_seed(5)
        results.append(run(attend, states, options, torch.bfloat16))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def losses(attend, seed: int) -> torch.Tensor:
    """The loss of 200 steps of a tiny model that learns to repeat a fixed set of rows."""
    torch.manual_seed(seed)
    config = DebertaConfig(
        vocab_size=256,
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.1,
    )
    model = DebertaForMaskedLM(config, attend).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rng = torch.Generator().manual_seed(0)  # the data is the same for every seed
    rows = torch.randint(5, 256, (64, 100), generator=rng).cuda()
    history = []
    for _ in range(STEPS):
        picked = torch.randint(0, 64, (16,), generator=rng)
        positions = torch.stack([torch.randperm(100, generator=rng)[:15] for _ in picked]).cuda()
        ids = rows[picked.cuda()]
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[-4:, 90:] = False
        labels = ids.gather(1, positions)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(ids.scatter(1, positions, 4), mask, positions, labels).loss
        loss = loss / labels.numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.detach())
    return torch.stack(history).view(-1, 20).mean(1)  # [10]


def test_a_tiny_model_learns_as_with_the_reference():
    reference = torch.stack([losses(disentangled_attention, seed) for seed in range(4)])
    ours = torch.stack([losses(triton_attention.disentangled_attention, seed) for seed in range(4)])
    assert reference[:, -1].max() < reference[:, 0].min(), "nothing is learnt"
    spread = reference.amax(0) - reference.amin(0)
    assert ((ours.mean(0) - reference.mean(0)).abs() <= spread).all()


def test_auto_is_triton_on_a_gpu():
    function, reason = select_attention("auto", device="cuda", dtype=torch.bfloat16, head_size=64)
    assert function is triton_attention.disentangled_attention
    assert "triton" in reason
    function, reason = select_attention("auto", device="cuda", dtype=torch.bfloat16, head_size=48)
    assert function is disentangled_attention
    assert "head size of 32, 64, 128; got 48" in reason
