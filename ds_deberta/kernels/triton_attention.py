"""Disentangled attention for CUDA, in Triton: what `reference.py` defines, without an L x L graph.

    scores[i, j] = scale * (q_i . k_j + q_i . pos_key[slots[i - j]] + k_j . pos_query[slots[i - j]])

The idea. Put the position tables in the order of delta = i - j and let e = column - row. A product
of a tile of rows with a tile of deltas then belongs at the affine addresses (row, row + e): the
kernels store and load it there, skewed. So nothing is gathered, nothing is looked up, and the
gradient of a table is a sum in registers over rows, never an atomic addition: two runs give the
same bits.

Read from the top: the function, the two registered operators, the launches, the kernels.

    forward     fill_scratch (c2p, p2c, the words of the dropout) -> attend
    backward    fill_scratch -> score_gradients (dv, and the scores' own gradient twice: as it is
                and transposed, where c2p and p2c were) -> state_gradients (dq, dk)
                -> table_gradients

All this runs for a chunk of (sample, head) pairs at a time, whose scratch is meant to stay
mostly in the L2 cache, and is used again by the next chunk. From forward to backward only the
inputs, the output and one number for each row are kept. A chunk keeps a GPU busy for some
microseconds a kernel: so a kernel does all the work that is ready, and a launch costs the host
little.

Shapes: B batch, L queries, M keys, H heads, D head size, R rows of a position table, U = 2M - 1
deltas, N pairs of a chunk, C columns of a row of scratch, S shares of the batch. Inside, heads
come after rows, [B, L, H, D]: so the projections around attention make them, without a copy.
"""

import math
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
WORKSPACE_BYTES = 66 * 2**20
"""Scratch of one chunk: 64 pairs at 512 positions. Half of it takes the host 1.2 times as long; but
it is a little more than the L2 cache of a large GPU, where nothing has been measured yet:
`benchmarks/attention.py --workspaces` does."""
KEEP_BLOCK = 1024
"""Words of the dropout that one program of `fill_scratch_kernel` draws."""
STRIDE = tl.constexpr(2)
"""Rows of a tile are so far apart where skewed columns are moved: where column = row + e, the
columns of one e are then all even, or all odd. They move in aligned pairs, and the compiler, which
knows it, fetches them ahead of time."""
TABLE_PROGRAMS = 64
"""Programs that share the gradient of one head's position table, by delta, row and sample."""


