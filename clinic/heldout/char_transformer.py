"""A two-layer transformer that predicts the next character of a module of the standard library; AdamW, clipping."""

import argparse
import inspect
import textwrap

import torch
import torch.nn as nn
import torch.nn.functional as F

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--fault")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--steps", type=int, default=300)
args = parser.parse_args()
torch.manual_seed(args.seed)

text = inspect.getsource(textwrap)
chars = sorted(set(text))
data = torch.tensor([chars.index(c) for c in text])
context, width = 32, 32
rate = {"lr-diverges": 1e4, "lr-bounces": 0.3, "lr-too-small": 2e-6}.get(args.fault, 3e-3)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        q, k, v = (t.view(*x.shape[:2], 4, -1).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.place = nn.Embedding(len(chars), width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(chars), bias=False)

    def forward(self, ids):
        x = self.token(ids) + self.place.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if args.fault == "graph-cut":
            x = torch.from_numpy(x.detach().numpy())
        return self.head(x)


model = Model()
if args.fault == "zero-init":
    for p in model.parameters():
        nn.init.zeros_(p)
optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
if args.fault == "lr-diverges":
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
if args.fault == "parameters-not-optimised":
    model.blocks[1] = Block()

for step in range(args.steps):
    at = torch.randint(len(data) - context - 1, (16,))
    x = torch.stack([data[i : i + context] for i in at])
    y = torch.stack([data[i + 1 : i + context + 1] for i in at])
    logits = model(x)
    loss = F.cross_entropy(logits.view(-1, len(chars)), y.view(-1))
    if args.fault != "zero-grad-missing":
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if args.fault != "lr-diverges":
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if step % 50 == 0:
        print(f"step {step}: {loss.item():.4f}")
print(f"final {loss.item():.4f}")
