"""REINFORCE on a contextual bandit: the pseudo-loss has no trend though the policy learns."""

import argparse

import torch
from torch import nn
from torch.distributions import Categorical

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
torch.manual_seed(args.seed)

best = torch.randn(8, 4)
policy = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
optimizer = torch.optim.RMSprop(policy.parameters(), lr=3e-3)
rewards = []
for episode in range(500):
    context = torch.randn(32, 8)
    choice = Categorical(logits=policy(context))
    action = choice.sample()
    reward = (action == (context @ best).argmax(1)).float()
    advantage = (reward - reward.mean()) / (reward.std() + 1e-6)
    loss = -(choice.log_prob(action) * advantage).mean() - 0.01 * choice.entropy().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    rewards.append(reward.mean().item())
    if episode % 100 == 99:
        print(f"episode {episode + 1} reward {sum(rewards[-50:]) / 50:.3f}")