class Tile(NamedTuple):
    """Block of a kernel, and how the compiler spreads it."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


class Tiles(NamedTuple):
    """The blocks of all kernels."""

    fill_scratch: Tile  # rows x deltas
    attend: Tile  # queries x keys
    score_gradients: Tile  # keys x queries
    state_gradients: Tile  # rows x columns
    table_gradients: Tile  # rows x deltas, of which a program owns the deltas


_SMALL_HEADS = Tiles(
    fill_scratch=Tile(128, 64, 8, 3),
    attend=Tile(128, 64, 8, 3),
    score_gradients=Tile(128, 64, 8, 2),
    state_gradients=Tile(128, 64, 8, 2),
    table_gradients=Tile(64, 64, 4, 3),
)
_LARGE_HEADS = Tiles(
    fill_scratch=Tile(128, 64, 8, 2),
    attend=Tile(64, 64, 8, 2),
    score_gradients=Tile(128, 32, 8, 2),
    state_gradients=Tile(128, 64, 8, 2),
    table_gradients=Tile(64, 64, 8, 2),
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


@dataclass(frozen=True, kw_only=True)
class _Call:
    """The arguments of an operator as the kernels want them."""

    q: Tensor  # [B, L, H, D]
    k: Tensor  # [B, M, H, D]
    v: Tensor  # [B, M, H, D]
    key_table: Tensor | None  # [U, H, D], pos_key in the order of delta
    query_table: Tensor | None  # [U, H, D], pos_query in the order of delta
    slots: Tensor | None  # [U]
    num_slots: int
    query_documents: Tensor  # [B, L]
    documents: Tensor  # [B, M]
    query_spans: Tensor  # [B, 2, L], first and last position of the document
    spans: Tensor  # [B, 2, M]
    positions: Tensor | None  # [B, L]; None: query i sits at position i
    seed: Tensor | None

    @classmethod
    def of(cls, q, k, v, pos_key, pos_query, slots, documents, query_positions, seed) -> "_Call":
        keys = k.shape[2]
        if slots is not None:
            middle = slots.shape[0] // 2
            slots = slots[middle - keys + 1 : middle + keys]
        documents = documents.to(torch.int32).contiguous()
        spans = _document_spans(documents)
        query_documents, query_spans, positions = documents, spans, None
        if query_positions is not None:
            query_documents = documents.gather(1, query_positions)
            query_spans = spans.gather(2, query_positions[:, None].expand(-1, 2, -1))
            positions = query_positions.to(torch.int32).contiguous()
        return cls(
            q=_heads_last(q),
            k=_heads_last(k),
            v=_heads_last(v),
            key_table=_by_delta(pos_key, slots),
            query_table=_by_delta(pos_query, slots),
            slots=slots,
            num_slots=next((x.shape[1] for x in (pos_key, pos_query) if x is not None), 0),
            query_documents=query_documents,
            documents=documents,
            query_spans=query_spans,
            spans=spans,
            positions=positions,
            seed=seed,
        )

    @property
    def is_spread(self) -> bool:
        """Whether the columns of the transposed gradients are not yet positions, but must be."""
        return self.positions is not None and self.query_table is not None


class _Chunk(NamedTuple):
    """A block of pairs of sample and head; its scratch is [heads * batch, ...]."""

    first_sample: int
    first_head: int
    batch: int
    heads: int


class _Scratch(NamedTuple):
    """What the kernels of a chunk hand on; the next chunk takes its place."""

    c2p: Tensor | None = None  # [N, L, C]
    p2c: Tensor | None = None  # [N, M, C], transposed; columns are positions of queries
    keep: Tensor | None = None  # [N, L, W], the dropout: a bit for each key
    ds: Tensor | None = None  # [N, L, C], gradient of the scores; where c2p was
    ds_t: Tensor | None = None  # [N, M, columns of queries], transposed; where p2c was
    skewed: Tensor | None = None  # [N, M, C], ds_t, but columns are positions


def _forward(call: _Call, options: _Options) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = call.q.shape
    num_keys = call.k.shape[1]
    out = _fresh(call.q.shape, call.v)
    lse = _fresh((batch, heads, length), call.v, torch.float32)
    chunks, scratch = _cut(call, options.workspace_bytes, has_backward=False)
    fill_scratch = _fill_scratch(call, options, scratch)
    tile = options.tiles.attend
    attend = _Launcher(
        *(attend_kernel, tile, call.q.shape, _ceil_div(length, tile.rows)),
        *(call.q, call.k, call.v, scratch.c2p, scratch.p2c, scratch.keep),
        *(call.query_documents, call.documents, call.query_spans, call.positions),
        *(out, lse, length, num_keys, _pitch(num_keys)),
        *(options.scale * LOG2_E, _keep_scale(options.dropout_p)),
    )
    for chunk in chunks:
        fill_scratch(chunk)
        attend(chunk)
    return out.transpose(1, 2), lse


def _backward(
    call: _Call, options: _Options, out: Tensor, lse: Tensor, grad_out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = batch, length, heads, _ = call.q.shape
    num_keys = call.k.shape[1]
    pitch, query_pitch = _pitch(num_keys), _pitch(length)
    dq, dk, dv = (_fresh(x.shape, x) for x in (call.q, call.k, call.v))
    sums = _table_sums(call, options.tiles)
    dots = _fresh(lse.shape, lse)
    small = Tile(32, 32, 4, 1)
    row_dots = _Launcher(
        *(row_dots_kernel, small, shape, _ceil_div(length, small.rows)),
        *(out, grad_out, dots, length),
    )
    row_dots(_Chunk(0, 0, batch, heads))
    key_spans = _key_spans(call.query_spans, num_keys)
    chunks, scratch = _cut(call, options.workspace_bytes, has_backward=True)
    fill_scratch = _fill_scratch(call, options, scratch)
    tile = options.tiles.score_gradients
    score_gradients = _Launcher(
        *(score_gradients_kernel, tile, shape, _ceil_div(num_keys, tile.rows)),
        *(call.q, call.k, call.v, scratch.c2p, scratch.p2c, scratch.keep),
        *(call.query_documents, call.documents, key_spans, call.positions),
        *(lse, dots, grad_out, dv, scratch.ds, scratch.ds_t),
        *(length, num_keys, pitch, query_pitch),
        *(options.scale * LOG2_E, _keep_scale(options.dropout_p)),
    )
    tile = _interleaved(options.tiles.state_gradients, num_keys)
    blocks = _row_blocks(length, tile, call.positions) + _row_blocks(num_keys, tile)
    state_gradients = _Launcher(
        *(state_gradients_kernel, tile, shape, blocks),
        *(call.q, call.k, call.key_table, call.query_table),
        *(scratch.ds, scratch.ds_t, scratch.skewed),
        *(call.query_spans, call.spans, key_spans, call.positions),
        *(dq, dk, length, num_keys, pitch, query_pitch, options.scale),
    )
    tile = _interleaved(options.tiles.table_gradients, num_keys)
    tables = _tables(call)
    table_gradients = _Launcher(
        *(table_gradients_kernel, tile, shape, len(tables) * _delta_blocks(num_keys, tile)),
        *(call.q, call.k, call.key_table, call.query_table, scratch.ds, scratch.skewed),
        *(call.positions, _reach_of(call.spans), sums),
        *(length, num_keys, pitch),
        shares=sums.shape[0],
        TABLES=len(tables),
    )
    for chunk in chunks:
        fill_scratch(chunk)
        score_gradients(chunk)
        if call.is_spread:
            _add_by_position(scratch, call.positions, chunk)
        state_gradients(chunk)
        table_gradients(chunk)
    return *(x.transpose(1, 2) for x in (dq, dk, dv)), *_sum_by_slot(sums, call, options.scale)


def _fill_scratch(call: _Call, options: _Options, scratch: _Scratch) -> "_Launcher":
    length, num_keys = call.q.shape[1], call.k.shape[1]
    tile = _interleaved(options.tiles.fill_scratch, num_keys)
    blocks = 0
    if scratch.c2p is not None:
        blocks += _row_blocks(length, tile, call.positions)
    if scratch.p2c is not None:
        blocks += _row_blocks(num_keys, tile)
    if scratch.keep is not None:
        blocks += _ceil_div(scratch.keep[0].numel(), KEEP_BLOCK)
    return _Launcher(
        *(fill_scratch_kernel, tile, call.q.shape, blocks),
        *(call.q, call.k, call.key_table, call.query_table),
        *(call.query_spans, call.spans, call.positions, call.seed),
        *(scratch.c2p, scratch.p2c, scratch.keep),
        *(length, num_keys, _pitch(num_keys), _words(num_keys)),
        _dropped_of_65536(options.dropout_p),
        BLOCK=KEEP_BLOCK,
    )


class _Launcher:
    """A kernel with those of its arguments that all chunks share.

    Triton reads every argument of a launch to find what it compiled for them, which takes longer
    than the launch. Chunks differ in nothing that it compiles for, so it does that for the first.

    Args:
        kernel: of which the last arguments are first_sample, first_head, batch, H, D, ROWS, COLUMNS
            and the flags.
        tile: its block.
        shape: [B, L, H, D].
        blocks: programs of a sample and head; 0: there is nothing to do.
        args: what comes before first_sample.
        shares: of the batch; None: a program for each sample.
        flags: what else is compiled in.
    """

    def __init__(
        self,
        kernel: Any,
        tile: Tile,
        shape: Sequence[int],
        blocks: int,
        *args: Any,
        shares: int | None = None,
        **flags: int,
    ) -> None:
        self._kernel = kernel
        self._options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        self._blocks = blocks
        self._args = args
        self._shares = shares
        self._constants = (*shape[2:], tile.rows, tile.columns, *flags.values())
        self._compiled = None

    def __call__(self, chunk: _Chunk) -> None:
        """Launch it for a chunk."""
        if not self._blocks:
            return
        grid = (self._blocks, self._shares or chunk.batch, chunk.heads)
        args = (*self._args, chunk.first_sample, chunk.first_head, chunk.batch, *self._constants)
        if self._compiled is None:  # and so it stays in Triton's interpreter
            self._compiled = self._kernel[grid](*args, **self._options)
        else:
            self._compiled[grid](*args)


def _cut(call: _Call, workspace_bytes: int, *, has_backward: bool) -> tuple[list[_Chunk], _Scratch]:
    """Cut the pairs into chunks, and make the scratch of the largest one."""
    batch, length, heads, _ = call.q.shape
    num_keys = call.k.shape[1]
    by_query, by_key = (length, _pitch(num_keys)), (num_keys, _pitch(num_keys))
    shapes = {}
    if call.key_table is not None:
        shapes["c2p"] = by_query
    if call.query_table is not None:
        shapes["p2c"] = by_key
    if call.seed is not None:
        shapes["keep"] = (length, _words(num_keys))
    if has_backward and call.key_table is None:
        shapes["ds"] = by_query
    if has_backward and (call.query_table is None or call.positions is not None):
        shapes["ds_t"] = (num_keys, _pitch(length))
    if has_backward and call.is_spread:
        shapes["skewed"] = by_key
    dtypes = dict.fromkeys(shapes, call.v.dtype) | {"keep": torch.int32}
    sizes = [math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()]
    chunks = list(_chunks(batch, heads, workspace_bytes, sum(sizes)))
    pairs = max(chunk.batch * chunk.heads for chunk in chunks)
    memory = {name: _fresh((pairs, *size), call.v, dtypes[name]) for name, size in shapes.items()}
    if has_backward:
        memory.setdefault("ds", memory.get("c2p"))
        memory.setdefault("ds_t", memory.get("p2c"))
        memory.setdefault("skewed", memory["ds_t"])
    return chunks, _Scratch(**memory)


def _chunks(batch: int, heads: int, workspace_bytes: int, pair_bytes: int) -> Iterator[_Chunk]:
    """Cut the pairs into even blocks: some heads of the whole batch, or some samples of a head."""
    pairs = max(1, workspace_bytes // max(1, pair_bytes))
    each_heads = _even_share(heads, pairs // batch)
    each_batch = _even_share(batch, pairs)
    for head in range(0, heads, each_heads):
        for sample in range(0, batch, each_batch):
            yield _Chunk(
                sample, head, min(each_batch, batch - sample), min(each_heads, heads - head)
            )


def _even_share(total: int, limit: int) -> int:
    return _ceil_div(total, _ceil_div(total, max(1, limit)))


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


def _tables(call: _Call) -> list[Tensor]:
    return [x for x in (call.key_table, call.query_table) if x is not None]


def _table_sums(call: _Call, tiles: Tiles) -> Tensor:
    """Zeros [S, U, T, H, D], for the gradients of T position tables in shares of the batch."""
    batch, _, heads, size = call.q.shape
    num_keys = call.k.shape[1]
    shares = max(
        1, TABLE_PROGRAMS // (STRIDE.value * _delta_blocks(num_keys, tiles.table_gradients))
    )
    shape = (STRIDE.value * min(batch, shares), 2 * num_keys - 1, len(_tables(call)), heads, size)
    return torch.zeros(shape, dtype=torch.float32, device=call.q.device)


def _delta_blocks(num_keys: int, tile: Tile) -> int:
    return _ceil_div(_pitch(num_keys) + num_keys, tile.columns)


def _interleaved(tile: Tile, rows: int) -> Tile:
    """As many rows, of those that are STRIDE apart, as there are."""
    wanted = 1 << (_ceil_div(rows, STRIDE.value) - 1).bit_length()
    return tile._replace(rows=min(tile.rows, max(16, wanted)))


def _row_blocks(rows: int, tile: Tile, positions: Tensor | None = None) -> int:
    """Tiles of all rows, STRIDE of which share STRIDE * tile.rows rows; see `_rows_of`."""
    stride = STRIDE.value if positions is None else 1
    return stride * _ceil_div(rows, stride * tile.rows)


def _reach_of(spans: Tensor) -> Tensor:
    """[B, 2, M] -> 0-d, the largest delta in a document."""
    return (spans[:, 1] - spans[:, 0]).amax()


def _sum_by_slot(sums: Tensor, call: _Call, scale: float) -> list[Tensor]:
    """[S, U, T, H, D] -> the gradients of both tables, [H, R, D]; an empty one for None."""
    by_row = sums.sum(0).mul_(scale)  # [U, T, H, D]
    if call.slots is not None:
        # The backward of an embedding sums the deltas of a slot fast and in a fixed order.
        by_row = torch.ops.aten.embedding_dense_backward(
            by_row.flatten(1), call.slots, call.num_slots, -1, False
        ).view(-1, *by_row.shape[1:])  # [R, T, H, D]
    # Each on its own memory: an operator's outputs must not share it.
    grads = (
        x.to(call.v.dtype, copy=True, memory_format=torch.contiguous_format).transpose(0, 1)
        for x in by_row.unbind(1)
    )
    return [
        call.v.new_empty(0) if table is None else next(grads)
        for table in (call.key_table, call.query_table)
    ]


def _add_by_position(scratch: _Scratch, query_positions: Tensor, chunk: _Chunk) -> None:
    """Write ds_t to skewed, adding queries of one place."""
    samples = slice(chunk.first_sample, chunk.first_sample + chunk.batch)
    columns = torch.arange(scratch.skewed.shape[-1], device=query_positions.device)
    one_hot = query_positions[samples, :, None] == columns  # [batch, L, C]
    ds_t, skewed = (
        x[: chunk.heads * chunk.batch].unflatten(0, (chunk.heads, chunk.batch))
        for x in (scratch.ds_t, scratch.skewed)
    )
    torch.matmul(ds_t[..., : one_hot.shape[1]], one_hot.to(ds_t.dtype), out=skewed)


def keep_mask(seed: Tensor, dropout_p: float, shape: Sequence[int]) -> Tensor:
    """Return which probabilities the dropout keeps, bool of `shape` [B, H, L, M]."""
    batch, heads, length, num_keys = shape
    words = _words(num_keys)
    keep = _fresh((heads, batch, length, words), seed, torch.int32)
    tile, sizes = Tile(32, 32, 8, 1), (batch, length, heads, HEAD_SIZES[0])
    _Launcher(
        *(fill_scratch_kernel, tile, sizes, _ceil_div(length * words, KEEP_BLOCK)),
        *(*[None] * 7, seed, None, None, keep, length, num_keys, _pitch(num_keys), words),
        _dropped_of_65536(dropout_p),
        BLOCK=KEEP_BLOCK,
    )(_Chunk(0, 0, batch, heads))
    bits = keep[..., None] >> torch.arange(32, device=keep.device, dtype=torch.int32) & 1
    return bits.bool().flatten(-2)[..., :num_keys].transpose(0, 1)


def _words(num_keys: int) -> int:
    """Words of a bit for each key."""
    return _ceil_div(num_keys, 32)


def _dropped_of_65536(dropout_p: float) -> int:
    return round(dropout_p * 65536)


def _keep_scale(dropout_p: float) -> float:
    kept = 65536 - _dropped_of_65536(dropout_p)
    return 65536 / kept if kept else 0.0


def _document_spans(documents: Tensor) -> Tensor:
    """[B, M] -> [B, 2, M], first and last position of the document of each position."""
    batch, num_keys = documents.shape
    spans = _fresh((batch, 2, num_keys), documents)
    grid = (_ceil_div(num_keys, 64), batch)
    document_spans_kernel[grid](documents, spans, num_keys, ROWS=64, COLUMNS=128)
    return spans


def _key_spans(query_spans: Tensor, num_keys: int) -> Tensor:
    """[B, 2, L] -> [B, 2, M], first and last query whose span covers each key."""
    batch, _, length = query_spans.shape
    spans = _fresh((batch, 2, num_keys), query_spans)
    grid = (_ceil_div(num_keys, 64), batch)
    key_spans_kernel[grid](query_spans, spans, length, num_keys, ROWS=64, COLUMNS=128)
    return spans


def _ceil_div(total: int, size: int) -> int:
    return -(-total // size)  # triton.cdiv takes 20 times as long


def _pitch(columns: int) -> int:
    """Numbers from row to row of scratch: rows start at multiples of 16, so loads are wide."""
    return _ceil_div(columns, 16) * 16


def _fresh(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory with anything in it."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


# ---- Kernels ----
# Arguments that compile into a kernel are in capitals, and so are pointers. No other annotation
# than tl.constexpr: a plain type would switch off the compiler's knowledge of 1 and of 16.
# A pointer may be None, which compiles its part away.

NOWHERE = tl.constexpr(1 << 30)  # first of an empty span; its last is -1


@triton.jit(do_not_specialize=["first_sample", "first_head", "batch"])
def fill_scratch_kernel(
    Q,  # [B, L, H, D]
    K,  # [B, M, H, D]
    KEY_TABLE,  # [U, H, D] or None
    QUERY_TABLE,  # [U, H, D] or None
    QUERY_SPANS,  # [B, 2, L]
    SPANS,  # [B, 2, M]
    POSITIONS,  # [B, L] or None
    SEED,  # [1] int64 or None
    C2P,  # [N, L, C] or None
    P2C,  # [N, M, C] or None; columns are positions of queries
    KEEP,  # [N, L, W] int32 or None, a bit for each key
    length,
    num_keys,
    pitch,
    words,
    dropped,
    first_sample,
    first_head,
    batch,
    H: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """First come the programs of c2p, then those of p2c, then those of the dropout."""
    sample, head, pair = _pair(first_sample, first_head, batch)
    block = tl.program_id(0)
    if C2P is not None:
        blocks = _row_blocks_of(length, POSITIONS, ROWS)
        if block < blocks:
            i, start, base = _rows_of(block, POSITIONS, sample, length, ROWS)
            first, last = _spans(QUERY_SPANS, sample, i, length)
            is_row = (i < length)[:, None]
            q = tl.load(_rows(Q, sample * length, head, i, H, D), mask=is_row, other=0.0)
            at = C2P + pair * length * pitch + i[:, None] * pitch
            _store_skewed(
                at, q, KEY_TABLE, is_row, start, base, first, last, pitch, head, num_keys, H,
                COLUMNS, 1
            )  # fmt: skip
        block -= blocks
    if P2C is not None:
        blocks = _row_blocks_of(num_keys, None, ROWS)
        if (block >= 0) & (block < blocks):
            j, start, base = _rows_of(block, None, sample, num_keys, ROWS)
            first, last = _spans(SPANS, sample, j, num_keys)
            is_row = (j < num_keys)[:, None]
            k = tl.load(_rows(K, sample * num_keys, head, j, H, D), mask=is_row, other=0.0)
            at = P2C + pair * num_keys * pitch + j[:, None] * pitch
            _store_skewed(
                at, k, QUERY_TABLE, is_row, start, base, first, last, pitch, head, num_keys, H,
                COLUMNS, -1
            )  # fmt: skip
        block -= blocks
    if KEEP is not None:  # noqa: SIM102 (decided by the compiler, the other at run time)
        if block >= 0:
            index = block * BLOCK + tl.arange(0, BLOCK)
            word = _draw_words(SEED, sample * H + head, index, words, dropped)
            tl.store(KEEP + pair * length * words + index, word, mask=index < length * words)


@triton.jit
def _store_skewed(
    AT,  # [ROWS, 1], first columns of the rows
    states,  # [ROWS, D]
    TABLE,  # [U, H, D]
    is_row,  # [ROWS, 1]
    start,  # [ROWS], of `_rows_of`
    base,
    first,  # [ROWS]
    last,  # [ROWS]
    pitch,
    head,
    num_keys,
    H: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIGN: tl.constexpr,
):
    """scores[i, i + e] = states_i . table[delta], delta = -e for queries and e for keys."""
    u_first, u_last = _reach(first, last, start)
    for u_start in range((u_first >> 4) * 16, u_last + 1, COLUMNS):
        u = u_start + tl.arange(0, COLUMNS)
        table = _load_table(TABLE, head, u - base, num_keys, H, states.shape[1], SIGN)
        product = tl.dot(states, tl.trans(table), input_precision="ieee")  # [ROWS, COLUMNS]
        column = start[:, None] + u[None, :]
        mask = is_row & (column >= 0) & (column < pitch)
        tl.store(AT + column, product.to(states.dtype), mask=mask)


@triton.jit
def _draw_words(SEED, stream, index, words, dropped):
    """Draw the words at an index of a pair: bits keep what draws `dropped` or more out of 65536.

    8 draws from a call of Philox, whose counter names the place (sample and head, row, columns):
    so chunks make no difference.
    """
    zero = index * 0
    word = zero
    for group in tl.static_range(4):
        draws = tl.philox(
            tl.load(SEED), index % words * 4 + group, index // words, zero + stream, zero
        )
        for number in tl.static_range(4):
            low = (draws[number] & 0xFFFF).to(tl.int32)
            high = (draws[number] >> 16).to(tl.int32)
            word |= (low >= dropped).to(tl.int32) << (8 * group + 2 * number)
            word |= (high >= dropped).to(tl.int32) << (8 * group + 2 * number + 1)
    return word


@triton.jit(do_not_specialize=["first_sample", "first_head", "batch"])
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
    batch,
    H: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Owns a block of queries, walks along the keys: an online softmax."""
    sample, head, pair = _pair(first_sample, first_head, batch)
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
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * score_scale  # [ROWS, COLUMNS]
        # Each term times the scale: an addition to the bare product would become a part of it,
        # which loads nothing ahead of time.
        if C2P is not None:
            at = C2P + pair * length * pitch + (i[:, None] * pitch + j[None, :])
            c2p = tl.load(at, mask=is_row[:, None] & (j < pitch)[None, :], other=0.0)
            scores += c2p.to(tl.float32) * score_scale
        if P2C is not None:
            at = P2C + pair * num_keys * pitch + (j[:, None] * pitch + position[None, :])
            p2c = tl.load(at, mask=is_key[:, None] & (position < pitch)[None, :], other=0.0)
            scores += tl.trans(p2c).to(tl.float32) * score_scale
        key_document = tl.load(DOCUMENTS + sample * num_keys + j, mask=is_key, other=0)
        # Scratch outside the documents was never written: selected away here, whatever it holds.
        same = (document[:, None] == key_document[None, :]) & (document[:, None] != 0)
        scores = tl.where(same, scores, float("-inf"))
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


