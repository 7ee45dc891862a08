"""Rows that hold several documents: which positions are tokens, and where each document starts.

A mask is bool, True where a real token is; then a row is one document. Or it is integer: the
number of each token's document, 0 for padding, and the documents of a row lie one after the other.

Shapes: B batch, L length, E hidden size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_deberta.kernels.reference import at_least_fp32


def is_token(attention_mask: Tensor) -> Tensor:
    """Return the bool mask of real tokens, [B, L]: a bool mask itself."""
    return attention_mask if attention_mask.dtype == torch.bool else attention_mask != 0


def document_starts(attention_mask: Tensor) -> Tensor | None:
    """Return for each position where its document starts, [B, L]; None for a bool mask: at 0."""
    if attention_mask.dtype == torch.bool:
        return None
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    before = F.pad(attention_mask, (1, 0))[:, :-1]
    return torch.where(attention_mask != before, positions, 0).cummax(1).values


def first_states(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the state at the start of each position's document, [B, L, E] or [B, 1, E]."""
    starts = document_starts(attention_mask)
    if starts is None:
        return hidden[:, :1]
    rows, length, _ = hidden.shape
    starts = starts + length * torch.arange(rows, device=starts.device)[:, None]
    # An embedding in fp32: its backward sums a whole document into one row, in a fixed order.
    return F.embedding(starts, at_least_fp32(hidden).flatten(0, 1)).to(hidden.dtype)
