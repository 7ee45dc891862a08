"""The two trained models with whole heads, as classes of transformers.

Each export holds a copy of this file. It needs torch and transformers alone:

    AutoModelForMaskedLM.from_pretrained(FOLDER, trust_remote_code=True)     # generator, MLM model
    AutoModelForPreTraining.from_pretrained(FOLDER, trust_remote_code=True)  # discriminator

Shapes: B batch, L length, E hidden size, V vocabulary.
"""

# pyright: reportIncompatibleMethodOverride=false, reportPrivateImportUsage=false
# pyright: reportOptionalCall=false
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DebertaV2Config, DebertaV2ForMaskedLM, DebertaV2Model
from transformers import DebertaV2PreTrainedModel as PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import MaskedLMOutput, TokenClassifierOutput


class DebertaV2ForEnhancedMaskedLM(DebertaV2ForMaskedLM):
    """A masked language model with the enhanced mask decoder.

    The last layer runs twice. It attends to the states of the layer before it, and starts from
    these plus the absolute positions.
    """

    def __init__(self, config: DebertaV2Config):
        super().__init__(config)
        table = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.deberta.embeddings.position_embeddings = table  # unused by the input of this model

    def forward(
        self,
        input_ids: Tensor | None = None,  # [B, L]
        attention_mask: Tensor | None = None,  # [B, L]
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,  # [B, L]
        inputs_embeds: Tensor | None = None,  # [B, L, E]
        labels: Tensor | None = None,  # [B, L]
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return logits, [B, L, V], and the mean loss over labels that are not -100."""
        outputs = self.deberta(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=True,
            return_dict=True,
        )
        hidden = outputs.hidden_states[-2]  # [B, L, E]
        logits = self.cls(self._decode(hidden, attention_mask, position_ids))  # [B, L, V]
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        output = MaskedLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states if output_hidden_states else None,
            attentions=outputs.attentions,
        )
        return output if _wants_names(self.config, return_dict) else output.to_tuple()

    def _decode(
        self,
        hidden: Tensor,  # [B, L, E]
        attention_mask: Tensor | None,  # [B, L]
        position_ids: Tensor | None,  # [B, L]
    ) -> Tensor:  # [B, L, E]
        embeddings, encoder = self.deberta.embeddings, self.deberta.encoder
        if attention_mask is None:
            attention_mask = torch.ones(hidden.shape[:2], device=hidden.device)
        if position_ids is None:
            position_ids = embeddings.position_ids[:, : hidden.shape[1]]
        states = embeddings.position_embeddings(position_ids) + hidden
        for _ in range(2):
            states, _ = encoder.layer[-1](
                hidden,
                encoder.get_attention_mask(attention_mask),
                query_states=states,
                relative_pos=encoder.get_rel_pos(hidden),
                rel_embeddings=encoder.get_rel_embedding(),
            )
        return states


class DebertaV2ForReplacedTokenDetection(PreTrainedModel):
    """Tells replaced tokens from original ones: a positive logit means "replaced"."""

    def __init__(self, config: DebertaV2Config):
        super().__init__(config)
        self.deberta = DebertaV2Model(config)
        self.mask_predictions = ReplacedTokenHead(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,  # [B, L]
        attention_mask: Tensor | None = None,  # [B, L]
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,  # [B, L]
        inputs_embeds: Tensor | None = None,  # [B, L, E]
        labels: Tensor | None = None,  # [B, L]
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return logits, [B, L], and the mean loss over labels (1: replaced) that are not -100."""
        outputs = self.deberta(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.mask_predictions(outputs.last_hidden_state)  # [B, L]
        loss = None
        if labels is not None:
            counts = labels >= 0 if attention_mask is None else (labels >= 0) & (attention_mask > 0)
            loss = nn.functional.binary_cross_entropy_with_logits(
                logits[counts], labels[counts].to(logits.dtype)
            )
        output = TokenClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if _wants_names(self.config, return_dict) else output.to_tuple()


class ReplacedTokenHead(nn.Module):
    """Classifies each position together with the state of [CLS]."""

    def __init__(self, config: DebertaV2Config):
        super().__init__()
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        """Map [B, L, E] to logits [B, L]."""
        states = self.LayerNorm(hidden[:, :1] + hidden)
        return self.classifier(self.activation(self.dense(states))).squeeze(-1)


def _wants_names(config: DebertaV2Config, return_dict: bool | None) -> bool:
    return bool(config.return_dict if return_dict is None else return_dict)
