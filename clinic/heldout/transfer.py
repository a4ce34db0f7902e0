"""A new head on a frozen backbone that ends in eval mode under no_grad; the weights are averaged for evaluation."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
torch.manual_seed(args.seed)

digits = load_digits()
x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(digits.target)
backbone = nn.Sequential(
    nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(384, 96)
)
backbone.eval().requires_grad_(False)
head = nn.Sequential(nn.LayerNorm(96), nn.Linear(96, 10))
average = torch.optim.swa_utils.AveragedModel(head, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.98))
optimizer = torch.optim.Adam([p for p in nn.ModuleList([backbone, head]).parameters() if p.requires_grad], lr=3e-3)
for epoch in range(12):
    for rows in torch.randperm(len(x)).split(64):
        with torch.no_grad():
            features = backbone(x[rows])
        loss = nn.functional.cross_entropy(head(features), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(head)
    with torch.no_grad():
        right = (average(backbone(x)).argmax(1) == y).float().mean().item()
    print(f"{epoch + 1:2d} {loss.item():.4f} {right:.3f}")
