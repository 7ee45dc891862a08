"""What a DeepSpeed engine trains as whole fp32 tensors, wherever ZeRO keeps the pieces.

Stage 0 keeps them as torch does. Stages 1 and 2 lay the parameters of a group end to end and give
each rank a piece of that: a fp32 master and, on it, the optimizer's state. Stage 3 cuts every
parameter, and lays the pieces of several end to end. The weights in use are copies of the masters.
With NVMe offload masters and states are files, in memory for the update of their group alone.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_deberta.model_state import WEIGHTS, ModelState

# Of DeepSpeed's optimizers: where the fp32 masters are, and the parameters in each of them.
_MASTERS = (
    ("fp32_partitioned_groups_flat", "fp16_groups"),  # stage 3
    ("single_partition_of_fp32_groups", "bit16_groups"),  # stages 1 and 2
    ("fp32_groups_flat_partition", "bf16_groups"),  # stage 1, if it adds bf16 gradients up in fp32
)
_LOSS_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def read_state(engine: Any) -> ModelState:
    """Describe what an engine has trained. Its `tensor` is collective.

    Raises:
        ValueError: parameters differ in a number of their optimizer state; a checkpoint has one.
    """
    parameters = dict(engine.module.named_parameters())
    names = {parameter: name for name, parameter in parameters.items()}
    all_shapes = {name: _shape(parameter) for name, parameter in parameters.items()}
    kinds: dict[str, set[str]] = {}
    numbers: dict[str, float] = {}
    master_of: dict[nn.Parameter, Tensor] = {}
    for master, group in _masters(engine):
        master_of |= dict.fromkeys(group, master)
        for key, value in engine.basic_optimizer.state.get(master, {}).items():
            if torch.is_tensor(value) and value.dim() > 0:
                kinds.setdefault(key, set()).update(names[parameter] for parameter in group)
            elif numbers.setdefault(key, float(value)) != float(value):
                raise ValueError(
                    f"{key} of the optimizer must be the same for all parameters; it is "
                    f"{numbers[key]} and {float(value)}"
                )
    shapes = {WEIGHTS: all_shapes} | {
        kind: {name: shape for name, shape in all_shapes.items() if name in members}
        for kind, members in kinds.items()
    }
    return ModelState(
        shapes=shapes,
        tensor=lambda kind, name: _whole(
            engine, parameters[name], master_of[parameters[name]], kind
        ),
        numbers={
            "optimizer": numbers,
            "schedule": engine.lr_scheduler.last_epoch,
            "global_steps": engine.global_steps,
            "global_samples": engine.global_samples,
            "skipped_steps": engine.skipped_steps,
            "loss_scaler": _loss_scaler(engine),
        },
    )


def write_state(engine: Any, state: ModelState) -> None:
    """Make a new engine go on from a state. Every rank must call it.

    Raises:
        ValueError: the state is of another model, or of another kind of optimizer.
    """
    if len(state.shapes) > 1:
        _create_optimizer_state(engine)
    _check_same(read_state(engine), state)
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    if zero3 := _is_stage3(engine):
        engine.optimizer.checkpoint_event_prologue()
    for number, (master, group) in enumerate(_masters(engine)):
        with _in_memory(engine, number):
            for kind, shapes in state.shapes.items():
                for parameter in group:
                    if (name := names[parameter]) in shapes:
                        _set_whole(engine, parameter, master, kind, state.tensor(kind, name))
            if zero3:
                engine.optimizer._reassign_or_swap_out_partitioned_parameters(number)
    if zero3:
        engine.optimizer.checkpoint_event_epilogue()
    elif hasattr(engine.optimizer, "update_lp_params"):
        engine.optimizer.update_lp_params()
    _set_numbers(engine, state.numbers)


def _masters(engine: Any) -> list[tuple[Tensor, list[nn.Parameter]]]:
    """Pairs of what the optimizer updates on this rank and the parameters that it stands for."""
    optimizer = engine.optimizer
    for masters, groups in _MASTERS:
        if hasattr(optimizer, masters):
            return list(zip(getattr(optimizer, masters), getattr(optimizer, groups), strict=True))
    return [(p, [p]) for group in optimizer.param_groups for p in group["params"]]


def _is_stage3(engine: Any) -> bool:
    return hasattr(engine.optimizer, "fp32_partitioned_groups_flat")


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _whole(engine: Any, parameter: Any, master: Tensor, kind: str) -> Tensor:
    """Gather a parameter, or its optimizer state of that kind."""
    held = _held(engine, master, kind)
    if _is_stage3(engine):
        # Its own getter would read a whole group from NVMe for every parameter.
        part = held.narrow(0, *_place_in_master(engine, parameter))
        return engine.optimizer._fp32_state_allgather(parameter, part)
    if not hasattr(parameter, "_hp_mapping"):
        return held
    whole = torch.zeros(parameter.numel(), device=parameter.device)
    if (part := parameter._hp_mapping) is not None:  # this rank has a part of it
        to, of = part.lp_fragment_address, part.hp_fragment_address
        whole[to.start : to.start + to.numel] = held[of.start : of.start + of.numel]
    dist.all_reduce(whole.view(torch.int32), group=parameter._dp_group)  # bits: -0.0 stays that
    return whole.view(parameter.shape)


def _set_whole(engine: Any, parameter: Any, master: Tensor, kind: str, value: Tensor) -> None:
    held = _held(engine, master, kind)
    if _is_stage3(engine):
        # Its own setter of whole tensors fails where they do not divide by the ranks.
        part = held.narrow(0, *_place_in_master(engine, parameter)).zero_()
        start = dist.get_rank(parameter.ds_process_group) * len(part)
        content = value.view(-1)[start : start + len(part)]
        part[: len(content)] = content
        return
    if not hasattr(parameter, "_hp_mapping"):
        held.copy_(value)
    elif (part := parameter._hp_mapping) is not None:
        to, of = part.hp_fragment_address, part.lp_fragment_address
        held[to.start : to.start + to.numel] = value.view(-1)[of.start : of.start + of.numel]


def _held(engine: Any, master: Tensor, kind: str) -> Tensor:
    """Return what this rank keeps of one kind; what is on NVMe as a private map of its file.

    DeepSpeed's own getters know the optimizer's state of the first group of parameters only.
    """
    held = master if kind == WEIGHTS else engine.basic_optimizer.state[master][kind]
    if held.numel() or not getattr(engine.optimizer, "swap_optimizer", False):
        return held.detach()
    swapped = engine.optimizer.optimizer_swapper.swap_params_info[master.ds_id]  # type: ignore[attr-defined]
    (file,) = (each.swap_path for each in swapped.tensors if each.compute_tensor is held)
    return torch.from_file(file, shared=False, size=swapped.numel(), dtype=held.dtype)


def _place_in_master(engine: Any, parameter: Any) -> tuple[int, int]:
    """Return start and length of a parameter's piece, in stage 3."""
    optimizer = engine.optimizer
    _, start, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
    return start, length


