"""A generative adversarial network on a ring of points: two optimisers that take turns."""

import torch
from torch import nn
from torch.nn import functional as F

from clinic.data import ring
from clinic.training import Net, Training

NOISE = 4


class Pair(nn.Module):
    """The generator, whose samples are the output, and the one it plays against."""

    def __init__(self, generator, critic):
        super().__init__()
        self.generator, self.critic = generator, critic

    def forward(self, points):
        return self.generator(torch.randn(len(points), NOISE))


def build(*, width=32, depth=2, activation=nn.ReLU, dropout=0.0):
    def layers(size, activation):
        for _ in range(depth):
            yield from (nn.Linear(size, width), activation(), *([nn.Dropout(dropout)] if dropout else []))
            size = width

    generator = Net(nn.Sequential(*layers(NOISE, activation)), nn.Linear(width, 2))
    critic = Net(nn.Sequential(*layers(2, lambda: nn.LeakyReLU(0.2))), nn.Linear(width, 1))
    return Pair(generator, critic)


def two_optimizers(t):
    t.critic_optimizer = t.optimizer_class(t.model.critic.parameters(), **t.optimizer_options)
    return t.optimizer_class(t.model.generator.parameters(), **t.optimizer_options)


def step(t, batch):
    generator, critic = t.model.generator, t.model.critic
    ones, zeros = torch.ones(len(batch), 1), torch.zeros(len(batch), 1)
    t.critic_optimizer.zero_grad()
    fake = generator(torch.randn(len(batch), NOISE))
    loss = t.criterion(critic(batch.x), ones) + t.criterion(critic(fake.detach()), zeros)
    loss.backward()
    t.critic_optimizer.step()

    t.optimizer.zero_grad()
    loss_of_generator = t.criterion(critic(fake), ones)
    loss_of_generator.backward()
    t.optimizer.step()
    return loss.item()


def likeness(samples, points):
    """1 minus the distance of the two clouds, averaged over 16 directions, in radii of the ring."""
    angles = torch.arange(16) * torch.pi / 16
    directions = torch.stack([angles.cos(), angles.sin()])
    a, b = (cloud @ directions for cloud in (samples[: len(points)], points))
    return 1 - (a.sort(0).values - b.sort(0).values).abs().mean().item()


def distance(samples, points):
    return torch.tensor(1 - likeness(samples, points))


def setup() -> Training:
    options = {"lr": 1e-3, "betas": (0.5, 0.999)}
    training = Training(
        ring(),
        build,
        F.binary_cross_entropy_with_logits,
        likeness,
        torch.optim.Adam,
        options,
        batch_size=64,
        steps=800,
        make_optimizer=two_optimizers,
        step=step,
    )
    training.right_loss = distance
    return training
