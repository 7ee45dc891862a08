"""The DeBERTa encoder: embeddings, post-LN layers, relative embeddings.

Attribute names are those of the public checkpoints. Every weight is reached by calling the module
that owns it, so that ZeRO-3 gathers it in time.

Shapes: B batch, L length, P predicted positions, E hidden size, R relative rows in use.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_deberta.kernels import AttentionFn, Dropout, disentangled_attention
from ds_deberta.model.attention import DisentangledSelfAttention
from ds_deberta.model.compiler import compile_layer
from ds_deberta.model.config import ACTIVATIONS, DebertaConfig
from ds_deberta.model.documents import document_starts, is_token
from ds_deberta.model.relative import slot, slot_table

EmbeddingSharing = Literal["gdes", "es", "nes"]

DECODER_PASSES = 2
"""Times that the enhanced mask decoder applies the last layer."""


class DebertaModel(nn.Module):
    """Embeddings and encoder.

    Args:
        config: The architecture.
        attend: The attention function.
        embedding_sharing: Where the input embeddings come from: `nes`: own tables; `es`: the
            generator's; `gdes`: the generator's plus own differences, which start at zero.
        has_position_table: Own absolute positions even where the input does not use them.
    """

    def __init__(
        self,
        config: DebertaConfig,
        attend: AttentionFn = disentangled_attention,
        *,
        embedding_sharing: EmbeddingSharing = "nes",
        has_position_table: bool = False,
    ):
        super().__init__()
        self.embeddings = Embeddings(config, embedding_sharing, has_position_table)
        self.encoder = Encoder(config, attend)
        self.position_biased_input = config.position_biased_input
        initialize(self, config)

    def forward(
        self,
        input_ids: Tensor,  # [B, L]
        attention_mask: Tensor,  # [B, L]
        base_embeddings: Tensor | None = None,  # [B, L, E]
        word_rows: Tensor | None = None,  # [B, L, E]
        predicted_positions: Tensor | None = None,  # [B, P]
    ) -> Tensor:  # [B, L, E], or [B, P, E]
        """Encode a batch.

        Args:
            input_ids: Token ids.
            attention_mask: True where a real token is; or the number of its document, 0 for
                padding. Documents of a row do not see each other.
            base_embeddings: The generator's `Embeddings.lookup` of these ids; for `gdes` and `es`.
            word_rows: The word embeddings of these ids, if they have been looked up.
            predicted_positions: Return the states that predict the tokens here, and only those.
                Needs the position table.
        """
        hidden = self.embeddings(input_ids, attention_mask, base_embeddings, word_rows)
        if predicted_positions is None:
            return self.encoder(hidden, attention_mask)
        position_states = None
        if not self.position_biased_input:
            starts = document_starts(attention_mask)
            own = predicted_positions
            if starts is not None:
                own = own - starts.gather(1, own)
            position_states = self.embeddings.position_embeddings(own)
        return self.encoder(hidden, attention_mask, predicted_positions, position_states)


class Embeddings(nn.Module):
    """Word (and position) embeddings, LayerNorm, mask, dropout."""

    def __init__(
        self, config: DebertaConfig, embedding_sharing: EmbeddingSharing, has_position_table: bool
    ):
        super().__init__()
        self.embedding_sharing = embedding_sharing
        self.position_biased_input = config.position_biased_input
        table = DeltaEmbedding if embedding_sharing == "gdes" else nn.Embedding
        size = config.hidden_size
        if embedding_sharing != "es":
            self.word_embeddings = table(config.vocab_size, size, padding_idx=config.pad_token_id)
            if has_position_table or config.position_biased_input:
                self.position_embeddings = table(config.max_position_embeddings, size)
        self.LayerNorm = nn.LayerNorm(size, config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def lookup(
        self, input_ids: Tensor, attention_mask: Tensor, word_rows: Tensor | None = None
    ) -> Tensor:
        """Return [B, L, E], the sum of the tables that feed the input."""
        embedded = self.word_embeddings(input_ids) if word_rows is None else word_rows
        if self.position_biased_input:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)
            starts = document_starts(attention_mask)
            if starts is not None:
                positions = positions - starts
            embedded = embedded + self.position_embeddings(positions)
        return embedded

    def forward(
        self,
        input_ids: Tensor,  # [B, L]
        attention_mask: Tensor,  # [B, L]
        base_embeddings: Tensor | None = None,  # [B, L, E]
        word_rows: Tensor | None = None,  # [B, L, E]
    ) -> Tensor:  # [B, L, E]
        """Embed a batch; padding gives zeros."""
        if (base_embeddings is None) != (self.embedding_sharing == "nes"):
            raise ValueError(
                "base_embeddings must be given for embedding_sharing gdes and es, and only then; "
                f"got {'none' if base_embeddings is None else 'some'} for {self.embedding_sharing}"
            )
        if base_embeddings is None:
            embedded = self.lookup(input_ids, attention_mask, word_rows)
        elif self.embedding_sharing == "gdes":
            embedded = base_embeddings + self.lookup(input_ids, attention_mask)
        else:
            embedded = base_embeddings
        return self.dropout(self.LayerNorm(embedded) * is_token(attention_mask)[..., None])


class DeltaEmbedding(nn.Module):
    """Differences to the generator's table, zero at first; under the public name `_weight`."""

    def __init__(self, num_embeddings: int, size: int, padding_idx: int | None = None):
        super().__init__()
        self._weight = nn.Parameter(torch.zeros(num_embeddings, size))
        self.padding_idx = padding_idx
        self.sparse = False

    def forward(self, ids: Tensor) -> Tensor:
        """Look up rows."""
        return F.embedding(ids, self._weight, self.padding_idx, sparse=self.sparse)


