"""An LSTM with a normalization of its gates and its cell at every step."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from bnlight.norm.base import Device, traced
from bnlight.norm.core import converted
from bnlight.norm.sequences import Rows, valid_steps
from bnlight.norm.steps import NormFactory, step_norm

State = tuple[Tensor, Tensor]


class NormLSTM(nn.Module):
    """One layer of LSTM whose input term, hidden term and cell are normalized at every step.

    `(i, f, g, o) = norm(W_ih x) * w_ih + b_ih + norm(W_hh h') * w_hh + b_hh`, `c = sigmoid(f) * c' + sigmoid(i) *
    tanh(g)`, `h = sigmoid(o) * tanh(norm(c) * w_c + b_c)`

    Shapes and results are `torch.nn.LSTM`'s for one layer and one direction: `x` is `(T, N, input_size)`, `(N,
    T, input_size)` with `batch_first=True`, or a PackedSequence; `state` is `(h_0, c_0)`, each `(1, N,
    hidden_size)`, zeros if it is None; the result is `(output, (h_n, c_n))`, with a PackedSequence for a
    PackedSequence. So are the names and shapes of `weight_ih_l0`, `weight_hh_l0`, `bias_ih_l0` and
    `bias_hh_l0`, their initial values and the order of the gates in them. With `norm="none"` the layer is
    `torch.nn.LSTM`, and loads its state dict. Otherwise the biases stand behind the norms, and the norms bring
    w_ih, w_hh, w_c and b_c, the same at all steps: `norm_ih.steps.0.weight` and so on.

    Batch statistics: at each step the mean and variance of the sequences that reach it. Training uses them,
    and moves running averages that every step has for itself; evaluation uses these. Steps that no training
    batch has reached have a copy of the averages of the last step that one has, and the last of `max_length`
    steps serves all that follow, so sequences may be of any length. A step that a single sequence reaches is
    normalized by its running averages (`small_batch="running"`): the tail of a batch of different lengths,
    but also every step of a batch of one.

    Different lengths: padding reaches no result, statistic or gradient. Outputs are 0 there, `h_n` and `c_n`
    are those of each sequence's last valid step, or the initial ones if it has none. Virtual batches take the
    sequences that reach a step from the longest to the shortest. Statistics over several ranks need the same
    number of steps on all of them: pad to one T and give lengths or mask. `torch.compile` makes one graph
    for batches of one length.

    Args:
        norm: a name in `bnlight.norm.NORMS`, None for "none", or a factory called as `norm(channels)`. Where
            its signature has them it also gets `bias`, `device`, `dtype` and `weight_init`, and with batch
            statistics `small_batch="running"` unless it fixes that itself, as functools.partial does; of a
            norm from a config file, only what differs from the layer's defaults counts as fixed.
        max_length: number of steps with statistics of their own, for norms with batch statistics: usually the
            length of the longest training sequence. Those without need none.
        bias: False leaves out the biases, the cell's too.
        weight_init: initial value of the norms' weights; None is what a factory fixes, else 0.1 with batch
            statistics, the paper's, and 1 without.
        noise: standard deviation of Gaussian noise on the initial h in training, where no state is given. It
            keeps the variances of the first steps from 0 where all sequences start alike, and so the gradient
            from growing by `1 / sqrt(eps)` at each of them. None is 0.1 with batch statistics, the authors',
            and 0 without.

    `forward` takes one of `lengths`, `(N,)`, at least 0 and at most T, and `mask`, x's shape without its last
    axis, True for each sequence's first steps; neither with a PackedSequence. ValueError for other shapes,
    for a mask with gaps, for a norm that is unknown or lacks `max_length`; RuntimeError for the state dict of a
    layer with another `max_length`.

    Source: Cooijmans et al. 2016 (arXiv 1603.09025), sections 3 to 5, and for the noise their experiments'
    code; layer norm: Ba et al. 2016 (arXiv 1607.06450), supplement, equations 20 to 22.

    >>> layer = NormLSTM(3, 8, norm="batch", max_length=5)
    >>> output, (h, c) = layer(torch.randn(5, 4, 3), lengths=torch.tensor([5, 2, 3, 3]))
    >>> output.shape, h.shape
    (torch.Size([5, 4, 8]), torch.Size([1, 4, 8]))
    """

    weight_ih_l0: nn.Parameter
    weight_hh_l0: nn.Parameter
    bias_ih_l0: nn.Parameter
    bias_hh_l0: nn.Parameter

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        norm: str | NormFactory | None,
        max_length: int | None = None,
        batch_first: bool = False,
        bias: bool = True,
        weight_init: float | None = None,
        noise: float | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
            if size < 1:
                raise ValueError(f"NormLSTM: {name} must be at least 1, got {size}")
        if noise is not None and noise < 0:
            raise ValueError(f"NormLSTM: noise must not be negative, got {noise}")
        self.input_size, self.hidden_size = input_size, hidden_size
        self.max_length, self.batch_first, self.bias = max_length, batch_first, bias
        gates = 4 * hidden_size
        for name, columns in (("ih", input_size), ("hh", hidden_size)):
            weight = torch.empty(gates, columns, device=device, dtype=dtype)
            setattr(self, f"weight_{name}_l0", nn.Parameter(weight))
        for name in ("ih", "hh") if bias else ():
            setattr(self, f"bias_{name}_l0", nn.Parameter(torch.empty(gates, device=device, dtype=dtype)))
        options = {"bias": False, "weight_init": weight_init, "device": device, "dtype": dtype}
        self.norm_ih = step_norm(norm, gates, max_length, **options)
        self.norm_hh = step_norm(norm, gates, max_length, **options)
        self.norm_cell = step_norm(norm, hidden_size, max_length, **options | {"bias": bias})
        of_batch = self.norm_hh is not None and self.norm_hh.of_batch
        self.noise = (0.1 if of_batch else 0.0) if noise is None else noise
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set weights and biases as `torch.nn.LSTM` does, those of the norms to their initial values."""
        bound = self.hidden_size**-0.5
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -bound, bound)
        for norm in (self.norm_ih, self.norm_hh, self.norm_cell):
            if norm is not None:
                norm.reset_parameters()

    def forward(
        self,
        x: Tensor | PackedSequence,
        state: State | None = None,
        *,
        lengths: Tensor | list[int] | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, State]:
        node: tuple[Tensor, State] | None = traced(self, x, state=state, lengths=lengths, mask=mask)
        if node is not None:
            return node
        if isinstance(x, PackedSequence):
            if lengths is not None or mask is not None:
                raise ValueError("NormLSTM: a PackedSequence has its lengths; leave out lengths and mask")
            self._check_features(x.data)
            sizes = x.batch_sizes.tolist()
            output, state = self._run(Rows(x.data, sizes, sizes[0], x.sorted_indices), state)
            return PackedSequence(output, x.batch_sizes, x.sorted_indices, x.unsorted_indices), state
        if x.dim() != 3:
            axes = "(N, T, input_size)" if self.batch_first else "(T, N, input_size)"
            raise ValueError(f"NormLSTM: expected input {axes}, got shape {tuple(x.shape)}")
        self._check_features(x)
        if self.batch_first:
            x, mask = x.transpose(0, 1), None if mask is None else mask.transpose(0, 1)
        rows = Rows.of(x, valid_steps(x, lengths, mask))
        output, state = self._run(rows, state)
        output = rows.put_back(output, x)
        return output.transpose(0, 1) if self.batch_first else output, state

    def _run(self, rows: Rows, state: State | None) -> tuple[Tensor, State]:
        """The output in the order of the rows, and the last state of each sequence."""
        bias = self.bias_ih_l0 + self.bias_hh_l0 if self.bias else None
        gates = F.linear(rows.data, self.weight_ih_l0, bias if self.norm_ih is None else None)
        h, c = self._initial(rows, state, gates)
        waits = self.norm_hh is not None and self.norm_hh.synchronized
        sizes = rows.sizes if waits else [number for number in rows.sizes if number > 0]
        if self.norm_ih is None:
            terms = [*torch.split(gates, sizes)]
        else:
            terms = self.norm_ih.all_steps(gates, sizes)
            if bias is not None:
                bias = converted(bias, gates.dtype)
                terms = [term + bias for term in terms]
        outputs, ended = [], []
        for step, (term, number) in enumerate(zip(terms, sizes, strict=True)):
            if number < len(h):
                ended.append((h[number:], c[number:]))
                h, c = h[:number], c[:number]
            h, c = self._step(step, term, h, c)
            outputs.append(h)
        if self.training:
            for norm in (self.norm_ih, self.norm_hh, self.norm_cell):
                if norm is not None:
                    norm.extend(sizes)
        output = torch.cat([h[:0], *outputs])
        h, c = (torch.cat(parts) for parts in zip((h, c), *reversed(ended), strict=True))
        if rows.order is not None:
            back = rows.order.argsort()
            h, c = h.index_select(0, back), c.index_select(0, back)
        return output, (h.unsqueeze(0), c.unsqueeze(0))

    def _step(self, step: int, term: Tensor, h: Tensor, c: Tensor) -> State:
        if self.norm_hh is None:
            gates = torch.addmm(term, h, self.weight_hh_l0.t())
        else:
            gates = self.norm_hh(F.linear(h, self.weight_hh_l0), step) + term
        i, f, g, o = gates.chunk(4, 1)
        c = torch.addcmul(f.sigmoid() * c, i.sigmoid(), g.tanh())
        cell = c if self.norm_cell is None else self.norm_cell(c, step)
        return o.sigmoid() * cell.tanh(), c

    def _initial(self, rows: Rows, state: State | None, like: Tensor) -> State:
        shape = (rows.number, self.hidden_size)
        if state is None:
            h = c = like.new_zeros(shape)
            return torch.randn_like(h) * self.noise if self.training and self.noise > 0 else h, c
        for name, value in zip(("h_0", "c_0"), state, strict=True):
            if value.shape != (1, *shape):
                raise ValueError(
                    f"NormLSTM: expected {name} of shape {(1, *shape)}, got {tuple(value.shape)}"
                )
        h, c = (converted(value[0], like.dtype) for value in state)
        if rows.order is not None:
            h, c = h.index_select(0, rows.order), c.index_select(0, rows.order)
        return h, c

    def _check_features(self, x: Tensor) -> None:
        if x.size(-1) != self.input_size:
            raise ValueError(
                f"NormLSTM: expected {self.input_size} features on the last axis, got {x.size(-1)} in shape "
                f"{tuple(x.shape)}; set input_size={x.size(-1)}"
            )

    def extra_repr(self) -> str:
        optional = {
            "batch_first": (self.batch_first, False),
            "bias": (self.bias, True),
            "noise": (self.noise, 0.0),
        }
        shown = [f"{name}={value}" for name, (value, default) in optional.items() if value != default]
        return ", ".join([f"{self.input_size}, {self.hidden_size}", *shown])
