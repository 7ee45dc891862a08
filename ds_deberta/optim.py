"""AdamW, which parameters it decays, and the learning-rate schedules."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from ds_deberta.kernels import TableGradient

LrSchedule = Literal["linear", "cosine", "wsd", "constant"]

# As the original: biases and LayerNorm weights are not decayed.
_NO_DECAY = re.compile(r"bias|LayerNorm\.weight")
_BLOCK_ELEMENTS = 2**21  # of a table; their gradient stays in a CPU's cache
_DOT_PRODUCT = 2**11  # numbers of one


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer's side of a recipe."""

    learning_rate: float = 1e-4
    """Peak learning rate (of the generator, for RTD)."""
    discriminator_learning_rate: float | None = None
    """Peak learning rate of the discriminator; default: --learning_rate."""
    warmup: float = 10000
    """Warm-up, in optimizer steps, or as a fraction of the training if below 1."""
    lr_schedule: LrSchedule = "linear"
    """After the warm-up: linear or cosine decay, wsd (stable, then linear decay) or constant."""
    decay_fraction: float | None = None
    """Share of the training in which wsd decays; default: 0.1. For wsd only."""
    lr_end: float = 0.0
    """Learning rate at the end, as a fraction of the peak."""
    adam_beta1: float = 0.9
    """AdamW: decay of the first moment."""
    adam_beta2: float = 0.999
    """AdamW: decay of the second moment."""
    epsilon: float = 1e-6
    """AdamW: added to the root of the second moment."""
    weight_decay: float = 0.01
    """AdamW: decoupled weight decay (none for biases and LayerNorm)."""
    bias_correction: bool = True
    """AdamW with bias correction; false: without, as the original."""
    max_grad_norm: float | None = None
    """Gradient norm each model is clipped at; default: the DeepSpeed JSON's gradient_clipping."""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.discriminator_learning_rate is not None and self.discriminator_learning_rate <= 0:
            raise ValueError(
                "discriminator_learning_rate must be positive, got "
                f"{self.discriminator_learning_rate}; leave it out to use --learning_rate"
            )
        if self.warmup < 0:
            raise ValueError(f"warmup must be steps or a fraction below 1, got {self.warmup}")
        if self.decay_fraction is not None and self.lr_schedule != "wsd":
            raise ValueError(
                "decay_fraction belongs to the schedule wsd; got it with lr_schedule "
                f"{self.lr_schedule}. Add --lr_schedule wsd, or leave it out."
            )
        for name in ("adam_beta1", "adam_beta2", "decay_fraction", "lr_end"):
            if not 0 <= (getattr(self, name) or 0.0) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.max_grad_norm is not None and self.max_grad_norm < 0:
            raise ValueError(f"max_grad_norm must not be negative, got {self.max_grad_norm}")


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, for gradients that are rows of a table as well.

    A sparse gradient means what the same gradient would mean as a whole table: the moments of all
    rows decay, and all rows move. (`torch.optim.SparseAdam` leaves the others as they are.)

    Without bias correction, the moments' step counts start where the correction has become
    exactly 1 (2**40 steps), which leaves torch's own update as it is.
    """

    def __init__(self, params: Any, *, bias_correction: bool = True, **kwargs: Any) -> None:
        super().__init__(params, fused=True, **kwargs)
        self.bias_correction = bias_correction
        self.grad_scale: Tensor | None = None  # torch's update divides gradients by it

    # Without what torch wraps them in, which imports its compiler: 0.14 GiB, a second.
    add_param_group = torch.optim.Optimizer.add_param_group.__wrapped__  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, those of tables in parts, too."""
        torch.optim.Optimizer.zero_grad.__wrapped__(self, set_to_none)  # type: ignore[attr-defined]
        for param in self._parameters():
            if held := _held(param):
                held.clear()

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Have the next step scale all gradients so that their norm is at most `max_norm`.

        In that step's own pass over them. Returns the norm as it is, 0-d.
        """
        whole, norms = [], []
        for param in self._parameters():
            if table := self._table_gradient(param):
                norms.append(table.norm())
            elif param.grad is not None:
                whole.append(param.grad)
        norms.append(global_norm(whole))
        norm = torch.linalg.vector_norm(torch.stack(norms))
        self.grad_scale = (norm / max_norm).clamp(min=1.0)
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update the parameters that have gradients."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            whole = []
            for param in group["params"]:
                table = self._table_gradient(param)
                if table is None and param.grad is None:
                    continue
                if not self.state[param]:
                    self.state[param] = self._new_state(param)
                if table is not None:
                    self._update_table(param, table, group)
                else:
                    whole.append(param)
            states = [self.state[param] for param in whole]
            adamw(
                whole,
                [param.grad for param in whole],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                amsgrad=False,
                **_hyperparameters(group),
                grad_scale=self.grad_scale,
            )
        self.grad_scale = None
        return result

    def _parameters(self) -> list[Any]:
        return [param for group in self.param_groups for param in group["params"]]

    def _table_gradient(self, param: Any) -> TableGradient | None:
        """The gradient of a table that is in parts; None for one that is whole, or not there."""
        held, grad = _held(param), param.grad
        if grad is None:
            return held
        if grad.is_sparse:
            held = TableGradient(param) if held is None else held
            grad = grad.coalesce()
            held.add_rows(grad.indices()[0], grad.values())
            param.table_gradient, param.grad = held, None
            return held
        if held is not None:  # a head had more rows than it takes
            for start, block in held.blocks(_block_height(param)):
                grad[start : start + len(block)] += block
            held.clear()
        return None

    def _new_state(self, param: Tensor) -> dict[str, Tensor]:
        first = 0.0 if self.bias_correction else 2.0**40
        return {
            "step": torch.tensor(first, device=param.device),
            "exp_avg": torch.zeros_like(param),
            "exp_avg_sq": torch.zeros_like(param),
        }

    def _update_table(self, table: Any, gradient: TableGradient, group: dict[str, Any]) -> None:
        """Update a table [V, E] block by block; a block's gradient is made for it alone.

        By the operator that `adamw` calls, for what `adamw` does around it costs more than a block.
        """
        state, height = self.state[table], _block_height(table)
        state["step"] += 1
        parts = [part.split(height) for part in (table, state["exp_avg"], state["exp_avg_sq"])]
        for (_, grad), part, exp_avg, exp_avg_sq in zip(
            gradient.blocks(height), *parts, strict=True
        ):
            torch.ops.aten._fused_adamw_.default(
                *([part], [grad], [exp_avg], [exp_avg_sq], [], [state["step"]]),
                amsgrad=False,
                **_hyperparameters(group),
                grad_scale=self.grad_scale,
            )
        gradient.clear()


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    """What torch's update reads of a group of parameters, by its names."""
    beta1, beta2 = group["betas"]
    names = ("lr", "weight_decay", "eps", "maximize")
    return {"beta1": beta1, "beta2": beta2, **{name: group[name] for name in names}}


