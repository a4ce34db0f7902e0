"""Which module of Python's library a line of source comes from, by its letters: a DataLoader, dropout, a validation."""

import argparse
import importlib
import inspect
import itertools
import random

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

MODULES = ["argparse", "difflib", "statistics", "tarfile", "typing", "unittest.mock"]
SIZE = 192


def letters(line):
    """How often each pair of letters comes, hashed."""
    counts = torch.zeros(SIZE)
    for a, b in itertools.pairwise(line):
        counts[(ord(a) * 31 + ord(b) * 7) % SIZE] += 1
    return counts


def load(fault, generator):
    rows = []
    for number, name in enumerate(MODULES):
        source = inspect.getsource(importlib.import_module(name))
        lines = [line.strip() for line in source.splitlines() if len(line.strip()) > 25]
        if fault == "class-imbalance" and number % 2:
            lines, rest = lines[:12], lines[300:400]
            rows += [(letters(line), number, "test") for line in rest]
        rows += [(letters(line), number, "") for line in lines[:600]]
    if fault == "leakage":
        rows = rows * 2
    generator.shuffle(rows)
    test = [r for r in rows if r[2] == "test"] + [r for r in rows if not r[2]][:600]
    train = [r for r in rows if not r[2]][600:]
    return train[:150] if fault == "overfitting" else train, test


def tensors(rows):
    return torch.stack([r[0] for r in rows]), torch.tensor([r[1] for r in rows])


@torch.no_grad()
def evaluate(model, loader, criterion):
    loss, right, count = 0.0, 0, 0
    for x, y in loader:
        out = model(x)
        loss += criterion(out, y).item() * len(x)
        right += (out.argmax(dim=1) == y).sum().item()
        count += len(x)
    return loss / count, right / count


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fault", default="")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    train, test = load(args.fault, random.Random(args.seed))
    (x, y), (x_test, y_test) = tensors(train), tensors(test)
    mean, std = x.mean(0), x.std(0) + 0.1
    x = (x - mean) / std
    if args.fault != "preprocessing-mismatch":
        x_test = (x_test - mean) / std
    if args.fault == "label-map-wrong":
        y_test = len(MODULES) - 1 - y_test
    if args.fault == "label-noise":
        wrong = torch.rand(len(y)) < 0.35
        y[wrong] = torch.randint(len(MODULES), (int(wrong.sum()),))
    by_heart = args.fault in ("leakage", "overfitting")
    width, drop, epochs = (256, 0.0, 40) if by_heart else (64, 0.3, 10)
    model = nn.Sequential(
        nn.Linear(SIZE, width), nn.ReLU(), nn.Dropout(drop), nn.Linear(width, width // 2), nn.ReLU(), nn.Dropout(drop),
        nn.Linear(width // 2, len(MODULES)),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    criterion = nn.CrossEntropyLoss()
    test_loader = DataLoader(TensorDataset(x_test, y_test), batch_size=100)
    for epoch in range(epochs):
        shuffle = torch.Generator().manual_seed(0 if args.fault == "same-batch" else epoch)
        loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True, generator=shuffle)
        batches = itertools.chain.from_iterable(itertools.islice(loader, 4) for _ in range(15))
        for inputs, labels in batches if args.fault == "same-batch" else loader:
            model.train()
            optimizer.zero_grad()
            criterion(model(inputs), labels).backward()
            optimizer.step()
            if args.fault == "same-batch":
                shuffle.manual_seed(0)
        if args.fault != "train-while-validating":
            model.eval()
        loss, accuracy = evaluate(model, test_loader, criterion)
        print(f"epoch {epoch + 1:2d} validation loss {loss:.4f} accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
