"""What `bnlight bench norm` compares: bnlight's layers, torch's forms of them, and the formula by autograd."""

import torch
from torch import Tensor, nn

from bnlight.norm import NORMS, BatchNorm, GroupNorm, LayerNorm

BASELINE = "torch BatchNorm"


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


class PermutedLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` over the channels of `(N, C, *)`, which it wants last."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def norm_names() -> list[str]:
    """The names that `--norms` takes: bnlight's table, with batch norm in virtual batches after it."""
    return [*NORMS, "virtual"]


def layers(norms: list[str], x: Tensor) -> dict[str, nn.Module]:
    """The baseline, and for each name bnlight's layer and its other forms, for input like `x`."""
    (n, c), device, dtype = x.shape[:2], x.device, x.dtype
    plain = nn.BatchNorm1d if x.dim() == 2 else nn.BatchNorm2d
    chosen: dict[str, nn.Module] = {BASELINE: plain(c, device=device)}
    for name in norms:
        if name in ("instance", "frn") and x.dim() == 2:
            continue  # one value per channel
        if name == "virtual":
            chosen[name] = BatchNorm(c, virtual_batch_size=max(1, n // 4), device=device)
        else:
            chosen[name] = NORMS[name](c, device=device)
        # On a GPU torch's other kernels want parameters of x's dtype.
        if name == "renorm":
            chosen["naive renorm"] = NaiveBatchRenorm(c).to(device)
        elif name == "layer":
            chosen["torch GroupNorm(1,C)"] = nn.GroupNorm(1, c, device=device, dtype=dtype)
            chosen["layer (channels)"] = LayerNorm(c, over="channels", device=device)
            chosen["torch LayerNorm"] = PermutedLayerNorm(c, device=device, dtype=dtype)
        elif name == "group":
            groups = GroupNorm(c).num_groups
            chosen["torch GroupNorm"] = nn.GroupNorm(groups, c, device=device, dtype=dtype)
        elif name == "instance":
            chosen["torch InstanceNorm"] = nn.InstanceNorm2d(c, affine=True, device=device, dtype=dtype)
    return chosen
