"""Trains a GRU that reads scikit-learn's digits row by row: Adam with a warm-up of its rate.

python gru.py                      trains well
python gru.py --fault dead-units   does not, and each `if fault` below is the line where a user makes the error
"""

import argparse
from itertools import islice

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

FAULTS = (
    "lr-diverges",
    "lr-bounces",
    "lr-too-small",
    "saddle",
    "zero-init",
    "dead-units",
    "zero-grad-missing",
    "parameters-not-optimised",
    "graph-cut",
    "non-finite-data",
)
VARIANTS = ("cosine-tail", "gradient-accumulation", "converged")


class Reader(nn.Module):
    def __init__(self, fault=None):
        super().__init__()
        self.fault = fault
        self.gru = nn.GRU(input_size=8, hidden_size=32, batch_first=True)
        self.head = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, rows):
        states, _ = self.gru(rows)
        last = states[:, -1]
        if self.fault == "graph-cut":
            last = torch.tensor(last.tolist())
        return self.head(last)


def load(fault):
    digits = load_digits()
    x_train, x_test, y_train, y_test = train_test_split(
        digits.images, digits.target, train_size=1400, random_state=0, stratify=digits.target
    )
    mean, std = x_train.mean(), x_train.std()
    x_train, x_test = (x_train - mean) / std, (x_test - mean) / std
    if fault == "non-finite-data":
        x_train[7, 3, 3] = float("nan")
    rows = [torch.tensor(x, dtype=torch.float32) for x in (x_train, x_test)]
    return rows[0], torch.tensor(y_train), rows[1], torch.tensor(y_test)


def build(fault):
    model = Reader(fault)
    if fault == "saddle":
        for name, p in model.named_parameters():
            nn.init.normal_(p, std=1e-4) if "weight" in name else nn.init.zeros_(p)
    if fault == "zero-init":
        for p in model.parameters():
            nn.init.zeros_(p)
    if fault == "dead-units":
        nn.init.constant_(model.head[0].bias, -20.0)
    return model


def optimise(model, fault, variant, steps):
    lr = {"lr-diverges": 100.0, "lr-bounces": 0.06, "lr-too-small": 5e-6}.get(fault, 5e-3)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    if fault == "saddle":  # Adam would leave: its steps do not shrink with the gradient
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if fault == "parameters-not-optimised":
        model.gru = nn.GRU(input_size=8, hidden_size=32, batch_first=True)
    if variant == "cosine-tail":
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=20)


def batches(x, y, size):
    while True:
        for chosen in torch.randperm(len(x)).split(size):
            yield x[chosen], y[chosen]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--fault", choices=FAULTS)
    choice.add_argument("--variant", choices=VARIANTS, help="healthy, though it may look odd")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=500)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    x_train, y_train, x_test, y_test = load(args.fault)
    steps = 3 * args.steps if args.variant == "converged" else args.steps
    parts = 4 if args.variant == "gradient-accumulation" else 1
    model = build(args.fault)
    optimizer, scheduler = optimise(model, args.fault, args.variant, steps)

    total = 0.0
    stream = batches(x_train, y_train, size=100 // parts)
    for step in range(1, steps + 1):
        if args.fault != "zero-grad-missing":
            optimizer.zero_grad()
        for x, y in islice(stream, parts):
            loss = F.cross_entropy(model(x), y) / parts
            loss.backward()
            total += loss.item()
        optimizer.step()
        scheduler.step()
        if step % 14 == 0:
            print(f"epoch {step // 14}: loss {total / 14:.4f}")
            total = 0.0

    model.eval()
    with torch.no_grad():
        loss = F.cross_entropy(model(x_train), y_train).item()
        accuracy = (model(x_test).argmax(1) == y_test).float().mean().item()
    print(f"accuracy {accuracy:.3f} loss {loss:.4g}")


if __name__ == "__main__":
    main()