class Encoder(nn.Module):
    """A stack of layers that share one table of relative embeddings."""

    slots: Tensor  # [2 * max_position_embeddings - 1]

    def __init__(self, config: DebertaConfig, attend: AttentionFn):
        super().__init__()
        self.config = config
        self.layer = nn.ModuleList(Layer(config, attend) for _ in range(config.num_hidden_layers))
        if config.relative_attention:
            self.rel_embeddings = nn.Embedding(2 * config.position_span, config.hidden_size)
            slots = slot_table(config, config.max_position_embeddings)
            self.register_buffer("slots", slots, persistent=False)
        if config.norm_rel_ebd == "layer_norm":
            self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.conv = ConvLayer(config) if config.conv_kernel_size > 0 else None
        self.checkpoint_activations = False

    def forward(
        self,
        hidden: Tensor,  # [B, L, E]
        attention_mask: Tensor,  # [B, L]
        query_positions: Tensor | None = None,  # [B, P]
        position_states: Tensor | None = None,  # [B, P, E]
    ) -> Tensor:  # [B, L, E], or [B, P, E]
        """Run all layers.

        Args:
            hidden: The embedded input.
            attention_mask: True where a real token is, or the number of its document.
            query_positions: Run the last layer for these positions only. Its keys and values come
                from the whole row, so what comes out is exact.
            position_states: Embeddings of these positions. They make the last layer the enhanced
                mask decoder: it starts from their sum with the hidden states and runs twice.
        """
        relative, slots = self._relative(hidden.shape[1])
        layers = [self._checkpointed(layer) for layer in self.layer]
        embedded = hidden
        for number, layer in enumerate(layers if query_positions is None else layers[:-1]):
            hidden = layer(hidden, attention_mask, relative, slots)
            if number == 0 and self.conv is not None:
                hidden = self.conv(embedded, hidden)
        if query_positions is None:
            return hidden
        rows = query_positions[..., None].expand(-1, -1, hidden.shape[-1])
        states = hidden.gather(1, rows)  # [B, P, E]
        if position_states is not None:
            states = position_states + states
        for _ in range(1 if position_states is None else DECODER_PASSES):
            states = layers[-1](hidden, attention_mask, relative, slots, states, query_positions)
        return states

    def compile_layers(self) -> None:
        """Compile each layer at its first call; those of one shape share the result."""
        for layer in self.layer:
            compile_layer(layer)

    def _checkpointed(self, layer: nn.Module) -> Callable[..., Tensor]:
        """Return the layer, with activations made again in the backward pass where asked for."""
        if not (self.checkpoint_activations and torch.is_grad_enabled()):
            return layer
        return partial(checkpoint, layer, use_reentrant=False)

    def _relative(self, length: int) -> tuple[Tensor | None, Tensor | None]:
        """Return the relative embeddings in use at this length, and which row each delta uses.

        These rows lie side by side; a short sequence uses few, and no layer projects the others.
        Where each delta has a row of its own, they are in the order of delta: None.
        """
        config = self.config
        limit = config.max_position_embeddings
        if length > limit:
            raise ValueError(
                f"a sequence must fit max_position_embeddings {limit}; got {length}. Shorten it."
            )
        if not config.pos_att_type:
            return None, None
        first, last = slot(config, 1 - length), slot(config, length - 1)
        relative = self.rel_embeddings(torch.arange(first, last + 1, device=self.slots.device))
        if config.norm_rel_ebd == "layer_norm":
            relative = self.LayerNorm(relative)
        if last - first == 2 * (length - 1):
            return relative, None
        return relative, self.slots[limit - length : limit + length - 1] - first


