"""A perceptron by hand, in the way of micrograd's demo: bare tensors, hinge loss, full batch, the rate set by hand."""

import random
import sys

import numpy as np
import torch
from sklearn.datasets import make_moons

seed = int(sys.argv[sys.argv.index("--seed") + 1]) if "--seed" in sys.argv else 0
random.seed(seed)
np.random.seed(seed)  # noqa: NPY002
torch.manual_seed(seed)

X, y = make_moons(n_samples=200, noise=0.1)
X, y = torch.tensor(X), torch.tensor(y * 2.0 - 1)


def layer(n_in, n_out):
    w = torch.empty(n_in, n_out, dtype=torch.float64).uniform_(-1, 1) * n_in**-0.5
    return w.requires_grad_(), torch.zeros(n_out, dtype=torch.float64, requires_grad=True)


layers = [layer(2, 16), layer(16, 16), layer(16, 1)]
params = [t for pair in layers for t in pair]
optimizer = torch.optim.SGD(params, lr=1.0)

for k in range(200):
    h = X
    for w, b in layers[:-1]:
        h = (h @ w + b).relu()
    w, b = layers[-1]
    scores = (h @ w + b).ravel()
    data_loss = (1 + -y * scores).relu().mean()
    reg_loss = 1e-4 * sum((p * p).sum() for p in params)
    total_loss = data_loss + reg_loss
    for p in params:
        if p.grad is not None:
            p.grad.zero_()
    total_loss.backward()
    optimizer.param_groups[0]["lr"] = 1.0 - 0.9 * k / 200
    optimizer.step()
    if k % 20 == 0:
        print(f"step {k} loss {total_loss.item():.4f}, accuracy {((y > 0) == (scores > 0)).double().mean() * 100:.1f}%")
