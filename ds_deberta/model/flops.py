"""Floating-point operations per row, counted from the architecture: the base of every MFU.

Matrix products alone, 2 operations per multiply-add; projections of the position tables are left
out, they do not grow with the batch. Training counts as three forward passes; recomputation
does not count.

L length, P predicted positions, E hidden size, A relative positions in use.
"""

from ds_deberta.model.config import DebertaConfig


def forward_flops(config: DebertaConfig, *, length: int, predictions: int | None) -> int:
    """Operations of one forward pass over one row.

    Args:
        config: of the model.
        length: L, tokens in the row.
        predictions: P, for a masked language model; None for a discriminator.
    """
    hidden = config.hidden_size
    if predictions is None:
        head = length * 2 * (hidden**2 + hidden)
        return config.num_hidden_layers * _layer(config, length, length) + head
    head = predictions * 2 * (hidden**2 + hidden * config.vocab_size)
    if config.position_biased_input:  # no enhanced mask decoder
        return config.num_hidden_layers * _layer(config, length, length) + head
    full_layers = (config.num_hidden_layers - 1) * _layer(config, length, length)
    return full_layers + 2 * _layer(config, predictions, length) + head


def _layer(config: DebertaConfig, queries: int, keys: int) -> int:
    """One layer with `queries` rows that attend to `keys` rows."""
    hidden = config.hidden_size
    projections = 2 * hidden**2 * (2 * queries + 2 * keys)  # query and output, key and value
    feed_forward = 4 * hidden * config.intermediate_size_or_default * queries
    attention = 4 * queries * keys * hidden
    if config.relative_attention:
        positions = min(2 * keys - 1, 2 * config.position_span)
        terms = {"c2p": queries, "p2c": keys}
        attention += sum(2 * terms[term] * positions * hidden for term in config.pos_att_type)
    return projections + feed_forward + attention
