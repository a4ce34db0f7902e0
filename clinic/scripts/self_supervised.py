"""Learning without labels on scikit-learn's digits: BYOL with a teacher that is a moving average, or SimCLR."""

import argparse
import copy
import math

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=25)
parser.add_argument("--steps", type=int, default=10**9, help="upper limit of steps in an epoch")
parser.add_argument("--simclr", action="store_true", help="contrast within the batch instead of a teacher")
parser.add_argument("--lr", type=float, default=0.1)
parser.add_argument("--momentum-teacher", type=float, default=0.98)
parser.add_argument("--save")
args = parser.parse_args()
torch.manual_seed(0)

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
loader = torch.utils.data.DataLoader(images[:1500], batch_size=100, shuffle=True, drop_last=True)


def augment(x):
    """Each image moved by up to a pixel, with noise and another contrast."""
    out = torch.zeros_like(x)
    for i, (dy, dx) in enumerate(torch.randint(-1, 2, (len(x), 2)).tolist()):
        out[i] = x[i].roll((dy, dx), (1, 2))
    return out * (0.7 + 0.6 * torch.rand(len(x), 1, 1, 1)) + 0.1 * torch.randn_like(x)


def mlp(dim, projection_size, hidden_size=64):
    return nn.Sequential(
        nn.Linear(dim, hidden_size), nn.BatchNorm1d(hidden_size), nn.ReLU(), nn.Linear(hidden_size, projection_size)
    )


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(16)
        self.projector = mlp(64, 32)

    def features(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.adaptive_avg_pool2d(x, 2).flatten(1)

    def forward(self, x):
        return self.projector(self.features(x))


def byol_loss(x, y):
    return 2 - 2 * (F.normalize(x, dim=-1) * F.normalize(y, dim=-1)).sum(dim=-1)


def nt_xent(a, b, temperature=0.2):
    z = F.normalize(torch.cat([a, b]), dim=-1)
    n = len(a)
    logits = (z @ z.T / temperature).masked_fill(torch.eye(2 * n, dtype=torch.bool), float("-inf"))
    return F.cross_entropy(logits, torch.arange(2 * n).roll(n))


student, predictor = Encoder(), mlp(32, 32)
teacher = copy.deepcopy(student)
for p in teacher.parameters():
    p.requires_grad = False
params = [*student.parameters()] + ([] if args.simclr else [*predictor.parameters()])
optimizer = torch.optim.SGD(params, lr=args.lr, momentum=0.9, weight_decay=1e-4)
total = args.epochs * min(len(loader), args.steps)
step = 0
for epoch in range(args.epochs):
    sum_loss = 0.0
    for i, x in enumerate(loader):
        if i >= args.steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = args.lr * 0.5 * (1 + math.cos(math.pi * step / total))
        one, two = augment(x), augment(x)
        if args.simclr:
            loss = nt_xent(student(one), student(two))
        else:
            with torch.no_grad():
                target_one, target_two = teacher(one), teacher(two)
            loss = byol_loss(predictor(student(one)), target_two.detach())
            loss = (loss + byol_loss(predictor(student(two)), target_one.detach())).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        m = 1 - (1 - args.momentum_teacher) * (math.cos(math.pi * step / total) + 1) / 2
        with torch.no_grad():  # EMA update for the teacher
            for param_q, param_k in zip(student.parameters(), teacher.parameters(), strict=True):
                param_k.data.mul_(m).add_((1 - m) * param_q.detach().data)
        sum_loss += loss.item()
        step += 1
    print(f"epoch {epoch} loss {sum_loss / (i + 1):.5f}")

student.eval()
with torch.no_grad():
    features = F.normalize(student.features(images), dim=-1)
    nearest = (features[1500:] @ features[:1500].T).argmax(1)
print("nearest neighbour accuracy", (labels[:1500][nearest] == labels[1500:]).float().mean().item())
if args.save:
    torch.save([student.state_dict(), teacher.state_dict()], args.save)
