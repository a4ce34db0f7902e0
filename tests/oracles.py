"""Closed forms: losses with the gradient and Hessian that pen and paper give."""

import math

import torch
from torch import Tensor


def linear_regression(X: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value, gradient and Hessian of mean (Xw − y)²."""
    residual = X @ w - y
    return residual.square().mean(), 2 * X.T @ residual / len(X), 2 * X.T @ X / len(X)


def logistic_regression(X: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value, gradient and Hessian of the mean binary cross-entropy with labels y in {0, 1}."""
    p = 1 / (1 + torch.exp(-(X @ w)))
    value = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
    return value, X.T @ (p - y) / len(X), X.T @ ((p * (1 - p))[:, None] * X) / len(X)


def softmax_regression(X: Tensor, y: Tensor, W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value, gradient and Hessian, in the row-major W (classes, features), of the mean cross-entropy."""
    logits = X @ W.T
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    hits = torch.zeros_like(p)
    hits[range(len(y)), y] = 1
    value = -(hits * p.log()).sum(1).mean()
    gradient = (p - hits).T @ X / len(X)
    hessian = sum(
        torch.kron(torch.diag(pi) - torch.outer(pi, pi), torch.outer(xi, xi)) for pi, xi in zip(p, X, strict=True)
    )
    return value, gradient.reshape(-1), hessian / len(X)


def product_pair(w: Tensor) -> Tensor:
    """(1 − w₁w₂)²: at 0 a saddle with eigenvalues ±2, at (1, 1) a valley with eigenvalues 0 and 4."""
    return (1 - w[0] * w[1]) ** 2


def product_pair_hessian(w1: float, w2: float) -> Tensor:
    cross = 4 * w1 * w2 - 2
    return torch.tensor([[2 * w2**2, cross], [cross, 2 * w1**2]], dtype=torch.float64)


def tanh_pair(w: Tensor) -> Tensor:
    """(½ − tanh(w₁ tanh(w₂/2)))²: at 0 a saddle of value ¼ with the Hessian [[0, −½], [−½, 0]]."""
    return (0.5 - torch.tanh(w[0] * torch.tanh(w[1] / 2))) ** 2


TANH_RAVINE = math.atanh(0.5)  # where w₁ tanh(w₂/2) equals it, the loss of the tanh pair is 0


def monkey_saddle(w: Tensor) -> Tensor:
    """x³ − 3xy²: the gradient and the Hessian vanish at 0, and yet 0 is no minimum."""
    return w[0] ** 3 - 3 * w[0] * w[1] ** 2