@contextlib.contextmanager
def _in_memory(engine: Any, number: int) -> Iterator[None]:
    """Have a group's master and states in memory, and changes to them back on NVMe at the end."""
    optimizer = engine.optimizer
    swapped = _is_stage3(engine) and optimizer._swappable_optimizer_subgroup(number)
    if swapped:
        optimizer._optimizer_states_and_gradient_swap_in(number)
    yield
    if swapped:
        optimizer._optimizer_states_and_gradient_swap_out(number)


def _create_optimizer_state(engine: Any) -> None:
    """Have the optimizer make its own state by a step without gradient; all it does is replaced."""
    masters = [master for master, _ in _masters(engine)]
    if _is_stage3(engine):
        for number, master in enumerate(masters):
            with _in_memory(engine, number), _with_gradients([master]):
                engine.optimizer._optimizer_step(number)
    else:
        with _with_gradients(masters):
            engine.basic_optimizer.step()


@contextlib.contextmanager
def _with_gradients(masters: list[Tensor]) -> Iterator[None]:
    """Give zeros as gradients to those who have none."""
    without = [master for master in masters if master.grad is None]
    for master in without:
        master.grad = torch.zeros_like(master)
    yield
    for master in without:
        master.grad = None


def _check_same(own: ModelState, saved: ModelState) -> None:
    kinds = [sorted(each.shapes.keys() - {WEIGHTS}) for each in (own, saved)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"the optimizer must be of the same kind; it keeps {', '.join(kinds[0])} now, and "
            f"{', '.join(kinds[1])} then. Name the same one in the DeepSpeed JSON."
        )
    if own.shapes[WEIGHTS] != saved.shapes[WEIGHTS]:
        ours, theirs = own.shapes[WEIGHTS], saved.shapes[WEIGHTS]
        names = sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
        raise ValueError(
            f"the parameters must be the same; other ones, or of other shapes: {', '.join(names)}"
        )


def _set_numbers(engine: Any, numbers: Mapping[str, Any]) -> None:
    for master, _ in _masters(engine):
        state = engine.basic_optimizer.state.get(master, {})
        for key, number in numbers["optimizer"].items():
            if key in state and torch.is_tensor(state[key]):
                state[key].fill_(number)
            elif key in state:
                state[key] = type(state[key])(number)
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, name, numbers[name])
    set_schedule(engine, numbers["schedule"])
    if numbers["loss_scaler"] and _loss_scaler(engine):  # else it is new: precision has changed
        vars(engine.optimizer.loss_scaler).update(numbers["loss_scaler"])


def set_schedule(engine: Any, step: int) -> None:
    """Set an engine's learning rates to those that its schedule has after `step` updates."""
    schedule = engine.lr_scheduler
    lrs = [
        b * factor(step) for b, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, lr in zip(schedule.optimizer.param_groups, lrs, strict=True):
        group["lr"] = lr
    schedule.last_epoch, schedule._step_count, schedule._last_lr = step, step + 1, lrs


def _loss_scaler(engine: Any) -> dict[str, float]:
    """Return the state of fp16's dynamic loss scale; nothing where there is none."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return {name: getattr(scaler, name) for name in _LOSS_SCALER if hasattr(scaler, "cur_iter")}
