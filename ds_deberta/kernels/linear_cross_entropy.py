"""Loss, predictions and samples of a vocabulary head, without its [V, N] logits.

The product with the vocabulary is made chunk by chunk. What stays of a chunk is its greatest
logit, the label's logit, and the sum of exponentials of every block of 64 ids. These sums give
the loss, and the block that a sample falls into; the logits of that block alone are then made
again to find the sample in it. The gradient of the states is made on the way, as softmax times
vocabulary, against the greatest logit so far (the online softmax of FlashAttention). Only the
vocabulary's gradient is left to the backward pass. It makes each chunk's logits again, unless all
exponentials are so few that they were kept; these can become the gradient's one factor, and stay,
for the table's gradient to be made of them later.

Products are in the dtype of the states or in autocast's, softmax and sums in fp32.

Shapes: N rows, E hidden size, V vocabulary, C ids of a chunk, K blocks of all chunks.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_deberta.kernels.table_gradient import TableGradient

BLOCK = 64
"""Ids that share one sum. More need less memory for the sums, but a longer second look."""

CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**25, "meta": 2**25}
"""Logits that live at a time: on a CPU they stay in its cache, on a GPU they keep it busy. A plan
for GPUs runs on meta."""

FP16_IDS = 2**15
"""Most ids of a chunk in fp16, which ends at 65,504: a product sums exponentials, each at most 1,
times embeddings over them."""

KEPT_BYTES = 2**26
"""Exponentials for the backward pass; those of a greater product are made again, chunk by chunk,
unless they become a part of the table's gradient."""


class HeadOutput(NamedTuple):
    """What a vocabulary head says about its rows."""

    loss: Tensor
    """0-d: cross-entropy summed over the rows that have a label, in nats, fp32."""
    predictions: Tensor
    """The id below `num_tokens` of each row's greatest logit."""
    samples: Tensor | None
    """An id drawn for each row; None where no uniform numbers were given."""


