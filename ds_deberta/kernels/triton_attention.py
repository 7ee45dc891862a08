"""Disentangled attention for CUDA, in Triton: what `reference.py` defines, without an L x L graph.

    scores[i, j] = scale * (q_i . k_j + q_i . pos_key[slots[i - j]] + k_j . pos_query[slots[i - j]])

The idea. Put the position tables in the order of delta = i - j and let e = column - row. A product
of a tile of rows with a tile of deltas then belongs at the affine addresses (row, row + e): the
kernels store and load it there, skewed. So nothing is gathered, nothing is looked up, and the
gradient of a table is a sum in registers over rows, never an atomic addition: two runs give the
same bits.

Read from the top: the function, the two registered operators, the launches, the kernels.

    forward     position_scores (c2p and p2c) -> keep_bits -> attend
    backward    the same scores again -> score_gradients (dv, and the scores' own gradient twice:
                as it is and transposed) -> state_gradients (dq, dk) -> table_gradients

Scores and their gradients are scratch for a chunk of (sample, head) pairs, small enough to stay
in the L2 cache, and used again by the next chunk. From forward to backward only the inputs, the
output and one number for each row are kept.

Shapes: B batch, L queries, M keys, H heads, D head size, R rows of a position table, U = 2M - 1
deltas, N pairs of a chunk, C columns of a row of scratch, S shares of the batch. Inside, heads
come after rows, [B, L, H, D]: so the projections around attention make them, without a copy.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_deberta.kernels.reference import check_order

HEAD_SIZES = (32, 64, 128)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LOG2_E = 1.4426950408889634
WORKSPACE_BYTES = 48 * 2**20
"""Scratch of one chunk: as much as the L2 cache of a large GPU holds."""
KEEP_BLOCK = 1024
"""Words of the dropout that one program draws."""
TABLE_PROGRAMS = 128
"""Programs that share the gradient of one head's position table, by delta and by sample."""


class Tile(NamedTuple):
    """Block of a kernel, and how the compiler spreads it."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


class Tiles(NamedTuple):
    """The blocks of all kernels."""

    position_scores: Tile  # rows x deltas
    attend: Tile  # queries x keys
    score_gradients: Tile  # keys x queries
    state_gradients: Tile  # rows x columns
    table_gradients: Tile  # rows x deltas, of which a program owns the deltas


_SMALL_HEADS = Tiles(
    position_scores=Tile(128, 64, 8, 3),
    attend=Tile(128, 64, 8, 3),
    score_gradients=Tile(128, 64, 8, 2),
    state_gradients=Tile(128, 64, 8, 3),
    table_gradients=Tile(64, 64, 4, 3),
)
_LARGE_HEADS = Tiles(
    position_scores=Tile(128, 64, 8, 2),
    attend=Tile(64, 64, 8, 2),
    score_gradients=Tile(128, 32, 8, 1),
    state_gradients=Tile(128, 64, 8, 2),
    table_gradients=Tile(64, 64, 4, 2),
)
_EXACT = Tiles(*[Tile(32, 32, 4, 1)] * 5)._replace(score_gradients=Tile(32, 32, 8, 1))
TILES = {
    # (head size, bytes of a number); tests compile the 16-bit ones for sm_80 and sm_90: no spills
    (32, 2): _SMALL_HEADS,
    (64, 2): _SMALL_HEADS,
    (128, 2): _LARGE_HEADS,
    (32, 4): _EXACT,
    (64, 4): _EXACT,
    (128, 4): _EXACT,
}


def disentangled_attention(
    q: Tensor,  # [B, H, L, D]
    k: Tensor,  # [B, H, M, D]
    v: Tensor,  # [B, H, M, D]
    pos_key: Tensor | None,  # [H, R, D]
    pos_query: Tensor | None,  # [H, R, D]
    *,
    slots: Tensor | None,  # [2 * N - 1]
    documents: Tensor,  # [B, M]
    query_positions: Tensor | None = None,  # [B, L]
    scale: float,
    dropout_p: float = 0.0,
    workspace_bytes: int = WORKSPACE_BYTES,
    tiles: Tiles | None = None,
) -> Tensor:
    """Attend by content and relative position; the arguments are those of the reference.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        pos_key: Keys of the relative positions (c2p); None switches the term off.
        pos_query: Queries of the relative positions (p2c); None switches the term off.
        slots: Row of the position tables for each delta, at index delta + N - 1. None: row
            delta + M - 1, which makes R = 2 * M - 1.
        documents: The document of each key, numbered in int32; 0 is padding. Only positions of
            one document attend to each other; one that has no key gives zeros.
        query_positions: Where the queries sit; None: query i sits at position i, and L == M.
        scale: Factor of the sum of all terms.
        dropout_p: Dropout of the attention probabilities, in steps of 1 / 65536. Its seed comes
            from torch's generator of the device.
        workspace_bytes: Bound of the scratch; one pair of sample and head always fits.
        tiles: Blocks to use in place of `TILES`, to tune them.

    Returns:
        [B, H, L, D]

    Raises:
        ValueError: no slots, and a position table that has not a row for each delta.
    """
    check_order(slots, pos_key, pos_query, k.shape[2])
    states = [q, k, v, pos_key, pos_query]
    if q.device.type != "meta" and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        states = [x if x is None else x.to(dtype) for x in states]
    seed = None
    if dropout_p > 0.0:
        seed = torch.randint(2**63 - 1, (1,), device=q.device)
    numbers = [] if tiles is None else [number for tile in tiles for number in tile]
    options = (scale, dropout_p, workspace_bytes, numbers)
    return attention_forward(*states, slots, documents, query_positions, seed, *options)[0]


# The operators are functions of their arguments alone, the seed of the dropout among them. Their
# names carry a version: a compiled graph may outlive a schema.
@torch.library.custom_op("ds_deberta::disentangled_attention_v1", mutates_args=())
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    slots: Tensor | None,
    documents: Tensor,
    query_positions: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    workspace_bytes: int,
    tiles: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Return the output [B, H, L, D] and the base 2 log-sum-exp of the scores [B, H, L]."""
    call = _Call.of(q, k, v, pos_key, pos_query, slots, documents, query_positions, seed)
    options = _Options(scale, dropout_p, workspace_bytes, _tiles(q, tiles))
    with torch.cuda.device_of(q):
        return _forward(call, options)


