"""A small transformer that predicts the next character of Python's own sources: AdamW, warm-up, clipping."""

import torch
from torch import nn
from torch.nn import functional as F

from clinic.data import CHARACTERS, text
from clinic.training import Net, Training, accuracy, cross_entropy

CONTEXT = 16


class Embedding(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.token, self.place = nn.Embedding(CHARACTERS, width), nn.Embedding(CONTEXT, width)

    def forward(self, ids):
        return self.token(ids) + self.place.weight[: ids.shape[1]]


class Block(nn.Module):
    """Attention and a perceptron, each with its norm before it, or after the sum as it first was."""

    def __init__(self, width, activation, norm_after, dropout):
        super().__init__()
        self.norm_after = norm_after
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), activation(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def attention(self, x):
        q, k, v = (t.view(*x.shape[:2], 2, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def forward(self, x):
        if self.norm_after:
            x = self.norm1(x + self.dropout(self.attention(x)))
            return self.norm2(x + self.dropout(self.mlp(x)))
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


def build(*, width=32, depth=2, activation=nn.ReLU, norm_after=False, dropout=0.0):
    blocks = [Block(width, activation, norm_after, dropout) for _ in range(depth)]
    return Net(nn.Sequential(Embedding(width), *blocks, nn.LayerNorm(width)), nn.Linear(width, CHARACTERS))


def warm_up(optimizer, steps):
    return torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.05, total_iters=25)


def setup() -> Training:
    return Training(
        text(CONTEXT),
        build,
        cross_entropy,
        accuracy,
        torch.optim.AdamW,
        {"lr": 5e-3, "betas": (0.9, 0.98), "weight_decay": 0.01},
        batch_size=16,
        steps=250,
        clip=1.0,
        step_schedule=warm_up,
    )