def linear_cross_entropy(
    states: Tensor,  # [N, E]
    weight: Tensor,  # [V, E]
    bias: Tensor,  # [V]
    labels: Tensor,  # [N]
    uniforms: Tensor | None = None,  # [N]
    *,
    num_tokens: int | None = None,
    temperature: float = 1.0,
    table_gradient: TableGradient | None = None,
) -> HeadOutput:
    """Compare the logits `states @ weight.T + bias` with labels, and draw from their softmax.

    A sample inverts the cumulative distribution at one given uniform number. This makes it a pure
    function of its row: it does not change with ranks, micro-batches or a resume.

    Args:
        states: Inputs of the product.
        weight: Embeddings of the vocabulary.
        bias: Bias of each id.
        labels: The right ids; a row with a negative one has no loss.
        uniforms: In [0, 1), fp64; None: draw nothing.
        num_tokens: Only ids below it are predicted and drawn, though all have their part in the
            loss; None: all.
        temperature: Divides the logits of the samples.
        table_gradient: Gets what the gradient of `weight` is made of, in the place of `weight`, if
            it takes it. Only one backward pass is possible then.
    """
    device = states.device.type
    is_autocast = device != "meta" and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if is_autocast else states.dtype
    num_tokens = len(weight) if num_tokens is None else num_tokens
    has_backward = torch.is_grad_enabled()
    if table_gradient is not None and not (has_backward and table_gradient.takes(len(states))):
        table_gradient = None
    outputs = _LinearCrossEntropy.apply(
        *(states, weight, bias, labels, uniforms, num_tokens, temperature, dtype),
        *(has_backward, table_gradient),
    )
    return HeadOutput(*outputs)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor,
        labels: Tensor,
        uniforms: Tensor | None,
        num_tokens: int,
        temperature: float,
        dtype: torch.dtype,
        has_backward: bool,
        table_gradient: TableGradient | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        kept = None
        are_few = len(states) * len(weight) * dtype.itemsize <= KEPT_BYTES
        if has_backward and (are_few or table_gradient is not None):
            kept = states.new_empty(len(weight), len(states), dtype=dtype)
        # The cut decides how sums are rounded: where nothing is drawn it is that of all ids.
        drawn = len(weight) if uniforms is None else num_tokens
        head = _ChunkedHead(states, weight, bias, drawn, dtype)
        best = states.new_full((len(states),), -torch.inf, dtype=head.sum_dtype)  # [N]
        label_logits = torch.zeros_like(best)
        expected = torch.zeros_like(states, dtype=head.sum_dtype)  # [N, E] sum of exp(x) * weight
        predictions = torch.zeros_like(labels)
        sums = best.new_empty(head.chunks[-1].blocks.stop, len(states))  # [K, N] exp(x - maximum)
        maxima = torch.empty_like(sums)  # [K, N] of the chunk that the block is in
        is_tempered = uniforms is not None and temperature != 1.0
        sample_sums = torch.empty_like(sums) if is_tempered else sums
        for chunk in head.chunks:
            vocabulary = head.weight_of(chunk)  # [C, E]
            logits = head.logits(chunk, vocabulary)  # [C, N]
            index, is_here = _find(labels, chunk)
            label_logits = torch.where(is_here, logits.gather(0, index)[0], label_logits)
            maximum, argmax = logits.max(0)
            maximum = maximum.to(best.dtype)
            if chunk.start < num_tokens:  # `best` is of ids below it then
                live_maximum = maximum
                if chunk.stop > num_tokens:
                    live_maximum, argmax = logits[: num_tokens - chunk.start].max(0)
                is_greater = live_maximum.to(best.dtype) > best
                predictions = torch.where(is_greater, argmax + chunk.start, predictions)
            maxima[chunk.blocks] = maximum
            if is_tempered:
                exps = head.exp(logits, maximum, temperature)
                sample_sums[chunk.blocks] = _block_sums(exps)
            exps = head.exp(logits, maximum)
            sums[chunk.blocks] = _block_sums(exps)
            before, best = best, torch.maximum(maximum, best)
            if has_backward:
                low = (logits if kept is None else kept[chunk.ids]).copy_(exps)
                expected *= (before - best).exp_()[:, None]
                expected.addcmul_((maximum - best).exp_()[:, None], low.T @ vocabulary)
        totals = (sums * (maxima - best).exp()).sum(0)
        log_sums = best + totals.log()  # [N] log(sum of all exp(x))
        loss = torch.where(labels >= 0, log_sums - label_logits, 0.0).sum()
        samples = None
        if uniforms is not None:
            live = maxima[: _count_blocks(num_tokens)]
            live = (live - live.amax(0)) / temperature
            masses = sample_sums[: len(live)] * live.exp()
            samples = _draw(head, masses.T, uniforms, num_tokens, temperature)
        label_rows = weight[labels.clamp(min=0)].to(dtype)
        toward = expected.div_(totals[:, None]).sub_(label_rows)  # [N, E] each row's loss by states
        factors = torch.stack([maxima[chunk.blocks.start] for chunk in head.chunks]) - log_sums
        ctx.save_for_backward(states, weight, bias, labels, log_sums, toward, kept, factors.exp_())
        ctx.drawn, ctx.dtype, ctx.table_gradient = drawn, dtype, table_gradient
        ctx.mark_non_differentiable(predictions, *([] if samples is None else [samples]))
        return loss, predictions, samples

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, bias, labels, log_sums, toward, kept, factors = ctx.saved_tensors
        scale = torch.where(labels >= 0, grad_outputs[0], 0.0)  # [N]
        logits_grad = kept  # [V, N], of a gradient in parts: it takes the exponentials' place
        head = _ChunkedHead(states, weight, bias, ctx.drawn, ctx.dtype)
        grad_weight = torch.empty_like(weight) if ctx.table_gradient is None else None
        grad_bias = torch.empty_like(bias)
        for chunk, factor in zip(head.chunks, factors, strict=True):
            if kept is None:
                logits = head.logits(chunk, head.weight_of(chunk))
                grad = head.exp(logits, log_sums).mul_(scale)  # [C, N]
            else:
                grad = head.multiply(kept[chunk.ids], factor * scale)
            index, is_here = _find(labels, chunk)
            grad.scatter_add_(0, index, torch.where(is_here, -scale, 0.0)[None])
            grad_bias[chunk.ids] = grad.sum(1)
            if grad_weight is None:
                logits_grad[chunk.ids] = grad
            elif weight.dtype == ctx.dtype:
                torch.mm(grad.to(ctx.dtype), head.states, out=grad_weight[chunk.ids])
            else:
                grad_weight[chunk.ids] = grad.to(ctx.dtype) @ head.states
        if ctx.table_gradient is not None:
            ctx.table_gradient.add_product(logits_grad, head.states)
        grad_states = (toward * scale[:, None]).to(states.dtype)
        return grad_states, grad_weight, grad_bias, *[None] * 7


