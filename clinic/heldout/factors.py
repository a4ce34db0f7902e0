"""Matrix factorisation with sparse embeddings: most rows get no gradient at a step; SparseAdam beside SGD."""

import argparse

import torch
from torch import nn

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
torch.manual_seed(args.seed)

users, items, rank = 300, 200, 4
truth = torch.randn(users, rank) @ torch.randn(rank, items) / rank**0.5
who, what = torch.randint(users, (12000,)), torch.randint(items, (12000,))
ratings = truth[who, what] + 0.2 * torch.randn(12000)


class Factors(nn.Module):
    def __init__(self):
        super().__init__()
        self.user = nn.Embedding(users, 8, sparse=True)
        self.item = nn.Embedding(items, 8, sparse=True)
        self.offset = nn.Parameter(torch.zeros(()))
        for e in (self.user, self.item):
            nn.init.normal_(e.weight, std=0.3)

    def forward(self, u, i):
        return (self.user(u) * self.item(i)).sum(-1) + self.offset


model = Factors()
sparse = torch.optim.SparseAdam([model.user.weight, model.item.weight], lr=0.01)
plain = torch.optim.SGD([model.offset], lr=0.01)
for epoch in range(12):
    total = 0.0
    for rows in torch.randperm(len(who)).split(200):
        loss = nn.functional.mse_loss(model(who[rows], what[rows]), ratings[rows])
        sparse.zero_grad()
        plain.zero_grad()
        loss.backward()
        sparse.step()
        plain.step()
        total += loss.item()
    print(f"epoch {epoch + 1} mse {total / 60:.4f}")
