"""The layers that mix the statistics of the batch with those of each sample."""

from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from bnlight.norm.base import Affine, new_parameter, new_statistic
from bnlight.norm.batch import Batch, BatchStatistics
from bnlight.norm.core import Moments, Plan
from bnlight.norm.instances import InstanceMoments
from bnlight.norm.layout import keep_layout
from bnlight.norm.sample import instance_norm, layer_norm


class BatchInstanceNorm(BatchStatistics):
    """Batch-instance normalization: a learned mixture of batch norm and instance norm in each channel.

    `y = (rho * batch_norm(x) + (1 - rho) * instance_norm(x)) * weight + bias`

    `rho`, `(num_features,)`, starts at 1, which is batch norm. It is used clamped to [0, 1], and its gradient
    passes the clamp, so that it can come back. The paper clips `rho` itself after each step, which
    `bnlight.constrain_norm` does, and trains it with ten times the learning rate and no weight decay. Training
    and evaluation differ as in `BatchNorm`, whose arguments these are. See `Norm` for shapes, masks and their
    errors; ValueError for `(N, C)`, which has one value per channel and sample.

    Source: Nam and Kim 2018 (arXiv 1805.07925), section 3.

    >>> import torch
    >>> layer = BatchInstanceNorm(1)
    >>> _ = torch.nn.init.constant_(layer.rho, 0.0)
    >>> layer(torch.tensor([[[1.0, 3.0]], [[10.0, 30.0]]])).detach().round(decimals=2).flatten()
    tensor([-1.,  1., -1.,  1.])
    """

    not_in_torch: ClassVar[tuple[str, ...]] = ("rho",)

    def __init__(self, num_features: int, *, momentum: float | None = 0.1, **options: Unpack[Batch]) -> None:
        super().__init__(num_features, momentum=momentum, **options)
        self.rho = new_parameter(1, (num_features,), options)

    def reset_parameters(self) -> None:
        """Set weight and bias to their initial values and `rho` to 1."""
        super().reset_parameters()
        if hasattr(self, "rho"):
            nn.init.ones_(self.rho)

    def normalize(self, x: Tensor, valid: Tensor | None) -> Tensor:
        weight, bias = self.full_affine(x)
        rho = self.rho.to(weight.dtype)
        rho = rho + (rho.clamp(0, 1) - rho).detach()
        y = self.normalize_batch(x, valid, weight * rho, bias)
        return y + instance_norm(x, valid, weight * (1 - rho), torch.zeros_like(bias), self.eps)

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        super()._check(x, mask)
        if x.dim() == 2:
            raise ValueError(
                f"{self}: expected input with positions, (N, C, *) or (N, *, C), got shape {tuple(x.shape)}, "
                "one value per channel and sample; use BatchNorm or SwitchableNorm here"
            )