@triton.jit(do_not_specialize=["first_sample", "first_head", "batch"])
def row_dots_kernel(
    OUT,  # [B, L, H, D]
    GRAD_OUT,  # [B, L, H, D]
    DOTS,  # [B, H, L]
    length,
    first_sample,
    first_head,
    batch,
    H: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Out . grad_out of each row: what the softmax takes off the gradient of each of its scores."""
    sample, head, _ = _pair(first_sample, first_head, batch)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = i[:, None] < length
    out = tl.load(_rows(OUT, sample * length, head, i, H, D), mask=mask, other=0.0)
    grad = tl.load(_rows(GRAD_OUT, sample * length, head, i, H, D), mask=mask, other=0.0)
    dots = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(DOTS + (sample * H + head) * length + i, dots, mask=i < length)


@triton.jit(do_not_specialize=["first_sample", "first_head", "batch"])
def score_gradients_kernel(
    Q,  # [B, L, H, D]
    K,  # [B, M, H, D]
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
    batch,
    H: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Owns a block of keys, walks along the queries; tiles are [keys, queries].

    DS may be C2P, and DS_T may be P2C: a tile is read before it is written, and by nobody else.
    All of it is written, for its readers ask for no documents: zeros where nothing attends.
    It leaves out the factor `scale`: large enough for fp16 as it is.
    """
    sample, head, pair = _pair(first_sample, first_head, batch)
    j = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_key = j < num_keys
    document = tl.load(DOCUMENTS + sample * num_keys + j, mask=is_key, other=0)
    first, last = _spans(KEY_SPANS, sample, j, num_keys)
    k = tl.load(_rows(K, sample * num_keys, head, j, H, D), mask=is_key[:, None], other=0.0)
    v = tl.load(_rows(V, sample * num_keys, head, j, H, D), mask=is_key[:, None], other=0.0)
    dv = tl.zeros([ROWS, D], tl.float32)
    begin, end = tl.min(first) // COLUMNS, tl.max(last) // COLUMNS + 1
    for block in range(begin, end):
        i = block * COLUMNS + tl.arange(0, COLUMNS)
        is_row = i < length
        position = _positions(POSITIONS, sample, i, length)
        q = tl.load(_rows(Q, sample * length, head, i, H, D), mask=is_row[:, None], other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee") * score_scale  # [ROWS, COLUMNS]
        if P2C is not None:
            at = P2C + pair * num_keys * pitch + (j[:, None] * pitch + position[None, :])
            p2c = tl.load(at, mask=is_key[:, None] & (position < pitch)[None, :], other=0.0)
            scores += p2c.to(tl.float32) * score_scale
        if C2P is not None:
            at = C2P + pair * length * pitch + (i[:, None] * pitch + j[None, :])
            c2p = tl.load(at, mask=is_row[:, None] & (j < pitch)[None, :], other=0.0)
            scores += tl.trans(c2p).to(tl.float32) * score_scale
        at_row = (sample * H + head) * length + i
        lse = tl.load(LSE + at_row, mask=is_row, other=0.0)
        dots = tl.load(DOTS + at_row, mask=is_row, other=0.0)
        query_document = tl.load(QUERY_DOCUMENTS + sample * length + i, mask=is_row, other=0)
        same = (document[:, None] == query_document[None, :]) & (document[:, None] != 0)
        probs = tl.where(same, tl.math.exp2(scores - lse[None, :]), 0.0)
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
    zeros = tl.zeros([ROWS, COLUMNS], DS.dtype.element_ty)
    for block in range(tl.cdiv(query_pitch, COLUMNS)):
        if (block < begin) | (block >= end):
            i = block * COLUMNS + tl.arange(0, COLUMNS)
            at = DS_T + pair * num_keys * query_pitch + (j[:, None] * query_pitch + i[None, :])
            tl.store(at, zeros, mask=is_key[:, None] & (i < query_pitch)[None, :])
            at = DS + pair * length * pitch + (i[:, None] * pitch + j[None, :])
            tl.store(at, tl.trans(zeros), mask=(i < length)[:, None] & (j < pitch)[None, :])
    at_dv = _rows(DV, sample * num_keys, head, j, H, D)
    tl.store(at_dv, (dv * keep_scale).to(DV.dtype.element_ty), mask=is_key[:, None])


@triton.jit(do_not_specialize=["first_sample", "first_head", "batch"])
def state_gradients_kernel(
    Q,  # [B, L, H, D]
    K,  # [B, M, H, D]
    KEY_TABLE,  # [U, H, D] or None
    QUERY_TABLE,  # [U, H, D] or None
    DS,  # [N, L, C]
    DS_T,  # [N, M, columns of queries]
    SKEWED,  # [N, M, C]; its columns are positions of queries
    QUERY_SPANS,  # [B, 2, L]
    SPANS,  # [B, 2, M]
    KEY_SPANS,  # [B, 2, M], of columns of DS_T
    POSITIONS,  # [B, L] or None
    DQ,  # [B, L, H, D]
    DK,  # [B, M, H, D]
    length,
    num_keys,
    pitch,
    query_pitch,
    scale,
    first_sample,
    first_head,
    batch,
    H: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """First come the programs of dq, then those of dk.

    dq_i = scale * (sum_j ds[i, j] k_j + sum_e ds[i, i + e] key_table[delta]), and dk_j likewise.
    """
    sample, head, pair = _pair(first_sample, first_head, batch)
    block = tl.program_id(0)
    blocks = _row_blocks_of(length, POSITIONS, ROWS)
    if block < blocks:
        i, start, base = _rows_of(block, POSITIONS, sample, length, ROWS)
        is_row = (i < length)[:, None]
        first, last = _spans(QUERY_SPANS, sample, i, length)
        ds = DS + pair * length * pitch + i[:, None] * pitch
        others = sample * num_keys
        dq = _times_states(ds, is_row, K, first, last, others, num_keys, pitch, head, H, D, COLUMNS)
        if KEY_TABLE is not None:
            dq = _add_skewed(
                dq, ds, KEY_TABLE, is_row, start, base, first, last, pitch, head, num_keys, H,
                COLUMNS, 1
            )  # fmt: skip
        at = _rows(DQ, sample * length, head, i, H, D)
        tl.store(at, (dq * scale).to(DQ.dtype.element_ty), mask=is_row)
    else:
        j, start, base = _rows_of(block - blocks, None, sample, num_keys, ROWS)
        is_key = (j < num_keys)[:, None]
        first, last = _spans(KEY_SPANS, sample, j, num_keys)
        ds = DS_T + pair * num_keys * query_pitch + j[:, None] * query_pitch
        others = sample * length
        dk = _times_states(
            ds, is_key, Q, first, last, others, length, query_pitch, head, H, D, COLUMNS
        )
        if QUERY_TABLE is not None:
            first, last = _spans(SPANS, sample, j, num_keys)
            ds = SKEWED + pair * num_keys * pitch + j[:, None] * pitch
            dk = _add_skewed(
                dk, ds, QUERY_TABLE, is_key, start, base, first, last, pitch, head, num_keys, H,
                COLUMNS, -1
            )  # fmt: skip
        at = _rows(DK, sample * num_keys, head, j, H, D)
        tl.store(at, (dk * scale).to(DK.dtype.element_ty), mask=is_key)


@triton.jit
def _times_states(
    DS,  # [ROWS, 1], first columns of the rows
    is_row,  # [ROWS, 1]
    STATES,  # [B, columns, H, D]
    first,  # [ROWS]
    last,  # [ROWS]
    start,
    columns,
    pitch,
    head,
    H: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sum of ds[i, j] states_j over the span of each row: [ROWS, D]."""
    total = tl.zeros([DS.shape[0], D], tl.float32)
    for block in range(tl.min(first) // COLUMNS, tl.max(last) // COLUMNS + 1):
        j = block * COLUMNS + tl.arange(0, COLUMNS)
        ds = tl.load(DS + j[None, :], mask=is_row & (j < pitch)[None, :], other=0.0)
        at = _rows(STATES, start, head, j, H, D)
        states = tl.load(at, mask=j[:, None] < columns, other=0.0)
        total += tl.dot(ds, states, input_precision="ieee")
    return total


@triton.jit
def _add_skewed(
    total,  # [ROWS, D]
    DS,  # [ROWS, 1], first columns of the rows
    TABLE,  # [U, H, D]
    is_row,  # [ROWS, 1]
    start,  # [ROWS], of `_rows_of`
    base,
    first,  # [ROWS]
    last,  # [ROWS]
    pitch,
    head,
    num_keys,
    H: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIGN: tl.constexpr,
):
    """Add the sum of ds[i, i + e] table[delta] over the span of each row."""
    u_first, u_last = _reach(first, last, start)
    for u_start in range((u_first >> 4) * 16, u_last + 1, COLUMNS):
        u = u_start + tl.arange(0, COLUMNS)
        column = start[:, None] + u[None, :]
        ds = tl.load(DS + column, mask=is_row & (column >= 0) & (column < pitch), other=0.0)
        table = _load_table(TABLE, head, u - base, num_keys, H, total.shape[1], SIGN)
        total += tl.dot(ds, table, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["first_sample", "first_head", "batch"])
def table_gradients_kernel(
    Q,  # [B, L, H, D]
    K,  # [B, M, H, D]
    KEY_TABLE,  # [U, H, D] or None
    QUERY_TABLE,  # [U, H, D] or None
    DS,  # [N, L, C]
    SKEWED,  # [N, M, C]; its columns are positions of queries
    POSITIONS,  # [B, L] or None
    REACH,  # 0-d
    SUMS,  # [S, U, T, H, D] float32, of T tables
    length,
    num_keys,
    pitch,
    first_sample,
    first_head,
    batch,
    H: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TABLES: tl.constexpr,
):
    """First come the programs of the table of keys, then those of the table of queries.

    A program owns some deltas, of the even or the odd rows (STRIDE) of a share of the batch. Sample
    b is always in the share b modulo their number, and sums are carried on from chunk to chunk: the
    result does not depend on the chunks.
    """
    head = first_head + tl.program_id(2)
    block = tl.program_id(0)
    blocks = tl.cdiv(pitch + num_keys, COLUMNS)
    if KEY_TABLE is not None:
        if block < blocks:
            _add_to_table(
                SUMS, Q, DS, POSITIONS, REACH, block, head, head, length, num_keys,
                pitch, first_sample, batch, H, D, ROWS, COLUMNS, 1, TABLES
            )  # fmt: skip
        block -= blocks
    if QUERY_TABLE is not None:  # noqa: SIM102
        if block >= 0:
            last_head = (TABLES - 1) * H + head
            _add_to_table(
                SUMS, K, SKEWED, None, REACH, block, head, last_head, num_keys, num_keys,
                pitch, first_sample, batch, H, D, ROWS, COLUMNS, -1, TABLES
            )  # fmt: skip


@triton.jit
def _add_to_table(
    SUMS,  # [S, U, T * H, D] float32
    STATES,  # [B, L, H, D]
    DS,  # [N, L, C]; its columns are positions
    POSITIONS,  # [B, L] or None
    REACH,  # 0-d
    block,
    head,
    table_head,
    length,
    num_keys,
    pitch,
    first_sample,
    batch,
    H: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIGN: tl.constexpr,
    TABLES: tl.constexpr,
):
    """sums[share, delta] += sum over the samples of a share and over i of ds[i, i + e] states_i."""
    share = tl.program_id(1) // STRIDE
    shares = tl.num_programs(1) // STRIDE
    base = tl.program_id(1) % STRIDE  # the first row
    u = block * COLUMNS - pitch
    e_first = u
    if POSITIONS is None:  # even columns of odd rows, too, and no delta less
        u += STRIDE * base
        e_first = u - base
    u += tl.arange(0, COLUMNS)
    e_last = e_first + COLUMNS - 1
    e = e_first + tl.arange(0, COLUMNS)
    row = num_keys - 1 - SIGN * e
    at_sums = tl.program_id(1) * (2 * num_keys - 1)
    at_sums = _rows(SUMS, at_sums, table_head, row, TABLES * H, D)
    is_delta = ((e < num_keys) & (e > -num_keys))[:, None]
    sums = tl.load(at_sums, mask=is_delta, other=0.0)
    begin, end = 0, length
    if POSITIONS is None:
        begin, end = tl.maximum(0, -e_last), tl.minimum(length, num_keys - e_first)
    reach = tl.load(REACH)
    end = tl.where((e_first > reach) | (e_last < -reach), begin, end)
    begin = begin // (ROWS * STRIDE)
    tiles = tl.maximum(tl.cdiv(end, ROWS * STRIDE) - begin, 0)
    first_offset = (share + shares - first_sample % shares) % shares
    # One loop over samples and rows, so that it fetches the next sample's ahead of time as well.
    for step in range(tl.cdiv(batch - first_offset, shares) * tiles):
        offset = first_offset + step // tiles * shares
        sample = first_sample + offset
        pair = (tl.program_id(2) * batch + offset).to(tl.int64)
        start = ((begin + step % tiles) * ROWS + tl.arange(0, ROWS)) * STRIDE
        i = start + base
        if POSITIONS is not None:
            start = _positions(POSITIONS, sample, i, length)
        is_row = (i < length)[:, None]
        column = start[:, None] + u[None, :]
        at = DS + pair * length * pitch + (i[:, None] * pitch + column)
        ds = tl.load(at, mask=is_row & (column >= 0) & (column < pitch), other=0.0)
        at = _rows(STATES, sample * length, head, i, H, D)
        states = tl.load(at, mask=is_row, other=0.0)
        sums += tl.dot(tl.trans(ds), states, input_precision="ieee")
    tl.store(at_sums, sums, mask=is_delta)


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
def _pair(first_sample, first_head, batch):
    """Return sample, head, and the number of their pair in the chunk."""
    pair = tl.program_id(2) * batch + tl.program_id(1)
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
def _row_blocks_of(rows, POSITIONS, ROWS: tl.constexpr):
    if POSITIONS is not None:
        return tl.cdiv(rows, ROWS)
    return tl.cdiv(rows, ROWS * STRIDE) * STRIDE


@triton.jit
def _rows_of(block, POSITIONS, sample, length, ROWS: tl.constexpr):
    """Return the rows of a tile, and [ROWS] start and base, which add up to their positions.

    Rows that sit at their own positions are STRIDE apart, which then divides start.
    """
    if POSITIONS is not None:
        i = block * ROWS + tl.arange(0, ROWS)
        return i, _positions(POSITIONS, sample, i, length), 0
    base = block // STRIDE * (ROWS * STRIDE) + block % STRIDE
    start = tl.arange(0, ROWS) * STRIDE
    return base + start, start, base


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