@torch.library.custom_op("ds_deberta::disentangled_attention_backward_v1", mutates_args=())
def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    slots: Tensor | None,
    documents: Tensor,
    query_positions: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dropout_p: float,
    workspace_bytes: int,
    tiles: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and the two tables; an empty one for a table that is None."""
    call = _Call.of(q, k, v, pos_key, pos_query, slots, documents, query_positions, seed)
    options = _Options(scale, dropout_p, workspace_bytes, _tiles(q, tiles))
    with torch.cuda.device_of(q):
        return _backward(call, options, _heads_last(out), lse, _heads_last(grad_out))


@attention_forward.register_fake
def _(q, *_others):
    batch, heads, length, _ = q.shape
    return _empty_like(q), q.new_empty(batch, heads, length, dtype=torch.float32)


@attention_backward.register_fake
def _(_grad_out, q, k, v, pos_key, pos_query, *_others):
    tables = (q.new_empty(0) if x is None else _empty_like(x) for x in (pos_key, pos_query))
    return _empty_like(q), _empty_like(k), _empty_like(v), *tables


def _empty_like(states: Tensor) -> Tensor:
    """[..., H, L, D], of which each row is contiguous over the heads."""
    return states.new_empty(states.transpose(-2, -3).shape).transpose(-2, -3)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:9], *output)
    ctx.options = inputs[9:]


def _differentiate(ctx, grad_out, _grad_lse):
    tensors = ctx.saved_tensors
    grads = attention_backward(grad_out, *tensors, *ctx.options)
    tables = (None if x is None else grad for x, grad in zip(tensors[3:5], grads[3:], strict=True))
    return *grads[:3], *tables, *[None] * 8


attention_forward.register_autograd(_differentiate, setup_context=_save)


# ---- Launches ----


class _Options(NamedTuple):
    scale: float
    dropout_p: float
    workspace_bytes: int
    tiles: Tiles


class _Side(NamedTuple):
    """Queries or keys. Along them the other side is laid out by position."""

    states: Tensor  # [B, L, H, D]
    table: Tensor | None  # [U, H, D], their partner in the position scores, in the order of delta
    documents: Tensor  # [B, L]
    spans: Tensor  # [B, 2, L], first and last position of the document
    positions: Tensor | None  # [B, L]; None: row i sits at position i
    sign: int  # of delta, where it is counted from these rows


@dataclass(frozen=True, kw_only=True)
class _Call:
    """The arguments of an operator as the kernels want them."""

    queries: _Side
    keys: _Side
    v: Tensor  # [B, M, H, D]
    slots: Tensor | None  # [U]
    num_slots: int
    seed: Tensor | None

    @classmethod
    def of(cls, q, k, v, pos_key, pos_query, slots, documents, query_positions, seed) -> "_Call":
        keys = k.shape[2]
        num_slots = 0
        if slots is not None:
            middle = slots.shape[0] // 2
            slots = slots[middle - keys + 1 : middle + keys]
            num_slots = (pos_query if pos_key is None else pos_key).shape[1]
        documents = documents.to(torch.int32).contiguous()
        spans = _document_spans(documents)
        queries = (documents, spans, None)
        if query_positions is not None:
            queries = (
                documents.gather(1, query_positions),
                spans.gather(2, query_positions[:, None].expand(-1, 2, -1)),
                query_positions.to(torch.int32).contiguous(),
            )
        return cls(
            queries=_Side(_heads_last(q), _by_delta(pos_key, slots), *queries, sign=1),
            keys=_Side(
                _heads_last(k), _by_delta(pos_query, slots), documents, spans, None, sign=-1
            ),
            v=_heads_last(v),
            slots=slots,
            num_slots=num_slots,
            seed=seed,
        )


class _Chunk(NamedTuple):
    """A block of pairs of sample and head; its scratch is [heads * batch, ...]."""

    first_sample: int
    batch: int
    first_head: int
    heads: int


def _forward(call: _Call, options: _Options) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = call.queries.states.shape
    out = _fresh(call.queries.states.shape, call.v)
    lse = _fresh((batch, heads, length), call.v, torch.float32)
    for chunk in _chunks(batch, heads, options.workspace_bytes, _score_bytes(call)):
        _attend(call, options, chunk, out, lse)
    return out.transpose(1, 2), lse


def _attend(call: _Call, options: _Options, chunk: _Chunk, out: Tensor, lse: Tensor) -> None:
    """Write the output of a chunk. Its scratch dies here, and the next chunk takes its place."""
    queries, keys = call.queries, call.keys
    length, num_keys = queries.states.shape[1], keys.states.shape[1]
    _launch(
        attend_kernel,
        options.tiles.attend,
        chunk,
        queries.states,
        *(keys.states, call.v, *_scores(call, options, chunk)),
        *(queries.documents, keys.documents, queries.spans, queries.positions),
        *(out, lse, length, num_keys, _pitch(num_keys)),
        *(options.scale * LOG2_E, _keep_scale(options.dropout_p)),
    )


class _Gradients(NamedTuple):
    """What the chunks of a backward pass read and write together."""

    grad_out: Tensor  # [B, L, H, D]
    lse: Tensor  # [B, H, L]
    dots: Tensor  # [B, H, L], out . grad_out
    key_spans: Tensor  # [B, 2, M], first and last query that may attend to a key
    reach: Tensor  # [B], the largest delta in a document
    dq: Tensor  # [B, L, H, D]
    dk: Tensor  # [B, M, H, D]
    dv: Tensor  # [B, M, H, D]
    key_sums: Tensor | None  # [S, U, H, D], gradient of the table of the queries
    query_sums: Tensor | None  # [S, U, H, D], gradient of the table of the keys


def _backward(
    call: _Call, options: _Options, out: Tensor, lse: Tensor, grad_out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    queries, keys = call.queries, call.keys
    batch, length, heads, _ = queries.states.shape
    num_keys = keys.states.shape[1]
    dots = _fresh(lse.shape, lse)
    everything = _Chunk(0, batch, 0, heads)
    _launch(row_dots_kernel, Tile(32, 32, 4, 1), everything, out, grad_out, dots, length)
    grads = _Gradients(
        grad_out,
        lse,
        dots,
        _key_spans(queries.spans, num_keys),
        (keys.spans[:, 1] - keys.spans[:, 0]).amax(1),
        *(_fresh(x.shape, x) for x in (queries.states, keys.states, call.v)),
        *(_table_sums(side, num_keys, options.tiles) for side in (queries, keys)),
    )
    numbers = length * _pitch(num_keys) + num_keys * _pitch(length)
    if _is_spread(call):
        numbers += num_keys * _pitch(num_keys)
    pair_bytes = _score_bytes(call) + numbers * call.v.element_size()
    for chunk in _chunks(batch, heads, options.workspace_bytes, pair_bytes):
        _add_gradients(call, options, chunk, grads)
    return (
        *(x.transpose(1, 2) for x in (grads.dq, grads.dk, grads.dv)),
        _sum_by_slot(grads.key_sums, call, options.scale),
        _sum_by_slot(grads.query_sums, call, options.scale),
    )


def _add_gradients(call: _Call, options: _Options, chunk: _Chunk, grads: _Gradients) -> None:
    """Write dq, dk and dv of a chunk, and add to the sums of the tables."""
    queries, keys = call.queries, call.keys
    length, num_keys = queries.states.shape[1], keys.states.shape[1]
    pairs = (chunk.heads, chunk.batch)
    ds = _fresh((*pairs, length, _pitch(num_keys)), call.v)
    ds_t = _fresh((*pairs, num_keys, _pitch(length)), call.v)
    if _is_spread(call):
        ds_t.zero_()
    _launch(
        score_gradients_kernel,
        options.tiles.score_gradients,
        chunk,
        keys.states,
        *(queries.states, call.v, *_scores(call, options, chunk)),
        *(queries.documents, keys.documents, grads.key_spans, queries.positions),
        *(grads.lse, grads.dots, grads.grad_out, grads.dv, ds, ds_t),
        *(length, num_keys, _pitch(num_keys), _pitch(length)),
        *(options.scale * LOG2_E, _keep_scale(options.dropout_p)),
    )
    skewed = _add_by_position(ds_t, queries, chunk, _pitch(num_keys)) if _is_spread(call) else ds_t
    for side, other, scores, spans, aligned, output, sums in (
        (queries, keys, ds, queries.spans, ds, grads.dq, grads.key_sums),
        (keys, queries, ds_t, grads.key_spans, skewed, grads.dk, grads.query_sums),
    ):
        rows = side.states.shape[1]
        _launch(
            state_gradients_kernel,
            options.tiles.state_gradients,
            chunk,
            output,
            *(other.states, side.table, scores, spans, aligned, side.spans, side.positions),
            *(rows, other.states.shape[1], num_keys, scores.shape[-1], aligned.shape[-1]),
            options.scale,
            SIGN=side.sign,
        )
        if sums is not None:
            _launch(
                table_gradients_kernel,
                options.tiles.table_gradients,
                chunk,
                side.states,
                *(aligned, side.spans, side.positions, grads.reach, sums),
                *(rows, num_keys, aligned.shape[-1], chunk.batch),
                grid=(_delta_blocks(num_keys, options.tiles), sums.shape[0], chunk.heads),
                SIGN=side.sign,
            )


def _is_spread(call: _Call) -> bool:
    """Whether the columns of the transposed gradients are not yet positions, but must be."""
    return call.queries.positions is not None and call.keys.table is not None


def _scores(
    call: _Call, options: _Options, chunk: _Chunk
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return c2p [N, L, C], transposed p2c [N, M, C] and the words of the dropout [N, L, W]."""
    num_keys = call.keys.states.shape[1]
    position_scores = []
    for side in (call.queries, call.keys):
        if side.table is None:
            position_scores.append(None)
            continue
        rows = side.states.shape[1]
        scores = _fresh((chunk.heads * chunk.batch, rows, _pitch(num_keys)), side.states)
        _launch(
            position_scores_kernel,
            options.tiles.position_scores,
            chunk,
            side.states,
            *(side.table, side.spans, side.positions, scores, rows, num_keys, _pitch(num_keys)),
            SIGN=side.sign,
        )
        position_scores.append(scores)
    keep = None
    if call.seed is not None:
        _, length, heads, _ = call.queries.states.shape
        keep = _keep_words(call.seed, options.dropout_p, chunk, heads, length, num_keys)
    return *position_scores, keep


