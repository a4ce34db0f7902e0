"""A variational autoencoder with a learned output variance: the loss, a negative bound, falls below zero. Adagrad."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
torch.manual_seed(args.seed)


class VAE(nn.Module):
    def __init__(self, latent=6):
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2 * latent))
        self.decode = nn.Sequential(nn.Linear(latent, 64), nn.Tanh(), nn.Linear(64, 64))
        self.log_scale = nn.Parameter(torch.zeros(64))

    def forward(self, x):
        mean, log_std = self.encode(x).chunk(2, 1)
        posterior = Independent(Normal(mean, log_std.exp()), 1)
        prior = Independent(Normal(torch.zeros_like(mean), torch.ones_like(mean)), 1)
        z = posterior.rsample()
        scale = nn.functional.softplus(self.log_scale) + 0.05
        likelihood = Independent(Normal(self.decode(z), scale), 1).log_prob(x)
        return (kl_divergence(posterior, prior) - likelihood).mean()


x = torch.tensor(load_digits().data, dtype=torch.float32) / 16
vae = VAE()
optimizer = torch.optim.Adagrad(vae.parameters(), lr=0.03)
for epoch in range(25):
    total = 0.0
    for batch in x[torch.randperm(len(x))].split(64):
        optimizer.zero_grad()
        loss = vae(batch)
        loss.backward()
        optimizer.step()
        total += loss.item() * len(batch)
    if epoch % 5 == 4:
        print(f"epoch {epoch + 1}: -elbo {total / len(x):.3f}")