class _Chunk(NamedTuple):
    start: int
    """Its first id."""
    stop: int
    """Its last id + 1."""
    blocks: slice
    """Its blocks of at most 64 ids."""

    @property
    def ids(self) -> slice:
        """Its ids."""
        return slice(self.start, self.stop)


class _ChunkedHead:
    """Makes the logits of one chunk at a time, in buffers that all chunks share."""

    def __init__(
        self, states: Tensor, weight: Tensor, bias: Tensor, num_tokens: int, dtype: torch.dtype
    ):
        rows = len(states)
        self.states = states.to(dtype)
        self.weight, self.bias = weight, bias
        self.sum_dtype = torch.promote_types(dtype, torch.float32)
        width = CHUNK_ELEMENTS[states.device.type] // rows
        if dtype == torch.float16:
            width = min(width, FP16_IDS)
        self.chunks = _chunks(width, num_tokens, len(weight))
        width = max(chunk.stop - chunk.start for chunk in self.chunks)
        is_cast = weight.dtype != dtype
        self._vocabulary = self.states.new_empty(width, weight.shape[1]) if is_cast else None
        self._logits = self.states.new_empty(width, rows)
        self._exps = self._logits.new_empty(width, rows, dtype=self.sum_dtype)

    def logits(self, chunk: _Chunk, vocabulary: Tensor) -> Tensor:
        """Return [C, N] logits in the dtype of the product; the next call overwrites them.

        Args:
            chunk: Which.
            vocabulary: Its `weight_of`.
        """
        bias = self.bias[chunk.ids, None].to(vocabulary.dtype)
        out = self._logits[: len(vocabulary)]
        return torch.addmm(bias, vocabulary, self.states.T, out=out)

    def weight_of(self, chunk: _Chunk) -> Tensor:
        """Return [C, E] in the dtype of the product; the next call may overwrite it."""
        weight = self.weight[chunk.ids]
        return weight if self._vocabulary is None else self._vocabulary[: len(weight)].copy_(weight)

    def exp(self, logits: Tensor, offsets: Tensor, temperature: float = 1.0) -> Tensor:
        """Exponentiate [C, N] logits less [N] offsets; the next call overwrites the result."""
        exps = self._exps[: len(logits)].copy_(logits).sub_(offsets)
        if temperature != 1.0:
            exps /= temperature
        return exps.exp_()

    def multiply(self, exps: Tensor, factors: Tensor) -> Tensor:
        """Multiply [C, N] exponentials with [N] factors; the next call overwrites the result."""
        return self._exps[: len(exps)].copy_(exps).mul_(factors)