class Layer(nn.Module):
    """Attention and feed-forward, each with a residual and a LayerNorm after it."""

    def __init__(self, config: DebertaConfig, attend: AttentionFn):
        super().__init__()
        self.attention = Attention(config, attend)
        self.intermediate = Intermediate(config)
        self.output = Output(config, config.intermediate_size_or_default)

    def forward(
        self,
        hidden: Tensor,  # [B, L, E]
        documents: Tensor,  # [B, L]
        relative: Tensor | None,  # [R, E]
        slots: Tensor | None,  # [2 * L - 1]
        query_states: Tensor | None = None,  # [B, P, E]
        query_positions: Tensor | None = None,  # [B, P]
    ) -> Tensor:  # [B, L or P, E]
        """Run the layer; with `query_states`, these attend to `hidden` and carry the residual."""
        attended = self.attention(hidden, documents, relative, slots, query_states, query_positions)
        return self.output(self.intermediate(attended), attended)


class Attention(nn.Module):
    """Self-attention and its output projection."""

    def __init__(self, config: DebertaConfig, attend: AttentionFn):
        super().__init__()
        self.self = DisentangledSelfAttention(config, attend)
        self.output = Output(config, config.hidden_size)

    def forward(
        self,
        hidden: Tensor,  # [B, L, E]
        documents: Tensor,  # [B, L]
        relative: Tensor | None,  # [R, E]
        slots: Tensor | None,  # [2 * L - 1]
        query_states: Tensor | None = None,  # [B, P, E]
        query_positions: Tensor | None = None,  # [B, P]
    ) -> Tensor:  # [B, L or P, E]
        """Attend and add to the states that asked."""
        context = self.self(hidden, documents, relative, slots, query_states, query_positions)
        return self.output(context, hidden if query_states is None else query_states)


class Intermediate(nn.Module):
    """First half of the feed-forward."""

    def __init__(self, config: DebertaConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size_or_default)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        """Widen and activate."""
        return self.activation(self.dense(hidden))


class Output(nn.Module):
    """Projection, dropout, residual, LayerNorm: the end of a block."""

    def __init__(self, config: DebertaConfig, input_size: int):
        super().__init__()
        self.dense = nn.Linear(input_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, states: Tensor, residual: Tensor) -> Tensor:
        """Project and add."""
        return self.LayerNorm(self.dropout(self.dense(states)) + residual)


class ConvLayer(nn.Module):
    """A convolution of the embeddings, added after the first layer (v2 xlarge and xxlarge)."""

    def __init__(self, config: DebertaConfig):
        super().__init__()
        size, width = config.hidden_size, config.conv_kernel_size
        self.conv = nn.Conv1d(size, size, width, padding=width // 2, groups=config.conv_groups)
        self.LayerNorm = nn.LayerNorm(size, config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.activation = ACTIVATIONS[config.conv_act]

    def forward(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """Add the convolution of `embedded` to `hidden`, both [B, L, E].

        Padding, where `embedded` is zero, reaches no token through it. The original masks the
        result as well, which changes nothing but padding.
        """
        convolved = self.conv(embedded.transpose(1, 2)).transpose(1, 2)
        return self.LayerNorm(hidden + self.activation(self.dropout(convolved)))


def initialize(module: nn.Module, config: DebertaConfig) -> None:
    """Draw Linear and Embedding weights, zero Linear biases; leave the rest as torch makes it.

    As the original: the padding row of the word embeddings is drawn like every other row.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=config.initializer_range)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
