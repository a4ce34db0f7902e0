"""Batch normalisation that small batches do not break."""

import torch
from torch import Tensor, nn

_AXES = {2: "", 3: "L", 4: "HW"}


class _BatchRenorm(nn.Module):
    """What the two modules share."""

    dimensions: tuple[int, ...]  # that an input may have
    running_mean: Tensor  # (features,), μ
    running_std: Tensor  # (features,), σ, as in the paper; nn.BatchNorm keeps its square
    batches: Tensor  # 0-d, how many were seen in training

    def __init__(
        self,
        features: int,
        *,
        eps: float = 1e-3,
        momentum: float = 0.01,
        r_max: float = 3.0,
        d_max: float = 5.0,
        affine: bool = True,
    ) -> None:
        super().__init__()
        if features < 1:
            raise ValueError(f"at least one feature is needed, got features={features}")
        if not (r_max >= 1 and d_max >= 0):
            raise ValueError(f"r_max ≥ 1 and d_max ≥ 0 are needed, got {r_max} and {d_max}: 1 and 0 are batch norm")
        if not (eps > 0 and 0 < momentum <= 1):
            raise ValueError(f"eps > 0 and a momentum between 0 and 1 are needed, got {eps} and {momentum}")
        self.features, self.eps, self.momentum = features, eps, momentum
        self.r_max, self.d_max = r_max, d_max
        self.weight = nn.Parameter(torch.ones(features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(features)) if affine else None
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_std", torch.ones(features))
        self.register_buffer("batches", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        shape = (1, -1, *[1] * (x.dim() - 2))
        if not self.training:
            scaled = (x - self.running_mean.view(shape)) / self.running_std.view(shape)
        else:
            axes = [0, *range(2, x.dim())]
            with torch.no_grad():
                mean = x.mean(axes)
                std = (x.var(axes, unbiased=False) + self.eps).sqrt()
                r = (std / self.running_std).clamp(1 / self.r_max, self.r_max)
                d = ((mean - self.running_mean) / self.running_std).clamp(-self.d_max, self.d_max)
                self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
                self.running_std.lerp_(std.to(self.running_std), self.momentum)
                self.batches += 1
            normal = nn.functional.batch_norm(x, None, None, training=True, eps=self.eps)
            scaled = normal * r.view(shape) + d.view(shape)
        if self.weight is None or self.bias is None:
            return scaled
        return scaled * self.weight.view(shape) + self.bias.view(shape)

    def _check(self, x: Tensor) -> None:
        if x.dim() not in self.dimensions or x.shape[1] != self.features:
            needed = " or ".join(f"(N, {', '.join([str(self.features), *_AXES[d]])})" for d in self.dimensions)
            raise ValueError(f"an input of shape {needed} is needed, got {tuple(x.shape)}")
        if self.training and x.numel() <= self.features:
            raise ValueError(f"training needs more than one value for each feature, got an input of {tuple(x.shape)}")

    def extra_repr(self) -> str:
        return f"{self.features}, r_max={self.r_max}, d_max={self.d_max}, momentum={self.momentum}"


class BatchRenorm1d(_BatchRenorm):
    """Batch renormalisation (Ioffe 2017) of x (N, features) or (N, features, L): x̂ = (x − μ_B)/σ_B · r + d.

    r = clip(σ_B/σ, 1/r_max, r_max) and d = clip((μ_B − μ)/σ, −d_max, d_max) count as constants in the gradient.
    Unclipped they turn the batch's statistics into the running ones, so that training sees what evaluation does, also
    with two examples in a batch, where batch norm fails (lecture 002, "Small batches break batch norm"). r_max = 1 and
    d_max = 0 are batch norm.

    The paper trains some epochs with these, then raises `r_max` to 3 and `d_max` to 5, which can be set at any time.
    Deviating from nn.BatchNorm, σ² = var + ε with the biased variance, and σ is what is averaged, both as in the paper.
    Experimental.
    """

    dimensions = (2, 3)


class BatchRenorm2d(_BatchRenorm):
    """Batch renormalisation of images (N, features, H, W), over N, H and W: see BatchRenorm1d."""

    dimensions = (4,)