def _held(param: Any) -> TableGradient | None:
    """What a table's uses have said of its gradient; None if they have said nothing."""
    held: TableGradient | None = getattr(param, "table_gradient", None)
    return None if held is None or held.is_empty else held


def global_norm(grads: list[Tensor]) -> Tensor:
    """The Euclidean norm of all of them, whatever their dtype: 0-d, fp32, and no copies on a GPU.

    On a CPU from dot products, which all of its threads make: faster there than torch's norm of a
    matrix, and its error is not 6e-6, nor 4e-5 for 3072 x 768, but 3e-7 at most.
    """
    if not grads:
        return torch.tensor(0.0)
    if grads[0].device.type == "cpu":
        return torch.stack([_square(grad.flatten().float()) for grad in grads]).sum().sqrt()
    # As torch.nn.utils.get_total_norm, but that rounds each norm to the dtype of its gradient.
    return torch.linalg.vector_norm(
        torch.stack(torch.ops.aten._foreach_norm(grads, 2.0, torch.float32))
    )


def _square(numbers: Tensor) -> Tensor:
    """The sum of their squares, 0-d.

    A long one in blocks: how far a dot product is off depends on the processor, and on the numbers:
    those that were rounded to bf16 are summed with a bias, 5e-6 in 2**15 of them.
    """
    if len(numbers) < 8 * _DOT_PRODUCT:
        return numbers.dot(numbers)
    whole = len(numbers) // _DOT_PRODUCT * _DOT_PRODUCT
    blocks, rest = numbers[:whole].view(-1, 1, _DOT_PRODUCT), numbers[whole:]
    return (blocks @ blocks.mT).sum() + rest.dot(rest)


def _block_height(table: Tensor) -> int:
    return max(1, _BLOCK_ELEMENTS // table.shape[1])


def param_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split a module's parameters into those that are decayed and those that are not."""
    decay, no_decay = [], []
    for name, param in module.named_parameters():
        (no_decay if _NO_DECAY.search(name) else decay).append(param)
    return [
        {"params": decay, "weight_decay": weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]


def build_optimizer(module: nn.Module, config: OptimConfig, lr: float) -> AdamW:
    """AdamW over a module, fused (0.44 against 1.92 ns per parameter for foreach on CPU)."""
    return AdamW(
        param_groups(module, config.weight_decay),
        lr=lr,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.epsilon,
        bias_correction=config.bias_correction,
    )


def lr_factor(step: int, *, config: OptimConfig, total_steps: int) -> float:
    """Learning rate of the update that follows `step` finished ones, as a fraction of the peak.

    Continuous, unlike the original's, which jumps down at the end of the warm-up and
    spends its first step at zero.
    """
    warmup = warmup_steps(config, total_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    match config.lr_schedule:
        case "constant":
            return 1.0
        case "linear":
            decay = 1.0 - progress
        case "cosine":
            decay = 0.5 * (1.0 + math.cos(math.pi * progress))
        case "wsd":
            fraction = 0.1 if config.decay_fraction is None else config.decay_fraction
            decay_steps = max(1.0, fraction * total_steps)
            decay = min(1.0, max(0.0, total_steps - step) / decay_steps)
    return config.lr_end + (1.0 - config.lr_end) * decay


def warmup_steps(config: OptimConfig, total_steps: int) -> int:
    """The warm-up in optimizer steps."""
    return round(config.warmup * total_steps if config.warmup < 1 else config.warmup)
