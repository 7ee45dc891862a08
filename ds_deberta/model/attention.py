"""Disentangled self-attention: the projections around an attention function.

Shapes: B batch, L length, P query positions, H heads, D head size, E hidden size, R relative rows.
"""

import math

from torch import Tensor, nn

from ds_deberta.kernels import AttentionFn, Dropout
from ds_deberta.model.config import DebertaConfig


class DisentangledSelfAttention(nn.Module):
    """Project content and relative positions, attend, join the heads."""

    def __init__(self, config: DebertaConfig, attend: AttentionFn):
        super().__init__()
        size = config.hidden_size
        self.query_proj = nn.Linear(size, size)
        self.key_proj = nn.Linear(size, size)
        self.value_proj = nn.Linear(size, size)
        self.has_c2p = "c2p" in config.pos_att_type
        self.has_p2c = "p2c" in config.pos_att_type
        self.share_att_key = config.share_att_key
        if self.has_c2p and not self.share_att_key:
            self.pos_key_proj = nn.Linear(size, size)
        if self.has_p2c and not self.share_att_key:
            self.pos_query_proj = nn.Linear(size, size)
        self.pos_dropout = Dropout(config.hidden_dropout_prob)
        self.dropout_prob = config.attention_probs_dropout_prob
        self.head_size = config.head_size
        self.scale = 1.0 / math.sqrt(self.head_size * (1 + len(config.pos_att_type)))
        self.attend = attend

    def forward(
        self,
        hidden: Tensor,  # [B, L, E]
        documents: Tensor,  # [B, L]
        relative: Tensor | None,  # [R, E]
        slots: Tensor | None,  # [2 * L - 1]
        query_states: Tensor | None = None,  # [B, P, E]
        query_positions: Tensor | None = None,  # [B, P]
    ) -> Tensor:  # [B, L or P, E]
        """Attend from `query_states` (from `hidden` where there are none) to `hidden`."""
        pos_key, pos_query = self._position_tables(relative)
        context = self.attend(
            self._split(self.query_proj(hidden if query_states is None else query_states)),
            self._split(self.key_proj(hidden)),
            self._split(self.value_proj(hidden)),
            pos_key,
            pos_query,
            slots=slots,
            documents=documents,
            query_positions=query_positions,
            scale=self.scale,
            dropout_p=self.dropout_prob if self.training else 0.0,
        )  # [B, H, L or P, D]
        return context.transpose(1, 2).flatten(2)

    def _position_tables(self, relative: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Project relative embeddings [R, E] to keys and queries [H, R, D]; biases included."""
        if relative is None:
            return None, None
        relative = self.pos_dropout(relative)
        pos_key = pos_query = None
        if self.has_c2p:
            pos_key = self._split(
                (self.key_proj if self.share_att_key else self.pos_key_proj)(relative)
            )
        if self.has_p2c:
            pos_query = self._split(
                (self.query_proj if self.share_att_key else self.pos_query_proj)(relative)
            )
        return pos_key, pos_query

    def _split(self, states: Tensor) -> Tensor:
        """[..., L, E] -> [..., H, L, D]."""
        return states.unflatten(-1, (-1, self.head_size)).transpose(-2, -3)
