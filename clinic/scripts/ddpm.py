"""A diffusion model in the manner of the small DDPM repositories: points of two moons, a noise schedule, an EMA."""

import argparse
import copy
import math

import torch
import torch.nn.functional as F
from sklearn.datasets import make_moons
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class SinusoidalEmbedding(nn.Module):
    def __init__(self, size, scale=1.0):
        super().__init__()
        self.size = size
        self.scale = scale

    def forward(self, x):
        half_size = self.size // 2
        emb = torch.log(torch.Tensor([10000.0])) / (half_size - 1)
        emb = torch.exp(-emb * torch.arange(half_size))
        emb = (x * self.scale).unsqueeze(-1) * emb.unsqueeze(0)
        return torch.cat((torch.sin(emb), torch.cos(emb)), dim=-1)


class Block(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.ff = nn.Linear(size, size)
        self.act = nn.GELU()

    def forward(self, x):
        return x + self.act(self.ff(x))


class Denoiser(nn.Module):
    def __init__(self, hidden=64, layers=3, emb=32):
        super().__init__()
        self.time_mlp = SinusoidalEmbedding(emb)
        self.input_mlp1 = SinusoidalEmbedding(emb, scale=25.0)
        self.input_mlp2 = SinusoidalEmbedding(emb, scale=25.0)
        blocks = [nn.Linear(3 * emb, hidden), nn.GELU(), *(Block(hidden) for _ in range(layers))]
        self.joint_mlp = nn.Sequential(*blocks, nn.Linear(hidden, 2))

    def forward(self, x, t):
        x1, x2 = self.input_mlp1(x[:, 0]), self.input_mlp2(x[:, 1])
        return self.joint_mlp(torch.cat((x1, x2, self.time_mlp(t)), dim=-1))


class NoiseScheduler:
    def __init__(self, num_timesteps):
        self.num_timesteps = num_timesteps
        self.betas = torch.linspace(1e-4, 0.1, num_timesteps)
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, 0)

    def add_noise(self, x_start, noise, timesteps):
        s = self.alphas_cumprod[timesteps].reshape(-1, 1)
        return s.sqrt() * x_start + (1 - s).sqrt() * noise

    def step(self, predicted, t, sample):
        scale = self.betas[t] / (1 - self.alphas_cumprod[t]).sqrt()
        mean = (sample - scale * predicted) / self.alphas[t].sqrt()
        return mean + self.betas[t].sqrt() * torch.randn_like(sample) if t > 0 else mean


@torch.no_grad()
def update_ema(ema, model, decay):
    for e, p in zip(ema.parameters(), model.parameters(), strict=True):
        e.lerp_(p, 1 - decay)


@torch.no_grad()
def sample(model, scheduler, n):
    x = torch.randn(n, 2)
    for t in reversed(range(scheduler.num_timesteps)):
        x = scheduler.step(model(x, torch.full((n,), t)), t, x)
    return x


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--save")
    config = parser.parse_args()
    torch.manual_seed(0)

    points, _ = make_moons(4000, noise=0.03, random_state=42)
    dataset = TensorDataset(torch.from_numpy((points - points.mean(0)) / points.std(0)).float())
    dataloader = DataLoader(dataset, batch_size=config.train_batch_size, shuffle=True, drop_last=True)
    model = Denoiser()
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    noise_scheduler = NoiseScheduler(50)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)

    global_step, losses = 0, []
    for epoch in range(math.ceil(config.steps / len(dataloader))):
        model.train()
        for (batch,) in dataloader:
            noise = torch.randn(batch.shape)
            timesteps = torch.randint(0, noise_scheduler.num_timesteps, (batch.shape[0],)).long()
            noisy = noise_scheduler.add_noise(batch, noise, timesteps)
            loss = F.mse_loss(model(noisy, timesteps), noise)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            update_ema(ema, model, 0.99)
            losses.append(loss.detach().item())
            global_step += 1
            if global_step >= config.steps:
                break
        print(f"epoch {epoch} step {global_step} loss {sum(losses[-50:]) / len(losses[-50:]):.5f}")
    drawn = sample(ema, noise_scheduler, 500)
    print(f"samples mean {drawn.mean(0).tolist()} std {drawn.std(0).tolist()}")
    if config.save:
        torch.save([model.state_dict(), ema.state_dict(), optimizer.state_dict()], config.save)
