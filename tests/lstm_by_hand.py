"""The papers' formulas of a normalized LSTM, one sequence and one step at a time, and what tests of it share."""

from typing import Any

import torch
from torch import Tensor, nn

from bnlight.norm import NormLSTM

EPS, MOMENTUM, SIZES = 1e-5, 0.1, (3, 4)
LENGTHS = torch.tensor([2, 6, 0, 4, 4, 6])


def made(norm: Any, *, length: int | None = 6, **options: Any) -> NormLSTM:
    """A float64 layer without noise whose parameters are all different."""
    torch.manual_seed(3)
    options = {"noise": 0.0, "dtype": torch.float64, **options}
    layer = NormLSTM(*SIZES, norm=norm, max_length=length, **options)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -0.8, 0.8)
    return layer


def batch(steps: int = 6, number: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(steps, number, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_hand(layer: NormLSTM, x: Tensor, lengths: Tensor, state: Any, norm: Any) -> Any:
    """The papers' formulas, one sequence and one step at a time; `norm(name, step, rows)` has no affine map."""
    number, hidden = len(lengths), layer.hidden_size
    h, c = (list(s[0]) for s in state) if state else ([x.new_zeros(hidden)] * number for _ in range(2))
    output = [[x.new_zeros(hidden)] * number for _ in x]
    weights = {name: getattr(layer, name).steps[0].weight for name in ("norm_ih", "norm_hh", "norm_cell")}
    for step in range(len(x)):
        here = [n for n in range(number) if lengths[n] > step]
        if not here:
            break
        ih = torch.stack([layer.weight_ih_l0 @ x[step, n] for n in here])
        hh = torch.stack([layer.weight_hh_l0 @ h[n] for n in here])
        ih = norm("norm_ih", step, ih) * weights["norm_ih"] + layer.bias_ih_l0
        hh = norm("norm_hh", step, hh) * weights["norm_hh"] + layer.bias_hh_l0
        cells = []
        for n, gates in zip(here, ih + hh, strict=True):
            i, f, g, o = gates.split(hidden)
            c[n] = torch.sigmoid(f) * c[n] + torch.sigmoid(i) * torch.tanh(g)
            cells.append((c[n], o))
        cell = norm("norm_cell", step, torch.stack([c for c, _ in cells])) * weights["norm_cell"]
        for n, value, (_, o) in zip(here, cell + layer.norm_cell.steps[0].bias, cells, strict=True):
            h[n] = output[step][n] = torch.sigmoid(o) * torch.tanh(value)
    return torch.stack([torch.stack(row) for row in output]), torch.stack(h)[None], torch.stack(c)[None]


def batch_statistics(rows: Tensor) -> Tensor:
    if len(rows) == 1:
        return rows / (1 + EPS) ** 0.5  # by running averages that no batch has moved
    return (rows - rows.mean(0)) / (rows.var(0, correction=0) + EPS).sqrt()


def own_statistics(rows: Tensor) -> Tensor:
    return (rows - rows.mean(1, keepdim=True)) / (rows.var(1, keepdim=True, correction=0) + EPS).sqrt()


def flat(result: Any) -> list[Tensor]:
    output, (h, c) = result
    return [output, h, c]


def gradients(results: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    loss = sum((r * torch.linspace(-1, 2, r.numel(), dtype=r.dtype).view(r.shape)).sum() for r in results)
    return [*torch.autograd.grad(loss, inputs)]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)
