"""What `bnlight bench norm` compares: bnlight's layers, torch's forms of them, and the formula by autograd."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bnlight.norm import NORMS, BatchNorm, GroupNorm, LayerNorm

BASELINE = "torch BatchNorm"
OF_POSITIONS = ("batch_instance", "instance", "frn")
"""Layers for which `(N, C)` has one value per channel and sample."""


class NaiveBatchRenorm(nn.Module):
    """Batch renormalization as the formula reads, differentiated by autograd."""

    running_mean: Tensor
    running_std: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_std", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        axes = [axis for axis in range(x.dim()) if axis != 1]
        view = (1, -1, *[1] * (x.dim() - 2))
        mean = x.mean(axes)
        std = (x.var(axes, correction=0) + 1e-5).sqrt()
        r = (std.detach() / self.running_std).clamp(1 / 3, 3)
        d = ((mean.detach() - self.running_mean) / self.running_std).clamp(-5, 5)
        with torch.no_grad():
            self.running_mean.lerp_(mean.float(), 0.01)
            self.running_std.lerp_(std.float(), 0.01)
        xhat = (x - mean.view(view)) / std.view(view) * r.to(x.dtype).view(view) + d.to(x.dtype).view(view)
        return (xhat * self.weight.view(view) + self.bias.view(view)).to(x.dtype)


class NaiveFilterResponseNorm(nn.Module):
    """Filter response normalization as the formula reads, without its activation."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        view = (1, -1, *[1] * (x.dim() - 2))
        nu2 = x.square().mean([*range(2, x.dim())], keepdim=True)
        return (self.weight.view(view) * (x * torch.rsqrt(nu2 + 1e-6)) + self.bias.view(view)).to(x.dtype)


class ChunkedBatchNorm(nn.Module):
    """Ghost batch norm as Composer has it: one `nn.BatchNorm` for each chunk of the batch, and all concatenated."""

    def __init__(self, norm: nn.Module, chunks: int) -> None:
        super().__init__()
        self.norm, self.chunks = norm, chunks

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.norm(chunk) for chunk in x.chunk(self.chunks)])


class OverChannels(nn.Module):
    """A norm over the last axis, as torch's, on the channels of `(N, C, *)`."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x.movedim(1, -1))
        return y.movedim(-1, 1)


def norm_names() -> list[str]:
    """The names that `--norms` takes: bnlight's table, with batch norm in virtual batches after it."""
    return [*NORMS, "virtual"]


def plain_batch_norm(x: Tensor) -> nn.Module:
    """torch's batch norm for input like `x`."""
    return (nn.BatchNorm1d if x.dim() == 2 else nn.BatchNorm2d)(x.size(1), device=x.device)


def layers(norms: Sequence[str], x: Tensor) -> dict[str, nn.Module]:
    """The baseline, and for each name bnlight's layer and its other forms, for input like `x`."""
    n, c = x.shape[:2]
    # On a GPU torch's other kernels want parameters of x's dtype.
    place: dict[str, Any] = {"device": x.device, "dtype": x.dtype}
    chosen: dict[str, nn.Module] = {BASELINE: plain_batch_norm(x)}
    for name in norms:
        if x.dim() == 2 and name in OF_POSITIONS:
            continue
        if name == "virtual":
            chosen[name] = BatchNorm(c, virtual_batch_size=max(1, n // 4), device=x.device)
            chosen["chunked"] = ChunkedBatchNorm(plain_batch_norm(x), min(n, 4))
            continue
        chosen[name] = NORMS[name](c, device=x.device)
        if name == "renorm":
            chosen["naive renorm"] = NaiveBatchRenorm(c).to(x.device)
        elif name == "layer":
            chosen["torch GroupNorm(1,C)"] = nn.GroupNorm(1, c, **place)
            chosen["layer (channels)"] = LayerNorm(c, over="channels", device=x.device)
            chosen["torch LayerNorm"] = OverChannels(nn.LayerNorm(c, **place))
        elif name == "group":
            chosen["torch GroupNorm"] = nn.GroupNorm(GroupNorm(c).num_groups, c, **place)
        elif name == "instance":
            chosen["torch InstanceNorm"] = nn.InstanceNorm2d(c, affine=True, **place)
        elif name == "rms":
            chosen["torch RMSNorm"] = OverChannels(nn.RMSNorm(c, **place))
        elif name == "frn":
            chosen["naive frn"] = NaiveFilterResponseNorm(c).to(x.device)
    return chosen