def _score_bytes(call: _Call) -> int:
    """Scratch that `_scores` fills for one pair."""
    num_keys = call.keys.states.shape[1]
    rows = sum(x.states.shape[1] for x in (call.queries, call.keys) if x.table is not None)
    words = call.queries.states.shape[1] * triton.cdiv(num_keys, 32) * (call.seed is not None)
    return rows * _pitch(num_keys) * call.v.element_size() + 4 * words


def _chunks(batch: int, heads: int, workspace_bytes: int, pair_bytes: int) -> Iterator[_Chunk]:
    """Cut the pairs into even blocks: some heads of the whole batch, or some samples of a head."""
    pairs = max(1, workspace_bytes // max(1, pair_bytes))
    each_heads = _even_share(heads, pairs // batch)
    each_batch = _even_share(batch, pairs)
    for head in range(0, heads, each_heads):
        for sample in range(0, batch, each_batch):
            yield _Chunk(
                sample, min(each_batch, batch - sample), head, min(each_heads, heads - head)
            )


def _even_share(total: int, limit: int) -> int:
    return triton.cdiv(total, triton.cdiv(total, max(1, limit)))


def _launch(
    kernel: Any,
    tile: Tile,
    chunk: _Chunk,
    states: Tensor,
    *args: Any,
    grid: tuple[int, int, int] | None = None,
    **flags: int,
) -> None:
    """Run a kernel: one program for each block of rows of `states` [B, L, H, D], for each pair."""
    _, length, heads, size = states.shape
    kernel[grid or (triton.cdiv(length, tile.rows), chunk.batch, chunk.heads)](
        states,
        *args,
        chunk.first_sample,
        chunk.first_head,
        H=heads,
        D=size,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **flags,
    )


def _tiles(q: Tensor, numbers: Sequence[int]) -> Tiles:
    if not numbers:
        return TILES[q.shape[-1], q.element_size()]
    return Tiles(*(Tile(*numbers[n : n + 4]) for n in range(0, len(numbers), 4)))


def _heads_last(states: Tensor) -> Tensor:
    """[B, H, L, D] -> [B, L, H, D]."""
    return states.transpose(1, 2).contiguous()


def _by_delta(table: Tensor | None, slots: Tensor | None) -> Tensor | None:
    """[H, R, D] -> [U, H, D], rows in the order of delta."""
    if table is None:
        return None
    table = table.transpose(0, 1)
    return table.contiguous() if slots is None else table[slots]


def _table_sums(side: _Side, num_keys: int, tiles: Tiles) -> Tensor | None:
    """Zeros [S, U, H, D], for the gradient of a table in shares of the batch."""
    if side.table is None:
        return None
    shares = max(1, TABLE_PROGRAMS // _delta_blocks(num_keys, tiles))
    shape = (min(len(side.states), shares), *side.table.shape)
    return torch.zeros(shape, dtype=torch.float32, device=side.table.device)


def _delta_blocks(num_keys: int, tiles: Tiles) -> int:
    return triton.cdiv(2 * num_keys - 1, tiles.table_gradients.columns)


def _sum_by_slot(sums: Tensor | None, call: _Call, scale: float) -> Tensor:
    """[S, U, H, D] -> [H, R, D], the gradient of a table; nothing for no table."""
    if sums is None:
        return call.v.new_empty(0)
    by_delta = sums.sum(0).mul_(scale)  # [U, H, D]
    if call.slots is None:
        return by_delta.transpose(0, 1).to(call.v.dtype)
    # The backward of an embedding sums the deltas of a slot fast and in a fixed order.
    by_slot = torch.ops.aten.embedding_dense_backward(
        by_delta.flatten(1), call.slots, call.num_slots, -1, False
    )  # [R, H*D]
    return by_slot.view(-1, *sums.shape[2:]).transpose(0, 1).to(call.v.dtype)


def _add_by_position(ds_t: Tensor, queries: _Side, chunk: _Chunk, pitch: int) -> Tensor:
    """[heads, batch, M, queries] -> [heads, batch, M, positions], adding queries of one place."""
    samples = slice(chunk.first_sample, chunk.first_sample + chunk.batch)
    positions = torch.arange(pitch, device=ds_t.device)
    one_hot = (queries.positions[samples, :, None] == positions).to(ds_t.dtype)  # [batch, L, C]
    return ds_t[..., : one_hot.shape[1]] @ one_hot


def _keep_words(
    seed: Tensor, dropout_p: float, chunk: _Chunk, heads: int, length: int, num_keys: int
) -> Tensor:
    """Draw the dropout of a chunk: int32 [heads, batch, L, W], a bit for each key."""
    words = triton.cdiv(num_keys, 32)
    keep = _fresh((chunk.heads, chunk.batch, length, words), seed, torch.int32)
    keep_words_kernel[(triton.cdiv(length * words, KEEP_BLOCK), chunk.batch, chunk.heads)](
        seed,
        keep,
        length,
        words,
        _dropped_of_65536(dropout_p),
        chunk.first_sample,
        chunk.first_head,
        H=heads,
        BLOCK=KEEP_BLOCK,
        num_warps=8,
    )
    return keep


def keep_mask(seed: Tensor, dropout_p: float, shape: Sequence[int]) -> Tensor:
    """Return which probabilities the dropout keeps, bool of `shape` [B, H, L, M]."""
    batch, heads, length, num_keys = shape
    words = _keep_words(seed, dropout_p, _Chunk(0, batch, 0, heads), heads, length, num_keys)
    bits = words[..., None] >> torch.arange(32, device=words.device, dtype=torch.int32) & 1
    return bits.bool().flatten(-2)[..., :num_keys].transpose(0, 1)


def _dropped_of_65536(dropout_p: float) -> int:
    return round(dropout_p * 65536)


def _keep_scale(dropout_p: float) -> float:
    kept = 65536 - _dropped_of_65536(dropout_p)
    return 65536 / kept if kept else 0.0


def _document_spans(documents: Tensor) -> Tensor:
    """[B, M] -> [B, 2, M], first and last position of the document of each position."""
    batch, num_keys = documents.shape
    spans = _fresh((batch, 2, num_keys), documents)
    grid = (triton.cdiv(num_keys, 64), batch)
    document_spans_kernel[grid](documents, spans, num_keys, ROWS=64, COLUMNS=128)
    return spans


def _key_spans(query_spans: Tensor, num_keys: int) -> Tensor:
    """[B, 2, L] -> [B, 2, M], first and last query whose span covers each key."""
    batch, _, length = query_spans.shape
    spans = _fresh((batch, 2, num_keys), query_spans)
    grid = (triton.cdiv(num_keys, 64), batch)
    key_spans_kernel[grid](query_spans, spans, length, num_keys, ROWS=64, COLUMNS=128)
    return spans


def _pitch(columns: int) -> int:
    """Numbers from row to row of scratch: rows start at multiples of 16, so loads are wide."""
    return triton.cdiv(columns, 16) * 16


def _fresh(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory with anything in it."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


# ---- Kernels ----
# Arguments that compile into a kernel are in capitals, and so are pointers. No other annotation
# than tl.constexpr: a plain type would switch off the compiler's knowledge of 1 and of 16.
# A pointer may be None, which compiles its part away.

NOWHERE = tl.constexpr(1 << 30)  # first of an empty span; its last is -1


@triton.jit(do_not_specialize=["first_sample", "first_head"])
def position_scores_kernel(
    STATES,  # [B, L, H, D]
    TABLE,  # [U, H, D]
    SPANS,  # [B, 2, L]
    POSITIONS,  # [B, L] or None
    SCORES,  # [N, L, C]
    length,
    num_keys,
    pitch,
    first_sample,
    first_head,
    H: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIGN: tl.constexpr,
):
    """scores[i, i + e] = states_i . table[delta], delta = -e for queries and e for keys."""
    sample, head, pair = _pair(first_sample, first_head)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    position = _positions(POSITIONS, sample, i, length)
    first, last = _spans(SPANS, sample, i, length)
    e_first, e_last = _reach(first, last, position)
    states = tl.load(
        _rows(STATES, sample * length, head, i, H, D), mask=i[:, None] < length, other=0.0
    )
    scores = SCORES + pair * length * pitch + i[:, None] * pitch
    for e_start in range(e_first, e_last + 1, COLUMNS):
        e = e_start + tl.arange(0, COLUMNS)
        table = _load_table(TABLE, head, e, num_keys, H, D, SIGN)
        product = tl.dot(states, tl.trans(table), input_precision="ieee")  # [ROWS, COLUMNS]
        column = position[:, None] + e[None, :]
        inside = (column >= first[:, None]) & (column <= last[:, None])
        tl.store(scores + column, product.to(SCORES.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first_sample", "first_head"])
def attend_kernel(
    Q,  # [B, L, H, D]
    K,  # [B, M, H, D]
    V,  # [B, M, H, D]
    C2P,  # [N, L, C] or None
    P2C,  # [N, M, C] or None; columns are positions of queries
    KEEP,  # [N, L, W] or None
    QUERY_DOCUMENTS,  # [B, L]
    DOCUMENTS,  # [B, M]
    SPANS,  # [B, 2, L]
    POSITIONS,  # [B, L] or None
    OUT,  # [B, L, H, D]
    LSE,  # [B, H, L]
    length,
    num_keys,
    pitch,
    score_scale,
    keep_scale,
    first_sample,
    first_head,
    H: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Owns a block of queries, walks along the keys: an online softmax."""
    sample, head, pair = _pair(first_sample, first_head)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = i < length
    position = _positions(POSITIONS, sample, i, length)
    document = tl.load(QUERY_DOCUMENTS + sample * length + i, mask=is_row, other=0)
    first, last = _spans(SPANS, sample, i, length)
    q = tl.load(_rows(Q, sample * length, head, i, H, D), mask=is_row[:, None], other=0.0)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    context = tl.zeros([ROWS, D], tl.float32)
    for block in range(tl.min(first) // COLUMNS, tl.max(last) // COLUMNS + 1):
        j = block * COLUMNS + tl.arange(0, COLUMNS)
        is_key = j < num_keys
        at_keys = _rows(K, sample * num_keys, head, j, H, D)
        k = tl.load(at_keys, mask=is_key[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [ROWS, COLUMNS]
        if C2P is not None:
            at = C2P + pair * length * pitch + (i[:, None] * pitch + j[None, :])
            scores += tl.load(at, mask=is_row[:, None] & (j < pitch)[None, :], other=0.0)
        if P2C is not None:
            at = P2C + pair * num_keys * pitch + (j[:, None] * pitch + position[None, :])
            p2c = tl.load(at, mask=is_key[:, None] & (position < pitch)[None, :], other=0.0)
            scores += tl.trans(p2c)
        key_document = tl.load(DOCUMENTS + sample * num_keys + j, mask=is_key, other=0)
        # Scratch outside the documents was never written: selected away here, whatever it holds.
        same = (document[:, None] == key_document[None, :]) & (document[:, None] != 0)
        scores = tl.where(same, scores * score_scale, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        reference = tl.where(higher == float("-inf"), 0.0, higher)
        probs = tl.math.exp2(scores - reference[:, None])
        fade = tl.math.exp2(highest - reference)
        total = total * fade + tl.sum(probs, 1)
        if KEEP is not None:
            keep = _load_keep(KEEP, pair, i, block, length, num_keys, ROWS, COLUMNS, False)
            probs = tl.where(keep, probs, 0.0)
        v = tl.load(_rows(V, sample * num_keys, head, j, H, D), mask=is_key[:, None], other=0.0)
        context = context * fade[:, None]
        context += tl.dot(probs.to(v.dtype), v, input_precision="ieee")
        highest = higher
    total = tl.where(total > 0.0, total, 1.0)  # a row without keys: zeros
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    out = context * (keep_scale / total)[:, None]
    at_out = _rows(OUT, sample * length, head, i, H, D)
    tl.store(at_out, out.to(OUT.dtype.element_ty), mask=is_row[:, None])
    tl.store(LSE + (sample * H + head) * length + i, highest + tl.math.log2(total), mask=is_row)


@triton.jit(do_not_specialize=["first_sample", "first_head"])
def row_dots_kernel(
    OUT,  # [B, L, H, D]
    GRAD_OUT,  # [B, L, H, D]
    DOTS,  # [B, H, L]
    length,
    first_sample,
    first_head,
    H: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Out . grad_out of each row: what the softmax takes off the gradient of each of its scores."""
    sample, head, _ = _pair(first_sample, first_head)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = i[:, None] < length
    out = tl.load(_rows(OUT, sample * length, head, i, H, D), mask=mask, other=0.0)
    grad = tl.load(_rows(GRAD_OUT, sample * length, head, i, H, D), mask=mask, other=0.0)
    dots = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(DOTS + (sample * H + head) * length + i, dots, mask=i < length)


@triton.jit(do_not_specialize=["first_sample", "first_head"])
def score_gradients_kernel(
    K,  # [B, M, H, D]
    Q,  # [B, L, H, D]
    V,  # [B, M, H, D]
    C2P,  # [N, L, C] or None
    P2C,  # [N, M, C] or None; columns are positions of queries
    KEEP,  # [N, L, W] or None
    QUERY_DOCUMENTS,  # [B, L]
    DOCUMENTS,  # [B, M]
    KEY_SPANS,  # [B, 2, M]
    POSITIONS,  # [B, L] or None
    LSE,  # [B, H, L]
    DOTS,  # [B, H, L]
    GRAD_OUT,  # [B, L, H, D]
    DV,  # [B, M, H, D]
    DS,  # [N, L, C]
    DS_T,  # [N, M, columns of queries]
    length,
    num_keys,
    pitch,
    query_pitch,
    score_scale,
    keep_scale,
    first_sample,
    first_head,
    H: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Owns a block of keys, walks along the queries; tiles are [keys, queries].

    DS leaves out the factor `scale`: large enough for fp16 as it is.
    """
    sample, head, pair = _pair(first_sample, first_head)
    j = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_key = j < num_keys
    document = tl.load(DOCUMENTS + sample * num_keys + j, mask=is_key, other=0)
    first, last = _spans(KEY_SPANS, sample, j, num_keys)
    k = tl.load(_rows(K, sample * num_keys, head, j, H, D), mask=is_key[:, None], other=0.0)
    v = tl.load(_rows(V, sample * num_keys, head, j, H, D), mask=is_key[:, None], other=0.0)
    dv = tl.zeros([ROWS, D], tl.float32)
    for block in range(tl.min(first) // COLUMNS, tl.max(last) // COLUMNS + 1):
        i = block * COLUMNS + tl.arange(0, COLUMNS)
        is_row = i < length
        position = _positions(POSITIONS, sample, i, length)
        q = tl.load(_rows(Q, sample * length, head, i, H, D), mask=is_row[:, None], other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")  # [ROWS, COLUMNS]
        if P2C is not None:
            at = P2C + pair * num_keys * pitch + (j[:, None] * pitch + position[None, :])
            mask = is_key[:, None] & (position < pitch)[None, :]
            scores += tl.load(at, mask=mask, other=0.0)
        if C2P is not None:
            at = C2P + pair * length * pitch + (i[:, None] * pitch + j[None, :])
            c2p = tl.load(at, mask=is_row[:, None] & (j < pitch)[None, :], other=0.0)
            scores += tl.trans(c2p)
        at_row = (sample * H + head) * length + i
        lse = tl.load(LSE + at_row, mask=is_row, other=0.0)
        dots = tl.load(DOTS + at_row, mask=is_row, other=0.0)
        query_document = tl.load(QUERY_DOCUMENTS + sample * length + i, mask=is_row, other=0)
        same = (document[:, None] == query_document[None, :]) & (document[:, None] != 0)
        probs = tl.where(same, tl.math.exp2(scores * score_scale - lse[None, :]), 0.0)
        at_grad = _rows(GRAD_OUT, sample * length, head, i, H, D)
        grad_out = tl.load(at_grad, mask=is_row[:, None], other=0.0)
        grad_probs = tl.dot(v, tl.trans(grad_out), input_precision="ieee")  # [ROWS, COLUMNS]
        kept = probs
        if KEEP is not None:
            keep = _load_keep(KEEP, pair, j, block, length, num_keys, ROWS, COLUMNS, True)
            kept = tl.where(keep, probs, 0.0)
            grad_probs = tl.where(keep, grad_probs * keep_scale, 0.0)
        dv += tl.dot(kept.to(grad_out.dtype), grad_out, input_precision="ieee")
        ds = (probs * (grad_probs - dots[None, :])).to(DS.dtype.element_ty)
        at = DS_T + pair * num_keys * query_pitch + (j[:, None] * query_pitch + i[None, :])
        tl.store(at, ds, mask=is_key[:, None] & (i < query_pitch)[None, :])
        at = DS + pair * length * pitch + (i[:, None] * pitch + j[None, :])
        tl.store(at, tl.trans(ds), mask=is_row[:, None] & (j < pitch)[None, :])
    at_dv = _rows(DV, sample * num_keys, head, j, H, D)
    tl.store(at_dv, (dv * keep_scale).to(DV.dtype.element_ty), mask=is_key[:, None])


@triton.jit(do_not_specialize=["first_sample", "first_head"])
def state_gradients_kernel(
    GRAD,  # [B, L, H, D]
    OTHERS,  # [B, M, H, D]
    TABLE,  # [U, H, D] or None
    DS,  # [N, L, columns]
    SPANS,  # [B, 2, L], of columns of DS
    SKEWED,  # [N, L, C]; its columns are positions
    SKEWED_SPANS,  # [B, 2, L], of positions
    POSITIONS,  # [B, L] or None
    length,
    num_others,
    num_keys,
    pitch,
    skewed_pitch,
    scale,
    first_sample,
    first_head,
    H: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIGN: tl.constexpr,
):
    """grad_i = scale * (sum_j ds[i, j] others_j + sum_e ds[i, i + e] table[delta])."""
    sample, head, pair = _pair(first_sample, first_head)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = i < length
    grad = tl.zeros([ROWS, D], tl.float32)
    first, last = _spans(SPANS, sample, i, length)
    for block in range(tl.min(first) // COLUMNS, tl.max(last) // COLUMNS + 1):
        j = block * COLUMNS + tl.arange(0, COLUMNS)
        at = DS + pair * length * pitch + (i[:, None] * pitch + j[None, :])
        ds = tl.load(at, mask=is_row[:, None] & (j < pitch)[None, :], other=0.0)
        inside = (j[None, :] >= first[:, None]) & (j[None, :] <= last[:, None])
        ds = tl.where(inside, ds, 0.0).to(DS.dtype.element_ty)
        at = _rows(OTHERS, sample * num_others, head, j, H, D)
        others = tl.load(at, mask=j[:, None] < num_others, other=0.0)
        grad += tl.dot(ds, others, input_precision="ieee")
    if TABLE is not None:
        position = _positions(POSITIONS, sample, i, length)
        first, last = _spans(SKEWED_SPANS, sample, i, length)
        e_first, e_last = _reach(first, last, position)
        for e_start in range(e_first, e_last + 1, COLUMNS):
            e = e_start + tl.arange(0, COLUMNS)
            column = position[:, None] + e[None, :]
            inside = (column >= first[:, None]) & (column <= last[:, None])
            at = SKEWED + pair * length * skewed_pitch + (i[:, None] * skewed_pitch + column)
            ds = tl.load(at, mask=inside, other=0.0)
            table = _load_table(TABLE, head, e, num_keys, H, D, SIGN)
            grad += tl.dot(ds, table, input_precision="ieee")
    at_grad = _rows(GRAD, sample * length, head, i, H, D)
    tl.store(at_grad, (grad * scale).to(GRAD.dtype.element_ty), mask=is_row[:, None])


@triton.jit(do_not_specialize=["first_sample", "first_head", "batch"])
def table_gradients_kernel(
    STATES,  # [B, L, H, D]
    SKEWED,  # [N, L, C]; its columns are positions
    SPANS,  # [B, 2, L]
    POSITIONS,  # [B, L] or None
    REACH,  # [B]
    SUMS,  # [S, U, H, D] float32
    length,
    num_keys,
    pitch,
    batch,
    first_sample,
    first_head,
    H: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIGN: tl.constexpr,
):
    """sums[share, delta] += sum over the samples of a share and over i of ds[i, i + e] states_i.

    Sample b is always in share b % S, and sums are carried on from chunk to chunk: the result does
    not depend on the chunks.
    """
    share = tl.program_id(1)
    shares = tl.num_programs(1)
    head = first_head + tl.program_id(2)
    e_first = tl.program_id(0) * COLUMNS - (num_keys - 1)
    e_last = e_first + COLUMNS - 1
    e = e_first + tl.arange(0, COLUMNS)
    at_sums = _rows(SUMS, share * (2 * num_keys - 1), head, num_keys - 1 - SIGN * e, H, D)
    is_delta = (e < num_keys)[:, None]
    sums = tl.load(at_sums, mask=is_delta, other=0.0)
    for offset in range((share + shares - first_sample % shares) % shares, batch, shares):
        sample = first_sample + offset
        pair = (tl.program_id(2) * batch + offset).to(tl.int64)
        reach = tl.load(REACH + sample)
        start, stop = 0, length
        if POSITIONS is None:
            start, stop = tl.maximum(0, -e_last), tl.minimum(length, num_keys - e_first)
        stop = tl.where((e_first > reach) | (e_last < -reach), start, stop)
        for block in range(start // ROWS, tl.cdiv(stop, ROWS)):
            i = block * ROWS + tl.arange(0, ROWS)
            position = _positions(POSITIONS, sample, i, length)
            first, last = _spans(SPANS, sample, i, length)
            column = position[:, None] + e[None, :]
            inside = (column >= first[:, None]) & (column <= last[:, None])
            at = SKEWED + pair * length * pitch + (i[:, None] * pitch + column)
            ds = tl.load(at, mask=inside, other=0.0)
            at = _rows(STATES, sample * length, head, i, H, D)
            states = tl.load(at, mask=i[:, None] < length, other=0.0)
            sums += tl.dot(tl.trans(ds), states, input_precision="ieee")
    tl.store(at_sums, sums, mask=is_delta)


@triton.jit(do_not_specialize=["first_sample", "first_head"])
def keep_words_kernel(
    SEED,  # [1] int64
    KEEP,  # [N, L, W] int32, a bit for each key
    length,
    words,
    dropped,
    first_sample,
    first_head,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Keep what draws `dropped` or more out of 65536: 8 draws from a call of Philox.

    The counter names the place (sample and head, row, columns), so chunks make no difference.
    """
    sample, head, pair = _pair(first_sample, first_head)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    zero = index * 0
    word = zero
    for group in tl.static_range(4):
        draws = tl.philox(
            tl.load(SEED), index % words * 4 + group, index // words, zero + sample * H + head, zero
        )
        for number in tl.static_range(4):
            low = (draws[number] & 0xFFFF).to(tl.int32)
            high = (draws[number] >> 16).to(tl.int32)
            word |= (low >= dropped).to(tl.int32) << (8 * group + 2 * number)
            word |= (high >= dropped).to(tl.int32) << (8 * group + 2 * number + 1)
    tl.store(KEEP + pair * length * words + index, word, mask=index < length * words)


@triton.jit
def document_spans_kernel(
    DOCUMENTS,  # [B, M]
    SPANS,  # [B, 2, M]
    num_keys,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """First and last position of each position's document; of padding, an empty span."""
    sample = tl.program_id(1)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    document = tl.load(DOCUMENTS + sample * num_keys + i, mask=i < num_keys, other=0)
    first = tl.full([ROWS], NOWHERE, tl.int32)
    last = tl.full([ROWS], -1, tl.int32)
    for start in range(0, num_keys, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        other = tl.load(DOCUMENTS + sample * num_keys + j, mask=j < num_keys, other=0)
        same = (document[:, None] == other[None, :]) & (document[:, None] != 0)
        first = tl.minimum(first, tl.min(tl.where(same, j[None, :], NOWHERE), 1))
        last = tl.maximum(last, tl.max(tl.where(same, j[None, :], -1), 1))
    tl.store(SPANS + 2 * sample * num_keys + i, first, mask=i < num_keys)
    tl.store(SPANS + (2 * sample + 1) * num_keys + i, last, mask=i < num_keys)


@triton.jit
def key_spans_kernel(
    QUERY_SPANS,  # [B, 2, L]
    SPANS,  # [B, 2, M]
    length,
    num_keys,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """First and last query whose span covers each key, if only as a hole in its document."""
    sample = tl.program_id(1)
    j = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.full([ROWS], NOWHERE, tl.int32)
    last = tl.full([ROWS], -1, tl.int32)
    for start in range(0, length, COLUMNS):
        i = start + tl.arange(0, COLUMNS)
        from_key, to_key = _spans(QUERY_SPANS, sample, i, length)
        covers = (from_key[None, :] <= j[:, None]) & (j[:, None] <= to_key[None, :])
        first = tl.minimum(first, tl.min(tl.where(covers, i[None, :], NOWHERE), 1))
        last = tl.maximum(last, tl.max(tl.where(covers, i[None, :], -1), 1))
    tl.store(SPANS + 2 * sample * num_keys + j, first, mask=j < num_keys)
    tl.store(SPANS + (2 * sample + 1) * num_keys + j, last, mask=j < num_keys)


@triton.jit
def _pair(first_sample, first_head):
    """Return sample, head, and the number of their pair in the chunk."""
    pair = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    return first_sample + tl.program_id(1), first_head + tl.program_id(2), pair.to(tl.int64)


@triton.jit
def _rows(X, start, head, rows, H: tl.constexpr, D: tl.constexpr):
    """Point at rows start + rows of a head, in X [..., H, D]."""
    X += (start.to(tl.int64) * H + head) * D
    return X + rows[:, None] * (H * D) + tl.arange(0, D)[None, :]


@triton.jit
def _load_table(TABLE, head, e, num_keys, H: tl.constexpr, D: tl.constexpr, SIGN: tl.constexpr):
    """Load the rows of a position table for columns e away from the diagonal, [COLUMNS, D]."""
    row = num_keys - 1 - SIGN * e
    mask = (row >= 0) & (row < 2 * num_keys - 1)
    return tl.load(_rows(TABLE, head * 0, head, row, H, D), mask=mask[:, None], other=0.0)


@triton.jit
def _positions(POSITIONS, sample, rows, length):
    if POSITIONS is not None:
        rows = tl.load(POSITIONS + sample * length + rows, mask=rows < length, other=0)
    return rows


@triton.jit
def _spans(SPANS, sample, rows, length):
    at = SPANS + 2 * sample * length + rows
    first = tl.load(at, mask=rows < length, other=NOWHERE)
    return first, tl.load(at + length, mask=rows < length, other=-1)


@triton.jit
def _reach(first, last, position):
    """Return the smallest and the largest e = column - position within the spans of some rows."""
    e_first = tl.min(tl.where(last >= first, first - position, NOWHERE))
    return e_first, tl.max(tl.where(last >= first, last - position, -NOWHERE))


@triton.jit
def _load_keep(
    KEEP,  # [N, L, W]
    pair,
    rows,
    block,
    length,
    num_keys,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BY_KEY: tl.constexpr,
):
    """Unpack bits to a mask [ROWS, COLUMNS]; rows are queries, or with BY_KEY keys."""
    words = tl.cdiv(num_keys, 32)
    if BY_KEY:
        i = block * COLUMNS + tl.arange(0, COLUMNS)
        word = tl.program_id(0) * (ROWS // 32) + tl.arange(0, ROWS // 32)
        at = KEEP + pair * length * words + (i[None, :] * words + word[:, None])
        packed = tl.load(at, mask=(i < length)[None, :] & (word < words)[:, None], other=0)
        bits = packed[:, None, :] >> tl.arange(0, 32)[None, :, None]
    else:
        word = block * (COLUMNS // 32) + tl.arange(0, COLUMNS // 32)
        at = KEEP + pair * length * words + (rows[:, None] * words + word[None, :])
        packed = tl.load(at, mask=(rows < length)[:, None] & (word < words)[None, :], other=0)
        bits = packed[:, :, None] >> tl.arange(0, 32)[None, None, :]
    return tl.reshape(bits & 1, (ROWS, COLUMNS)) != 0
