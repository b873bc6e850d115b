"""Put other norms into any model."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parallel import DistributedDataParallel

from bnlight.norm import LayerNorm, Norm
from bnlight.norm.batch import BatchStatistics
from bnlight.norm.paths import named_layers, unwrapped
from bnlight.norm.sync import Meeting
from bnlight.surgery import replace_carry as carry
from bnlight.surgery.dress import own_class, worn
from bnlight.surgery.known import KNOWN, Activated, Known, base_of, known
from bnlight.surgery.replace_factory import Factory, NormFactory, wrong_axis
from bnlight.surgery.replace_groups import Optimizers, as_list, follow
from bnlight.surgery.replace_kinds import MADE, beyond, core_of, is_unseen, obstacle
from bnlight.surgery.replace_places import exchange
from bnlight.surgery.replace_report import Report, Row
from bnlight.surgery.replace_select import Selector, chosen, norms_of, refuse_sharded
from bnlight.surgery.synchronized import Synchronized, synchronize

Subclasses = Literal["refuse", "replace", "skip"]


def replace_norm(
    model: nn.Module,
    norm: str | NormFactory,
    *,
    include: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] | None = None,
    optimizer: Optimizers = None,
    subclasses: Subclasses = "refuse",
) -> Report:
    """Replace the norm layers of a model in place, and return what was replaced, carried, dropped and left.

    From torch's BatchNorm, SyncBatchNorm, GroupNorm, LayerNorm, RMSNorm and InstanceNorm, and from bnlight's own,
    to any norm. The new layer has the old one's weight and bias (the same Parameters), running statistics (the
    same buffers), eps, momentum where it means the same, device, dtype, mode, `requires_grad`, hooks,
    parametrizations, process group and attributes that somebody has set. A layer that is used in several places
    stays one layer. Where the norm is the same, so is the model's output, and the state dict's keys are.

    Everything is checked first: a call that raises has changed nothing. Twice is as good as once.

    Args:
        model: any module that contains norms; a compiled or DDP-wrapped one too.
        norm: a name of `bnlight.norm.NORMS`, or a factory called as `norm(channels)`: a class, a
            `functools.partial`, a function. Arguments that it names (`eps`, `affine`, `bias`, `device`, ...) it gets
            from the old layer, unless it has a value for them. `channel_dim`, if it has that, is -1 for layers that
            come from LayerNorm or RMSNorm; "layer" then means over the channels, else over the sample.
        include, exclude: which norms: a pattern of their paths (`"layer1.*"`; `*` matches dots too), a class, a
            function of path and layer, or several of these.
        optimizer: one or several whose groups shall follow: parameters that are gone leave, with their state; new
            ones join the group of those they stand for.
        subclasses: what becomes of a subclass of a known norm whose own behaviour or state would be lost: "refuse"
            raises, "skip" leaves the layer, "replace" takes it for its base class.

    Raises ValueError for an unknown norm, a pattern that matches no norm, a model that is a norm itself, a factory
    that cannot make a layer for some place, a lazy layer that has seen no input, sharded parameters, and parameters
    that would come or go under DistributedDataParallel; TypeError for a `norm` that cannot be called.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> print(replace_norm(model, "group"))
    replaced 1 of 1 norms: 1 BatchNorm2d by GroupNorm
    path  was          is         carried            dropped
    1     BatchNorm2d  GroupNorm  weight, bias, eps  running statistics, momentum=0.1
    >>> model[1]
    GroupNorm(8, num_groups=2)
    """
    factory, optimizers = Factory(norm), as_list(optimizer)
    if subclasses not in ("refuse", "replace", "skip"):
        raise ValueError(
            f"replace_norm: subclasses must be 'refuse', 'replace' or 'skip', got {subclasses!r}"
        )
    root = unwrapped(model)
    refuse_sharded(model)
    norms = norms_of(root)
    swaps, left = _plan(root, factory, norms, chosen(norms, include, exclude), subclasses)
    gone, fresh = _exchanged(model, swaps)
    if (gone or fresh) and any(isinstance(m, DistributedDataParallel) for m in model.modules()):
        raise ValueError(
            "replace_norm: the new norms have other parameters than the old ones, which DistributedDataParallel would "
            "not notice; replace the norms before it wraps the model"
        )
    notes = _commit(model, root, swaps)
    follow(optimizers, root, gone, fresh)
    if (gone or fresh) and not optimizers:
        notes.append("parameters have come or gone: make optimizers afterwards, or pass optimizer=")
    return _report(norms, swaps, left, notes)


@dataclass(frozen=True)
class _Swap:
    known: Known
    new: nn.Module
    row: Row


def _plan(
    root: nn.Module,
    factory: Factory,
    norms: dict[nn.Module, list[str]],
    wanted: set[nn.Module],
    policy: Subclasses,
) -> tuple[dict[nn.Module, _Swap], dict[nn.Module, str]]:
    """The new layers, ready to take their places, and why others are left; the model is as it was."""
    swaps: dict[nn.Module, _Swap] = {}
    left: dict[nn.Module, str] = {}
    refused: dict[str, list[str]] = {}
    copies: carry.Copies = {}
    made: set[nn.Module] = {*root.modules()}
    for old, paths in norms.items():
        where = f"{paths[0]!r} ({own_class(old).__name__})"
        if (reason := obstacle(old)) or old not in wanted:
            left[old] = reason or "not chosen"
            continue
        if is_unseen(old):
            raise ValueError(
                f"replace_norm: {where} is lazy and has seen no input, so that the number of its channels is unknown; "
                "run a batch through the model first"
            )
        found = known(old)
        assert found is not None
        new = _made(factory, found.norm, root, where)
        if new in made:
            raise ValueError(f"replace_norm: for {where} the factory gave a layer that it had given before")
        made.add(new)
        kind = own_class(old)
        lost = [] if isinstance(new, kind) else beyond(old)
        if lost and policy == "skip":
            left[old] = f"{', '.join(lost)} would be lost"
            continue
        if lost and policy == "refuse":
            refused.setdefault(f"{kind.__name__} would lose its {', '.join(lost)}", []).append(paths[0])
            continue
        row = _row(old, found, new, factory.explicit, copies, lost)
        if _are_the_same(old, new):
            left[old] = "it is so already"
        else:
            swaps[old] = _Swap(found, new, row)
    if refused:
        reasons = (f"{what} ({_some(places)})" for what, places in refused.items())
        raise ValueError(
            f"replace_norm: nothing was replaced: {'; '.join(reasons)}. subclasses='skip' leaves such layers, "
            "subclasses='replace' takes them for their base class, exclude= leaves single ones"
        )
    return swaps, left


def _are_the_same(old: nn.Module, new: nn.Module) -> bool:
    """Whether there is nothing to replace: of bnlight's and torch's layers, the text shows all settings."""
    known_kind = isinstance(new, Norm) or own_class(new) in KNOWN
    if not known_kind or own_class(new) is not own_class(old) or repr(new) != repr(old):
        return False
    buffers = zip(new.buffers(), old.buffers(), strict=True)
    return all(a is b for a, b in zip(new.parameters(), old.parameters(), strict=True)) and all(
        (a.dtype, a.device) == (b.dtype, b.device) for a, b in buffers
    )


def _some(paths: list[str]) -> str:
    return ", ".join(map(repr, paths[:3])) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _made(factory: Factory, old: nn.Module, root: nn.Module, where: str) -> nn.Module:
    try:
        new = factory.make(old, root)
    except Exception as error:
        raise ValueError(f"replace_norm: no layer can be made for {where}: {error}") from error
    if isinstance(new, LazyModuleMixin):
        raise ValueError(
            f"replace_norm: for {where} the factory made a lazy {type(new).__name__}; give the plain class"
        )
    if wrong := wrong_axis(old, new):
        raise ValueError(f"replace_norm: {where} {wrong}")
    return new


def _row(
    old: nn.Module, found: Known, new: nn.Module, explicit: set[str], copies: carry.Copies, lost: list[str]
) -> Row:
    core = core_of(new)
    had = [name for name, _ in [*core.named_parameters(), *core.named_buffers()]]
    carried, dropped = carry.carry_state(old, found, core, explicit, copies)
    new.train(old.training)
    if base_of(new) is None:
        vars(new)[MADE] = True
    for source, target in zip(carry.carry_settings(found.norm, core), (carried, dropped), strict=True):
        target.extend(source)
    if hooks := carry.number_of_hooks(old):
        carried.append(f"{hooks} hook{'s'[: hooks > 1]}")
    carried += [
        behaviour.__name__.lower() for behaviour in worn(old) if behaviour not in (Activated, Synchronized)
    ]
    if (met := carry.carry_meeting(old, core)) is not None:
        (carried if met else dropped).append("process group")
    fresh = [name for name in had if not any(name == other.split(" ")[0] for other in carried)]
    old_name, new_name = own_class(old).__name__, own_class(new).__name__
    return Row("", old_name, new_name, tuple(carried), (*dict.fromkeys(dropped + lost),), tuple(fresh))


def _exchanged(
    model: nn.Module, swaps: dict[nn.Module, _Swap]
) -> tuple[set[Tensor], dict[Tensor, list[Tensor]]]:
    """The parameters that go, and those that come with the ones they stand for: of their name, or of their layer."""
    inside = {module for old in swaps for module in old.modules()}
    before: set[Tensor] = {*model.parameters()}
    after = {p for m in model.modules() if m not in inside for p in m.parameters(recurse=False)}
    come: dict[Tensor, list[Tensor]] = {}
    for old, swap in swaps.items():
        theirs = dict(old.named_parameters())
        for name, parameter in swap.new.named_parameters():
            after.add(parameter)
            if parameter not in before:
                same_name = [theirs[name]] if name in theirs else []
                come.setdefault(parameter, [*same_name, *theirs.values()])
    return {*before} - after, come


def _commit(model: nn.Module, root: nn.Module, swaps: dict[nn.Module, _Swap]) -> list[str]:
    for old, swap in swaps.items():
        carry.carry_hooks(old, swap.new)
        carry.carry_dress(old, swap.known, core_of(swap.new))
    new_of = {id(old): swap.new for old, swap in swaps.items()}
    exchange(model.modules(), new_of)
    _renumber(root, {core_of(swap.new) for swap in swaps.values()})
    return _leave_fast_path(root, {*new_of.values()})


def _renumber(root: nn.Module, new: set[nn.Module]) -> None:
    """Let the synchronized layers meet under the numbers and paths that they have in the model now."""
    kinds = BatchStatistics | Synchronized
    layers: dict[Any, str] = {m: path for path, m in named_layers(root) if isinstance(m, kinds)}
    if not any(layer in new and layer.process_group for layer in layers):
        return
    width = max(1 + 3 * layer.num_features for layer in layers)
    for number, (layer, path) in enumerate(layers.items()):
        if (group := layer.process_group) is not None:
            meeting = Meeting(group, layer=number, path=path, width=width, timeout=layer.meeting.timeout)
            if isinstance(layer, BatchStatistics):
                layer.meeting = meeting
            else:
                synchronize(layer, meeting)


def _leave_fast_path(root: nn.Module, new: set[nn.Module]) -> list[str]:
    """Let torch's encoder layers call their norms, where evaluation would compute a layer norm in their place."""
    off: set[nn.Module] = set()
    for module in root.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and not all(
            norm not in new or _is_torch_layer_norm(norm) for norm in module.children()
        ):
            module.activation_relu_or_gelu = 0
            off.add(module)
    for module in root.modules():
        if isinstance(module, nn.TransformerEncoder) and off & {*module.layers}:
            module.use_nested_tensor = False
    what = "evaluation of nn.TransformerEncoderLayer calls the new norms instead of torch's fused kernel"
    return [what] if off else []


def _is_torch_layer_norm(norm: nn.Module) -> bool:
    if type(norm) is not LayerNorm or (norm.over, norm.channel_dim) != ("channels", -1):
        return False
    return isinstance(norm.weight, nn.Parameter) and isinstance(norm.bias, nn.Parameter)


def _report(
    norms: dict[nn.Module, list[str]],
    swaps: dict[nn.Module, _Swap],
    left: dict[nn.Module, str],
    notes: list[str],
) -> Report:
    rows = []
    for old, paths in norms.items():
        for path in paths:
            row = swaps[old].row if old in swaps else Row("", own_class(old).__name__, reason=left[old])
            rows.append(replace(row, path=path, shared_with="" if path == paths[0] else paths[0]))
    return Report(tuple(rows), tuple(notes))
