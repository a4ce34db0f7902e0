"""Logistic regression on the breast cancer data with L-BFGS and its closure."""

import argparse

import torch
from sklearn.datasets import load_breast_cancer
from torch import nn

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
torch.manual_seed(args.seed)

data = load_breast_cancer()
x = torch.tensor(data.data, dtype=torch.float64)
x, y = (x - x.mean(0)) / x.std(0), torch.tensor(data.target, dtype=torch.float64)
model = nn.Linear(30, 1, dtype=torch.float64)
optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, history_size=10, max_iter=4)


def closure():
    optimizer.zero_grad()
    loss = nn.functional.binary_cross_entropy_with_logits(model(x).squeeze(-1), y)
    loss = loss + 1e-3 * model.weight.square().sum()
    loss.backward()
    return loss


for step in range(40):
    loss = optimizer.step(closure)
    if step % 5 == 0:
        print(step, loss.item())
