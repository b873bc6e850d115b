"""How far batch renormalization may correct at each step of a run."""

from torch import nn

from bnlight.norm.renorm import BatchRenorm


def renorm_schedule(
    model: nn.Module,
    step: int,
    total_steps: int,
    *,
    r_max: float = 3.0,
    d_max: float = 5.0,
    warmup: float = 0.04,
    r_max_at: float = 0.32,
    d_max_at: float = 0.2,
) -> int:
    """Set the bounds of every `BatchRenorm` in the model for one optimizer step; return how many there are.

    `r = 1 + (r_max - 1) * rise(r_max_at)` and `d = d_max * rise(d_max_at)`, where `rise(end) = clip((step /
    total_steps - warmup) / (end - warmup), 0, 1)`

    Until `warmup` the bounds are 1 and 0, which is batch norm; then they rise along straight lines. Call it
    before the forward passes of each optimizer step, also of a resumed run: it depends on nothing but its
    arguments. It fills the buffers `r_max` and `d_max` in place, and sets `warm_start`: the running averages
    are plain averages of the batches until `momentum` outweighs those, and never remember their initial
    values. A layer with an `r_min` of its own keeps that.

    Args:
        model: any module; what is not a `BatchRenorm` is left alone.
        step: optimizer steps done so far. Not forward passes: with accumulated gradients, virtual batches or
            passes without a gradient those run ahead.
        total_steps: optimizer steps planned; 125_000 makes the default shares the paper's numbers of steps.
        r_max, d_max: bounds at the end, at least 1 and 0.
        warmup, r_max_at, d_max_at: shares of the run, in [0, 1], at which the warm-up ends and each bound is
            reached.

    Raises ValueError for a negative step, no planned steps, or shares out of order.

    Source: Ioffe 2017 (arXiv 1702.03275), section 4: 5 thousand steps of warm-up, d_max at 25 and r_max at 40
    thousand. The default shares are these of 125 thousand steps, about the length of its experiments.

    >>> layer = BatchRenorm(8)
    >>> for step in (0, 5_000, 15_000, 40_000):
    ...     _ = renorm_schedule(layer, step, 125_000)
    ...     print(f"{step}: {layer.r_max:.2f} {layer.d_max:.2f}")
    0: 1.00 0.00
    5000: 1.00 0.00
    15000: 1.57 2.50
    40000: 3.00 5.00
    """
    if step < 0 or total_steps < 1:
        raise ValueError(
            f"renorm_schedule: expected step >= 0 and total_steps >= 1, got step={step}, "
            f"total_steps={total_steps}"
        )
    if r_max < 1 or d_max < 0:
        raise ValueError(
            f"renorm_schedule: expected r_max >= 1 and d_max >= 0, got r_max={r_max}, d_max={d_max}"
        )
    if not 0 <= warmup <= min(r_max_at, d_max_at) <= max(r_max_at, d_max_at) <= 1:
        raise ValueError(
            "renorm_schedule: expected shares of the run, 0 <= warmup <= r_max_at, d_max_at <= 1, got "
            f"warmup={warmup}, r_max_at={r_max_at}, d_max_at={d_max_at}"
        )
    done = step / total_steps
    r = 1 + (r_max - 1) * _rise(done, warmup, r_max_at)
    d = d_max * _rise(done, warmup, d_max_at)
    layers = [module for module in model.modules() if isinstance(module, BatchRenorm)]
    for layer in layers:
        layer.r_max.fill_(r)
        layer.d_max.fill_(d)
        layer.warm_start = True
    return len(layers)


def _rise(done: float, start: float, end: float) -> float:
    """0 before `start`, 1 from `end` on, a straight line between."""
    if done >= end:
        return 1.0
    return max(0.0, (done - start) / (end - start)) if done > start else 0.0
