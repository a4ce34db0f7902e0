"""A training step under torch.compile: the model compiled, or the whole step with it."""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--backend", default="inductor")
parser.add_argument("--whole", action="store_true", help="compile the step, not the model")
parser.add_argument("--save")
args = parser.parse_args()
torch.manual_seed(0)

raw = nn.Sequential(nn.Linear(10, 32), nn.GELU(), nn.Linear(32, 1))
optimizer = torch.optim.AdamW(raw.parameters(), lr=3e-3)
model = raw if args.whole else torch.compile(raw, backend=args.backend)


def train_step(x, y):
    loss = F.mse_loss(model(x), y)
    loss.backward()
    return loss


if args.whole:
    train_step = torch.compile(train_step, backend=args.backend)

for step in range(args.steps):
    x = torch.randn(64, 10)
    y = x[:, :1] * x[:, 1:2].tanh()
    loss = train_step(x, y)
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0:
        print(f"step {step} loss {loss.item():.6f}")
if args.save:
    torch.save(raw.state_dict(), args.save)
