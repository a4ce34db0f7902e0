"""Trains a small convolutional network with batch norm on scikit-learn's digits: SGD with momentum, a DataLoader.

python cnn.py                      trains well
python cnn.py --fault dead-units   does not, and each `if fault` below is the line where a user makes the error
"""

import argparse
from itertools import islice

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

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
VARIANTS = ("cosine-tail", "gradient-accumulation", "sparse-relu", "converged")


class ConvNet(nn.Module):
    def __init__(self, fault=None):
        super().__init__()
        self.fault = fault
        self.conv1 = nn.Conv2d(1, 12, kernel_size=3, padding=1)
        self.norm1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 24, kernel_size=3, padding=1)
        self.norm2 = nn.BatchNorm2d(24)
        self.pool = nn.MaxPool2d(2)
        self.relu = nn.ReLU()
        self.head = nn.Linear(24, 10)

    def forward(self, images):
        x = self.pool(self.relu(self.norm1(self.conv1(images))))
        x = self.relu(self.norm2(self.conv2(x)))
        x = x.mean(dim=(2, 3))
        if self.fault == "graph-cut":
            x = x.data
        return self.head(x)


def load(fault):
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)
    images = (images - images[:1400].mean()) / images[:1400].std()
    data = TensorDataset(images, torch.tensor(digits.target))
    train_data, test_data = random_split(data, [1400, 397], generator=torch.Generator().manual_seed(0))
    if fault == "non-finite-data":
        images[train_data.indices[7], 0, 3, 3] = float("nan")
    return train_data, test_data


def initialise(model, fault, variant):
    for layer in (model.conv1, model.conv2, model.head):
        if fault == "saddle":  # so small that even batch norm, with its eps, does not restore the scale
            nn.init.normal_(layer.weight, std=1e-9)
            nn.init.zeros_(layer.bias)
        if fault == "zero-init":
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    if fault == "dead-units":
        nn.init.constant_(model.norm2.bias, -20.0)
    if variant == "sparse-relu":
        nn.init.constant_(model.norm1.bias, -0.5)
        nn.init.constant_(model.norm2.bias, -1.0)


def optimise(model, fault):
    lr = {"lr-diverges": 100.0, "lr-bounces": 2.0, "lr-too-small": 5e-5}.get(fault, 0.05)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-3)
    if fault == "parameters-not-optimised":
        model.conv2 = nn.Conv2d(12, 24, kernel_size=3, padding=1)
    return optimizer


def evaluate(model, data, criterion):
    images, targets = next(iter(DataLoader(data, batch_size=len(data))))
    model.eval()
    with torch.no_grad():
        outputs = model(images)
    return criterion(outputs, targets).item(), (outputs.argmax(1) == targets).float().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--fault", choices=FAULTS)
    choice.add_argument("--variant", choices=VARIANTS, help="healthy, though it may look odd")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=500)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    train_data, test_data = load(args.fault)
    accumulate = 4 if args.variant == "gradient-accumulation" else 1
    loader = DataLoader(train_data, batch_size=64 // accumulate, shuffle=True)
    steps = 3 * args.steps if args.variant == "converged" else args.steps

    model = ConvNet(args.fault)
    initialise(model, args.fault, args.variant)
    criterion = nn.CrossEntropyLoss()
    optimizer = optimise(model, args.fault)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if args.variant == "cosine-tail" else None

    batch = epoch = 0
    while batch < steps * accumulate:
        model.train()
        total = 0.0
        for images, targets in islice(loader, steps * accumulate - batch):
            if batch % accumulate == 0 and args.fault != "zero-grad-missing":
                optimizer.zero_grad()
            loss = criterion(model(images), targets)
            (loss / accumulate).backward()
            batch += 1
            if batch % accumulate == 0:
                optimizer.step()
                if scheduler:
                    scheduler.step()
            total += loss.item()
        epoch += 1
        print(f"epoch {epoch}: train loss {total / len(loader):.4f}")

    loss, _ = evaluate(model, train_data, criterion)
    _, accuracy = evaluate(model, test_data, criterion)
    print(f"accuracy {accuracy:.3f} loss {loss:.4g}")


if __name__ == "__main__":
    main()
