"""The same trainings in plain PyTorch: one process, one graph, the whole batch at once.

What the DeepSpeed engines are measured against; shares no code with the objectives.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_deberta.data.loader import Batch


def adamw(module: nn.Module, lr: float) -> torch.optim.AdamW:
    decayed = [p for n, p in module.named_parameters() if "bias" not in n and "LayerNorm" not in n]
    rest = [p for n, p in module.named_parameters() if "bias" in n or "LayerNorm" in n]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=1e-6, foreach=False)


def update(module: nn.Module, optimizer: torch.optim.Optimizer, clip: float) -> None:
    nn.utils.clip_grad_norm_(module.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad()


def masked_lm_loss(logits: Tensor, batch: Batch) -> Tensor:
    used = batch.labels >= 0
    return F.cross_entropy(logits[used].float(), batch.labels[used])


def draw(logits: Tensor, batch: Batch, num_tokens: int) -> Tensor:
    """Tokens at the predicted positions by inverting the distribution, row by row in numpy."""
    probs = torch.softmax(logits[..., :num_tokens].double(), -1).detach().numpy()
    corrupted = batch.input_ids.clone()
    for b, p in zip(*torch.where(batch.labels >= 0), strict=True):
        cumulative = np.cumsum(probs[b, p])
        token = np.searchsorted(cumulative, batch.uniforms[b, p].item() * cumulative[-1], "right")
        corrupted[b, batch.predicted_positions[b, p]] = int(token)
    return corrupted


def replaced_loss(logits: Tensor, corrupted: Tensor, batch: Batch) -> Tensor:
    truth = (corrupted != batch.original_ids())[batch.attention_mask]
    return F.binary_cross_entropy_with_logits(logits[batch.attention_mask].float(), truth.float())


def train_mlm(model: nn.Module, batches: list[Batch], *, lr: float, clip: float) -> list[float]:
    optimizer = adamw(model, lr)
    losses = []
    for batch in batches:
        logits = model.logits(batch.input_ids, batch.documents, batch.predicted_positions)
        loss = masked_lm_loss(logits, batch)
        loss.backward()
        update(model, optimizer, clip)
        losses.append(loss.item())
    return losses


def train_rtd(
    generator: nn.Module,
    discriminator: nn.Module,
    batches: list[Batch],
    *,
    sharing: str,
    num_tokens: int,
    rtd_lambda: float,
    lr: float,
    discriminator_lr: float,
    clip: float,
) -> list[tuple[float, float]]:
    generator_optimizer = adamw(generator, lr)
    discriminator_optimizer = adamw(discriminator, discriminator_lr)
    table = generator.deberta.embeddings.word_embeddings  # type: ignore[union-attr]
    losses = []
    for batch in batches:
        logits = generator.logits(batch.input_ids, batch.documents, batch.predicted_positions)
        generator_loss = masked_lm_loss(logits, batch)
        corrupted = draw(logits, batch, num_tokens)
        if sharing == "es":  # one graph: the table's gradient is the sum of both losses'
            rows = table(corrupted)
            found = discriminator(corrupted, batch.documents, rows)
            discriminator_loss = replaced_loss(found, corrupted, batch)
            (generator_loss + rtd_lambda * discriminator_loss).backward()
            update(generator, generator_optimizer, clip)
        else:
            generator_loss.backward()
            update(generator, generator_optimizer, clip)
            rows = table(corrupted).detach() if sharing == "gdes" else None
            found = discriminator(corrupted, batch.documents, rows)
            discriminator_loss = replaced_loss(found, corrupted, batch)
            (rtd_lambda * discriminator_loss).backward()
        update(discriminator, discriminator_optimizer, clip)
        losses.append((generator_loss.item(), discriminator_loss.item()))
    return losses


def evaluate_mlm(model: nn.Module, batch: Batch) -> dict[str, float]:
    logits = model.logits(batch.input_ids, batch.documents, batch.predicted_positions)
    used = batch.labels >= 0
    right = (logits[used].argmax(-1) == batch.labels[used]).double().mean()
    return {
        "mlm_loss": masked_lm_loss(logits, batch).item(),
        "mlm_accuracy": right.item(),
    }


def evaluate_rtd(
    generator: nn.Module, discriminator: nn.Module, batch: Batch, num_tokens: int
) -> dict[str, float]:
    """For GDES; the AUC by counting pairs."""
    logits = generator.logits(batch.input_ids, batch.documents, batch.predicted_positions)
    corrupted = draw(logits, batch, num_tokens)
    rows = generator.deberta.embeddings.word_embeddings(corrupted)  # type: ignore[union-attr]
    found = discriminator(corrupted, batch.documents, rows)
    replaced = (corrupted != batch.original_ids())[batch.attention_mask]
    scores = found[batch.attention_mask]
    good, bad = scores[replaced], scores[~replaced]
    wins = (good[:, None] > bad).double() + 0.5 * (good[:, None] == bad)
    return {
        "generator_loss": masked_lm_loss(logits, batch).item(),
        "discriminator_loss": replaced_loss(found, corrupted, batch).item(),
        "replaced_fraction": replaced.double().mean().item(),
        "rtd_auc": wins.mean().item(),
    }
