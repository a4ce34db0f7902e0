"""Trains a perceptron with one hidden layer on scikit-learn's digits: plain SGD, batches drawn by hand.

python mlp.py                      trains well
python mlp.py --fault dead-units   does not, and each `if fault` below is the line where a user makes the error
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
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
VARIANTS = ("edge-of-stability", "cosine-tail", "gradient-accumulation", "sparse-relu", "converged")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
choice = parser.add_mutually_exclusive_group()
choice.add_argument("--fault", choices=FAULTS)
choice.add_argument("--variant", choices=VARIANTS, help="healthy, though it may look odd")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--steps", type=int, default=500)
args = parser.parse_args()
fault, variant = args.fault, args.variant
torch.manual_seed(args.seed)

digits = load_digits()
x, y = torch.tensor(digits.data, dtype=torch.float32), torch.tensor(digits.target)
split = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))  # the same for all seeds
x_train, y_train = x[split[:1400]], y[split[:1400]]
x_test, y_test = x[split[1400:]], y[split[1400:]]
mean, std = x_train.mean(0), x_train.std(0) + 0.1  # pixels at the border are constant
x_train, x_test = (x_train - mean) / std, (x_test - mean) / std
if fault == "non-finite-data":
    x_train[7, 3] = float("nan")


class Perceptron(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(64, 32)
        self.output = nn.Linear(32, 10)

    def forward(self, x):
        h = F.tanh(self.hidden(x)) if fault == "lr-bounces" else F.relu(self.hidden(x))  # units that cannot die
        if fault == "graph-cut":
            h = h.detach()
        return self.output(h)


def loss_of(x, y):
    if variant == "edge-of-stability":
        return F.mse_loss(model(x), F.one_hot(y, 10).float())
    return F.cross_entropy(model(x), y)


model = Perceptron()
if fault == "saddle":
    for layer in (model.hidden, model.output):
        nn.init.normal_(layer.weight, std=1e-10)
        nn.init.zeros_(layer.bias)
if fault == "zero-init":
    for p in model.parameters():
        nn.init.zeros_(p)
if fault == "dead-units":
    nn.init.constant_(model.hidden.bias, -20.0)
if variant == "sparse-relu":
    nn.init.constant_(model.hidden.bias, -0.5)

rates = {
    "lr-diverges": 10.0,
    "lr-too-small": 2e-4,
    "saddle": 0.05,
    "edge-of-stability": 4.0,
    "cosine-tail": 0.3,
    "converged": 0.5,
}
lr = rates.get(fault or variant, 0.2)
steps = 3 * args.steps if variant == "converged" else args.steps
batch_size = len(x_train) if variant == "edge-of-stability" else 50
optimizer = torch.optim.SGD(model.parameters(), lr=lr)
if fault == "lr-bounces":  # a rate that SGD would bear
    optimizer = torch.optim.Adam(model.parameters(), lr=0.3)
if fault == "parameters-not-optimised":
    model.hidden = nn.Linear(64, 32)
scheduler = None
if variant == "cosine-tail":
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)

batches = len(x_train) // batch_size
losses = []
for step in range(steps):
    if step % batches == 0:
        order = torch.randperm(len(x_train)).split(batch_size)
    batch = order[step % batches]
    if fault != "zero-grad-missing":
        optimizer.zero_grad()
    if variant == "gradient-accumulation":
        for part in batch.chunk(4):
            loss = loss_of(x_train[part], y_train[part]) / 4
            loss.backward()
    else:
        loss = loss_of(x_train[batch], y_train[batch])
        loss.backward()
    optimizer.step()
    if scheduler:
        scheduler.step()
    losses.append(loss.item())
    if len(losses) == batches:
        print(f"epoch {step // batches + 1:3d} loss {sum(losses) / batches:.4f}")
        losses = []

model.eval()
with torch.no_grad():
    loss = loss_of(x_train, y_train).item()
    accuracy = (model(x_test).argmax(1) == y_test).float().mean().item()
print(f"accuracy {accuracy:.3f} loss {loss:.4g}")