def _chunks(width: int, num_tokens: int, vocab_size: int) -> list[_Chunk]:
    """Cut the vocabulary, first the ids that are drawn, then those that are not.

    About `width` ids each, in whole blocks.
    Block k begins at id 64 k in the first part: all its chunks but the last are whole blocks.
    """
    width = max(width // BLOCK, 1) * BLOCK
    chunks, block = [], 0
    for first, last in ((0, num_tokens), (num_tokens, vocab_size)):
        for start in range(first, last, width):
            stop = min(start + width, last)
            next_block = block + _count_blocks(stop - start)
            chunks.append(_Chunk(start, stop, slice(block, next_block)))
            block = next_block
    return chunks


def _count_blocks(width: int) -> int:
    return -(-width // BLOCK)


def _block_sums(exps: Tensor) -> Tensor:
    """Sum [C, N] over blocks of ids, of which the last may be short."""
    whole = len(exps) // BLOCK * BLOCK
    sums = exps[:whole].unflatten(0, (-1, BLOCK)).sum(1)
    if whole == len(exps):
        return sums
    return torch.cat([sums, exps[whole:].sum(0, keepdim=True)])


def _find(labels: Tensor, chunk: _Chunk) -> tuple[Tensor, Tensor]:
    """Return [1, N] the label's index in a chunk, or any, and [N] whether it is there."""
    is_here = (labels >= chunk.start) & (labels < chunk.stop)
    return torch.where(is_here, labels - chunk.start, 0)[None], is_here


def _draw(
    head: _ChunkedHead, masses: Tensor, uniforms: Tensor, num_tokens: int, temperature: float
) -> Tensor:
    """Find the block of each row's sample, then the sample in it.

    Args:
        head: What made the masses.
        masses: [N, K] of the blocks that are drawn from, up to a factor for each row.
        uniforms: [N] in [0, 1).
        num_tokens: Ids that are drawn.
        temperature: Of the samples.
    """
    blocks, rest = _invert(masses, uniforms)
    ids = blocks[:, None] * BLOCK + torch.arange(BLOCK, device=blocks.device)  # [N, C]
    is_live = ids < num_tokens
    ids = torch.where(is_live, ids, 0)
    logits = head.states.new_empty(ids.shape)
    # As many rows at a time as make the gathered embeddings the size of a chunk.
    group = max(CHUNK_ELEMENTS[ids.device.type] // (BLOCK * head.states.shape[1]), 1)
    for start in range(0, len(ids), group):
        rows = slice(start, start + group)
        weight = head.weight[ids[rows]].to(logits.dtype)  # [rows, C, E]
        bias = head.bias[ids[rows]].to(logits.dtype)
        logits[rows] = torch.baddbmm(bias[..., None], weight, head.states[rows, :, None])[..., 0]
    logits = logits.to(head.sum_dtype).masked_fill(~is_live, -torch.inf)
    inside, _ = _invert(torch.softmax(logits / temperature, -1), rest)
    return ids.gather(1, inside[:, None])[:, 0]


def _invert(masses: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Find where a uniform number falls among masses, in fp64.

    Args:
        masses: [N, C], at least one of each row above 0.
        uniforms: [N] in [0, 1).

    Returns:
        [N] the index, whose mass is above 0, and [N] how far into it, in [0, 1).
    """
    cumulative = masses.double().cumsum(-1)  # [N, C]
    # The product may round up to the total: stay below, in a mass above 0.
    total = cumulative[:, -1:]
    target = torch.minimum(uniforms.double()[:, None] * total, _below(total))
    index = torch.searchsorted(cumulative, target, right=True)
    index = index.clamp(max=masses.shape[1] - 1)  # where a diverged model gives NaN
    mass = masses.gather(1, index).double()
    into = (target - (cumulative.gather(1, index) - mass)) / mass
    return index[:, 0], into.clamp(min=0.0).minimum(_below(torch.ones_like(into)))[:, 0]


def _below(numbers: Tensor) -> Tensor:
    return torch.nextafter(numbers, torch.zeros_like(numbers))