class BatchLayerNorm(BatchStatistics):
    """Batch layer normalization: batch norm and layer norm over the channels, weighted by the batch size B.

    `y = (batch_norm(x) * (1 - 1/B - 1e-4) + layer_norm(x) * (1/B - 1e-4)) / sqrt(C) * weight + bias`

    B is the number of samples behind the statistics: the batch, one virtual batch, or the batches of all ranks;
    in evaluation the largest in training so far, buffer `batch_size` (0, before any training: batch norm only).
    The batch part uses the running averages in evaluation, the layer part is always the sample's own. A batch
    of one value per channel is legal. See `Norm` for shapes, masks and their errors.

    Weights and scale are those of the authors' code, oddities included: the two weights sum to 0.9998, at B = 1
    that of the batch is -1e-4, eps is 1e-3, and 1/sqrt(C) makes the output's standard deviation 1/sqrt(C)
    (`scaled=False` leaves it out). Theirs has batch statistics of its own at each position (`spatial=False`),
    for inputs of one spatial size; takes B from its configuration; and replaces the layer part's statistics,
    if asked, by averages over the batch's slots, which shuffled data make meaningless and which are not here.

    Args:
        num_features: number of channels C.
        momentum, virtual_batch_size: as in `BatchNorm`.
        spatial: True pools the positions in the batch statistics. False keeps statistics per position: buffers
            of shape `(C, *)`, with `channel_dim=-1` `(C, positions, 1)`, from the first training batch or the
            loaded state on (before wrapping in DDP).
        scaled: whether to divide by sqrt(C).

    Source: Ziaee and Cano 2022 (arXiv 2209.08898) and the authors' code.

    >>> import torch
    >>> layer = BatchLayerNorm(4, scaled=False)
    >>> layer(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).detach().round(decimals=1)  # one sample: layer norm
    tensor([[-1.3000, -0.4000,  0.4000,  1.3000]])
    """

    cancels_bias: ClassVar[bool] = False
    not_in_torch: ClassVar[tuple[str, ...]] = ("batch_size",)
    too_few: ClassVar[int] = 0

    batch_size: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        momentum: float | None = 0.1,
        spatial: bool = True,
        scaled: bool = True,
        virtual_batch_size: int | None = None,
        eps: float = 1e-3,
        **shared: Unpack[Affine],
    ) -> None:
        super().__init__(
            num_features,
            momentum=momentum,
            virtual_batch_size=virtual_batch_size,
            small_batch="running",
            eps=eps,
            **shared,
        )
        self.spatial, self.scaled = spatial, scaled
        self.register_buffer("batch_size", new_statistic(0, (), shared))

    def reset_running_stats(self) -> None:
        """Set the running mean to 0, the running variance to 1, the number and size of batches to 0."""
        super().reset_running_stats()
        self.batch_size.zero_()

    def normalize(self, x: Tensor, valid: Tensor | None) -> Tensor:
        weight, bias = self.full_affine(x)
        batch_weight, batch_bias, rows = weight, bias, x
        if not self.spatial and x.dim() > 2:
            rows = x.flatten(1)
            batch_weight, batch_bias = (v.repeat_interleave(x.shape[2:].numel()) for v in (weight, bias))
            valid = None if valid is None else valid.expand_as(x).flatten(1)
            self._keep_positions(x.shape[2:])
        if self.takes_batch(rows, valid):
            batches = self.virtual_batches(rows, valid)
            plan = self.plan_for(rows, batches.moments())
            assert plan.correction is not None
            y = batches.normalize(batch_weight, batch_bias, plan, self.eps, self.way_back(plan))
            batch_part = plan.correction[0][..., 0]  # (K,) or one number
        else:
            batch_part = self._batch_part(1 / self.batch_size.clamp(min=1) * (self.batch_size > 0))
            y = self.by_running_statistics(rows, valid, batch_weight * batch_part, batch_bias)
        y = y if rows is x else keep_layout(y.view(x.shape), x)
        layer_part = self._scale() * (1 - 2e-4) - batch_part.to(weight.dtype)
        if layer_part.dim() == 0:
            return y + layer_norm(x, weight * layer_part, torch.zeros_like(bias), self.eps)
        # Sample n has the weight of its virtual batch n mod K.
        per_sample = layer_part.repeat(-(-x.size(0) // len(layer_part)))[: x.size(0)].view(
            -1, *[1] * (x.dim() - 1)
        )
        layer = layer_norm(x, weight, torch.zeros_like(bias), self.eps)
        return y + (layer * per_sample).to(x.dtype)

    def plan(self, batch: Moments) -> Plan:
        samples = torch.zeros_like(batch.mean) + batch.samples
        if self.training:
            self.batch_size.copy_(torch.maximum(self.batch_size, samples.max()))
        part = self._batch_part(1 / samples.clamp(min=1))
        return Plan(batch.mean, batch.var, correction=(part, torch.zeros_like(batch.mean)))

    def update(self, mean: Tensor, spread: Tensor, rate: float | Tensor) -> None:
        assert self.running_mean is not None
        shape = self.running_mean.shape
        rate = rate.view(shape) if isinstance(rate, Tensor) and rate.dim() else rate
        super().update(mean.view(shape), spread.view(shape), rate)

    def running_statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = super().running_statistics(like)
        return mean.flatten(), var.flatten()

    def _scale(self) -> float:
        return self.num_features**-0.5 if self.scaled else 1.0

    def _batch_part(self, inverse: Tensor) -> Tensor:
        return self._scale() * (1 - inverse - 1e-4)

    def _keep_positions(self, positions: tuple[int, ...]) -> None:
        """Give the running averages a value at each position, if they have one per channel."""
        wanted = (self.num_features, *positions)
        for name in ("running_mean", "running_var"):
            buffer = self.get_buffer(name)
            if buffer.dim() == 1:
                buffer = buffer.view(-1, *[1] * len(positions)).expand(wanted).clone()
                setattr(self, name, buffer)
            if buffer.shape != wanted:
                raise ValueError(
                    f"{self}: expected positions {tuple(buffer.shape[1:])}, as in the batches before, got "
                    f"{tuple(positions)}; spatial=True takes inputs of any size"
                )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in ("running_mean", "running_var"):
            saved, own = state_dict.get(prefix + name), self.get_buffer(name)
            if not self.spatial and isinstance(saved, Tensor) and saved.shape[:1] == own.shape[:1]:
                setattr(self, name, own.new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *rest)


class SwitchableNorm(BatchStatistics):
    """Switchable normalization: learned mixtures of the means and variances of instance, layer and batch norm.

    `y = (x - sum(p * means)) / sqrt(sum(q * variances) + eps) * weight + bias`

    with `p = softmax(mean_weight)` and `q = softmax(var_weight)`, three numbers each, for (instance, layer,
    batch), initially equal. Instance statistics are of one channel of a sample, layer statistics of the whole
    sample. All variances are biased ones. Training and evaluation differ in the batch's share as in `BatchNorm`,
    whose arguments these are. See `Norm` for shapes, masks and their errors.

    Source: Luo et al. 2019 (arXiv 1806.10779), equations 3 to 5.

    >>> import torch
    >>> SwitchableNorm(2)(torch.tensor([[[1.0, 3.0], [5.0, 7.0]]])).detach().round(decimals=2)
    tensor([[[-1.0900,  0.2200],
             [-0.2200,  1.0900]]])
    """

    cancels_bias: ClassVar[bool] = False
    not_in_torch: ClassVar[tuple[str, ...]] = ("mean_weight", "var_weight")

    def __init__(self, num_features: int, *, momentum: float | None = 0.1, **options: Unpack[Batch]) -> None:
        super().__init__(num_features, momentum=momentum, **options)
        self.mean_weight = new_parameter(1, (3,), options)
        self.var_weight = new_parameter(1, (3,), options)

    def reset_parameters(self) -> None:
        """Set weight and bias to their initial values and the shares of the mixtures to equal ones."""
        super().reset_parameters()
        if hasattr(self, "mean_weight"):
            nn.init.ones_(self.mean_weight)
            nn.init.ones_(self.var_weight)

    def normalize(self, x: Tensor, valid: Tensor | None) -> Tensor:
        weight, bias = self.full_affine(x)
        takes_batch = self.takes_batch(x, valid)
        samples = InstanceMoments(x, valid)
        mean, var = samples.mean, samples.var
        layer_mean = mean.mean(1, keepdim=True)
        layer_var = (var + (mean - layer_mean).square()).mean(1, keepdim=True)
        if takes_batch:
            batch_mean, batch_var = self._of_batch(x, samples)
        else:
            batch_mean, batch_var = self.evaluation_statistics(samples)
        p, q = (shares.to(mean.dtype).softmax(0) for shares in (self.mean_weight, self.var_weight))
        return samples.normalize(
            p[0] * mean + p[1] * layer_mean + p[2] * batch_mean,
            q[0] * var + q[1] * layer_var + q[2] * batch_var,
            weight,
            bias,
            self.eps,
        )

    def _of_batch(self, x: Tensor, samples: InstanceMoments) -> tuple[Tensor, Tensor]:
        """Mean and variance of each sample's batch, `(N, C)` or `(1, C)`, differentiable."""
        groups, _ = self._groups(x)
        plan = self.plan_for(x, samples.merged(groups))
        return samples.of_batch(plan, groups, self.way_back(plan))
