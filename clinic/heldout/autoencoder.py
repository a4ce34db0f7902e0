"""A convolutional autoencoder of the digits: squared error, Adam, a DataLoader."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def build(fault):
    encoder = nn.Sequential(
        nn.Conv2d(1, 12, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, stride=2, padding=1), nn.ReLU()
    )
    decoder = nn.Sequential(
        nn.ConvTranspose2d(16, 12, 2, stride=2), nn.ReLU(), nn.ConvTranspose2d(12, 1, 2, stride=2), nn.Sigmoid()
    )
    for layer in (encoder[0], encoder[2], decoder[0], decoder[2]):
        if fault in ("saddle", "zero-init"):
            nn.init.normal_(layer.weight, std=1e-6 if fault == "saddle" else 0.0)
            nn.init.zeros_(layer.bias)
    if fault == "dead-units":
        nn.init.constant_(encoder[2].bias, -30.0)
    return encoder, decoder


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fault", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=14)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    if args.fault == "non-finite-data":
        images[5, 0, 2, 2] = float("inf")
    loader = DataLoader(TensorDataset(images), batch_size=48, shuffle=True, drop_last=False)
    encoder, decoder = build(args.fault)
    rate = {"lr-diverges": 1e3, "lr-bounces": 0.2, "lr-too-small": 1e-6}.get(args.fault, 3e-3)
    parameters = [*encoder.parameters(), *decoder.parameters()]
    if args.fault == "parameters-not-optimised":
        parameters = list(decoder.parameters())
    optimizer = torch.optim.Adam(parameters, lr=rate)
    if args.fault in ("saddle", "zero-init", "lr-diverges"):
        optimizer = torch.optim.SGD(parameters, lr=rate)
    criterion = nn.MSELoss()
    for epoch in range(args.epochs):
        running = 0.0
        for (x,) in loader:
            if args.fault != "zero-grad-missing":
                optimizer.zero_grad()
            code = encoder(x)
            if args.fault == "graph-cut":
                code = code.detach()
            loss = criterion(decoder(code), x)
            loss.backward()
            optimizer.step()
            running += loss.item() * len(x)
        print(f"[{epoch + 1}] mse {running / len(images):.5f}")


if __name__ == "__main__":
    main()
