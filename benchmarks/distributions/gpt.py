"""The neural part of the teacher: a small GPT, trained with a sampled softmax.

Legend: B batch, T positions, D width, V vocabulary.
"""

import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from benchmarks.common import log
from benchmarks.distributions.settings import Settings


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        B, T, D = x_BTD.shape
        qkv = self.qkv(self.norm_1(x_BTD)).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)
        x_BTD = x_BTD + self.out(mixed.transpose(1, 2).reshape(B, T, D))
        mlp_BTD: torch.Tensor = self.down(F.gelu(self.up(self.norm_2(x_BTD))))
        return x_BTD + mlp_BTD


class TinyGPT(nn.Module):
    """A causal language model with tied embeddings, whose output bias is initialised to the log of the unigram."""

    def __init__(self, settings: Settings, log_unigram_V: torch.Tensor):
        super().__init__()
        self.table = nn.Embedding(len(log_unigram_V), settings.width)
        self.positions = nn.Embedding(settings.sequence_length, settings.width)
        blocks = [Block(settings.width, settings.num_heads) for _ in range(settings.num_layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(settings.width)
        self.bias_V = nn.Parameter(log_unigram_V.clone())
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        with torch.no_grad():
            for block in blocks:
                for linear in (block.out, block.down):
                    linear.weight /= math.sqrt(2 * settings.num_layers)

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Return the last hidden states [B, T, D]."""
        x_BTD = self.table(tokens_BT) + self.positions.weight[: tokens_BT.shape[1]]
        for block in self.blocks:
            x_BTD = block(x_BTD)
        hidden_BTD: torch.Tensor = self.norm(x_BTD)
        return hidden_BTD

    def compute_probs(self, tokens_T: NDArray[np.int32]) -> NDArray[np.float32]:
        """Return the distributions [T, V] of the tokens that follow each position of one sequence."""
        with torch.no_grad():
            hidden_TD = self(torch.from_numpy(tokens_T).long()[None])[0]
            logits_TV = hidden_TD @ self.table.weight.T + self.bias_V
            return np.asarray(torch.softmax(logits_TV, dim=-1).numpy())


def compute_sampled_loss(
    model: TinyGPT, batch_BT: torch.Tensor, unigram_V: torch.Tensor, num_candidates: int
) -> torch.Tensor:
    """Return the cross-entropy over the batch's own targets and ids sampled from the unigram.

    A softmax over all V would cost five times the rest of the model. The log of the probability that an id is a
    candidate is subtracted from its logit, which makes the sum over candidates an estimate of the sum over V
    (sampled softmax: Jean et al., arXiv 1412.2007).
    """
    targets = batch_BT[:, 1:].reshape(-1)
    sampled = torch.multinomial(unigram_V, num_candidates, replacement=True)
    candidates, where = torch.unique(torch.cat([targets, sampled]), return_inverse=True)
    inclusion = -torch.expm1(len(where) * torch.log1p(-unigram_V[candidates]))
    hidden = model(batch_BT[:, :-1]).flatten(0, 1)
    logits = hidden @ model.table(candidates).T + model.bias_V[candidates] - inclusion.log()
    return F.cross_entropy(logits, where[: len(targets)])


def train_gpt(
    stream: NDArray[np.int32], unigram_V: NDArray[np.float64], settings: Settings
) -> TinyGPT:
    """Train num_steps steps on random windows of the training text, one long row of ids."""
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    unigram = torch.from_numpy(unigram_V).float()
    model = TinyGPT(settings, unigram.log())
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    started, average = time.time(), math.nan
    for step in range(settings.num_steps):
        rate = min(1.0, (step + 1) / 50) * (1 + math.cos(math.pi * step / settings.num_steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * max(rate, 0.02)
        starts = rng.integers(len(stream) - settings.sequence_length - 1, size=settings.batch_size)
        batch = np.stack([stream[s : s + settings.sequence_length + 1] for s in starts])
        loss = compute_sampled_loss(
            model, torch.from_numpy(batch).long(), unigram, settings.num_candidates
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average = loss.item() if math.isnan(average) else 0.95 * average + 0.05 * loss.item()
        if (step + 1) % max(1, settings.num_steps // 10) == 0:
            tokens_per_second = (step + 1) * batch[:, 1:].size / (time.time() - started)
            log(
                f"gpt: step {step + 1}/{settings.num_steps}, loss {average:.2f}, {tokens_per_second:.0f} tokens/s"
            )
    return model.eval()
