"""What the layers share whose statistics come from the batch: running averages, virtual and small batches."""

from typing import Any, ClassVar, Literal, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from bnlight.norm.base import Norm, Shared, new_statistic
from bnlight.norm.core import Moments, converted, snapshot
from bnlight.norm.virtual import VirtualBatches

SmallBatch = Literal["error", "running"]


class Batch(Shared, total=False):
    """Arguments of every layer with batch statistics whose default is the same in all."""

    virtual_batch_size: int | None
    small_batch: SmallBatch


class BatchStatistics(Norm):
    """Base of the layers that normalize by the batch in training and by running averages in evaluation.

    A subclass says what a training batch does (`step`): which affine map follows its normalization, and how
    the averages move.
    """

    cancels_bias: ClassVar[bool] = True

    not_in_torch: ClassVar[tuple[str, ...]] = ()
    """Names of the state that a `torch.nn.BatchNorm*` state dict does not have."""

    track_running_stats = True

    _version = 2  # as torch.nn.BatchNorm: since 2 a state dict has num_batches_tracked

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        *,
        momentum: float | None = 0.1,
        virtual_batch_size: int | None = None,
        small_batch: SmallBatch = "error",
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(num_features, **shared)
        name = type(self).__name__
        if momentum is not None and not 0 <= momentum <= 1:
            raise ValueError(
                f"{name}: momentum must be in [0, 1] or None, got {momentum}. It is the weight of the new "
                "batch, as in torch; a Keras momentum m is 1 - m here"
            )
        if virtual_batch_size is not None and virtual_batch_size < 1:
            raise ValueError(
                f"{name}: virtual_batch_size must be at least 1 or None, got {virtual_batch_size}"
            )
        if small_batch not in ("error", "running"):
            raise ValueError(f"{name}: small_batch must be 'error' or 'running', got {small_batch!r}")
        self.momentum = momentum
        self.virtual_batch_size = virtual_batch_size
        self.small_batch = small_batch
        buffers = {
            "running_mean": new_statistic(0, (num_features,), shared),
            "running_var": new_statistic(1, (num_features,), shared),
            "num_batches_tracked": torch.zeros((), device=shared.get("device"), dtype=torch.long),
        }
        for key, buffer in buffers.items():
            self.register_buffer(key, buffer)

    def reset_running_stats(self) -> None:
        """Set the running mean to 0, the running variance to 1 and the number of batches to 0."""
        if (
            self.running_mean is not None
            and self.running_var is not None
            and self.num_batches_tracked is not None
        ):
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def normalize(self, x: Tensor, valid: Tensor | None) -> Tensor:
        if not self._uses_batch():
            return self._by_running_statistics(x)
        groups, values = self._groups(x)
        if values == 0:
            self._count_batch(1)
        if values == 0 or (values == 1 and valid is None):
            return self._by_running_statistics(x)
        return self._by_batch_statistics(x, valid, groups)

    def step(self, batch: Moments, used: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Move the running averages, in training, and return `core.normalize`'s correction for the K groups.

        The groups' moments, which of them count (`used`, None means all) and the correction are `(K, C)` or,
        for K = 1, `(C,)`. Nothing here enters the gradient.
        """
        raise NotImplementedError

    def follow(self, average: Tensor, values: Tensor, used: Tensor | None) -> None:
        """Move a running average one step towards the mean of the groups' values, in place."""
        if used is None:
            target = values if values.dim() == 1 else values.mean(0)
            average.lerp_(converted(target, average.dtype), self.rate())
        else:
            values, used = values.view(-1, self.num_features), used.view(-1, self.num_features)
            groups = used.sum(0)
            target = (values * used).sum(0) / groups.clamp(min=1)
            average.lerp_(target.to(average.dtype), (self.rate() * (groups > 0)).to(average.dtype))

    def rate(self) -> float:
        """Weight of this batch in the running averages."""
        if self.momentum is None and self.num_batches_tracked is not None:
            return 1 / max(1, int(self.num_batches_tracked))
        return self.momentum or 0.0

    def running_statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Running mean and variance in the dtype of the statistics `like`, 0 and 1 where the layer has none."""
        mean, var = self.running_mean, self.running_var
        if mean is None or var is None:
            mean = torch.zeros(self.num_features, device=like.device, dtype=like.dtype)
            return mean, torch.ones_like(mean)
        mean, var = converted(mean, like.dtype), converted(var, like.dtype)
        if self.training and torch.compiler.is_compiling():
            return snapshot(mean), snapshot(var)
        return mean, var

    def _by_running_statistics(self, x: Tensor) -> Tensor:
        weight, bias = self.full_affine(x)
        mean, var = self.running_statistics(weight)
        if self.training:  # the next batch may move the averages before this one's backward reads them
            mean, var = mean.clone(), var.clone()
        return torch.batch_norm(
            x, weight, bias, mean, var, False, 0.0, self.eps, torch.backends.cudnn.enabled
        )

    def _by_batch_statistics(self, x: Tensor, valid: Tensor | None, groups: int) -> Tensor:
        batches = VirtualBatches(x, valid, groups)
        with torch.no_grad():
            batch = batches.moments()
            used = share = None
            counted: Tensor | int = 1
            if isinstance(batch.number, Tensor):  # Groups with one value or none take the running statistics.
                used = batch.number > 1
                share = torch.where(used, 1 / batch.number, 0)
                counted = (batch.number != 1).any()
                mean, var = self.running_statistics(batch.mean)
                batch = Moments(
                    torch.where(used, batch.mean, mean), torch.where(used, batch.var, var), batch.number
                )
            self._count_batch(counted)
            correction = self.step(batch, used)
        return batches.normalize(*self.full_affine(x), batch, self.eps, correction, share)

    def _count_batch(self, number: Tensor | int) -> None:
        tracked = self.num_batches_tracked if self.training else None
        if tracked is not None:
            tracked.add_(number)

    def _uses_batch(self) -> bool:
        return self.training or not self.track_running_stats

    def _groups(self, x: Tensor) -> tuple[int, int]:
        """Number of virtual batches, and of values per channel in the smallest."""
        values = x.numel() // self.num_features
        if self.virtual_batch_size is None or values == 0:
            return 1, values
        samples = len(x)
        groups = max(1, samples // self.virtual_batch_size)
        return groups, samples // groups * (values // samples)

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        super()._check(x, mask)
        if self.small_batch == "running" or not self._uses_batch():
            return
        groups, values = self._groups(x)
        alone = values == 1
        if mask is not None and values > 0:
            valid = F.pad(mask.reshape(len(x), -1).sum(1), (0, -len(x) % groups)).view(-1, groups).sum(0)
            alone = not torch.compiler.is_compiling() and bool((valid == 1).any())
        if alone:
            raise ValueError(
                f"{self}: input of shape {tuple(x.shape)} leaves one value per channel"
                f"{' in a virtual batch' if groups > 1 else ''}, which has no variance. Use a larger batch, "
                "drop_last=True in the DataLoader, small_batch='running', or a norm without batch statistics "
                "such as LayerNorm or GroupNorm"
            )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        optional = [{prefix + name for name in self.not_in_torch}]
        if (local_metadata.get("version") or 1) < 2:
            optional.append({prefix + "num_batches_tracked"})
        for keys in optional:
            if keys <= set(missing_keys):
                missing_keys[:] = [key for key in missing_keys if key not in keys]
