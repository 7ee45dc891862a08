"""A whole training step on a real GPU, with its own kernels, against the same step on a CPU."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")
if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)

from ds_deberta.kernels import select_attention
from ds_deberta.objectives.mlm import MLMObjective
from ds_deberta.objectives.rtd import RTDObjective
from tests.cases import RTD_LAMBDA, build_models
from tests.objectives.test_rtd import TorchEngine, random_batch

pytestmark = pytest.mark.gpu
HIDDEN = 64  # two heads of 32


def weights_after_steps(tokenizer, kind: str, device: str, *, packed: bool) -> dict[str, Tensor]:
    """Of three steps in fp32, without dropout; samples are drawn by the numbers of the batch."""
    name = {"cuda": "triton", "cpu": "reference"}[device]
    attend, _ = select_attention(name, device=device, dtype=torch.float32, head_size=HIDDEN // 2)
    objective = "mlm" if kind == "mlm" else "rtd"
    models = build_models(objective, kind, tokenizer, hidden_size=HIDDEN, attend=attend)
    engines = {name: TorchEngine(model.to(device)) for name, model in models.items()}
    trained = (
        MLMObjective(**engines)
        if kind == "mlm"
        else RTDObjective(
            **engines,
            embedding_sharing=kind,  # type: ignore[arg-type]
            num_tokens=tokenizer.num_tokens,
            rtd_lambda=RTD_LAMBDA,
        )
    )
    for step in range(3):
        batch = random_batch(tokenizer, rows=5, seed=step)
        if packed:
            batch = replace(batch, documents=batch.documents * (1 + (torch.arange(32) >= 10)))
        trained.train_step([batch.to(torch.device(device))])
    return {
        f"{name}.{key}": value.cpu()
        for name, model in models.items()
        for key, value in model.state_dict().items()
    }


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["mlm", "gdes", "es", "nes"])
def test_a_step_gives_the_weights_of_the_step_on_a_cpu(tokenizer, kind: str, packed: bool) -> None:
    on_cpu = weights_after_steps(tokenizer, kind, "cpu", packed=packed)
    on_gpu = weights_after_steps(tokenizer, kind, "cuda", packed=packed)
    torch.testing.assert_close(on_gpu, on_cpu, atol=1e-5, rtol=1e-4)
