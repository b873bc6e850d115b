"""The checks of a model's layers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from bnlight.doctor.case import Case
from bnlight.doctor.finding import Finding
from bnlight.doctor.look import Call
from bnlight.norm import (
    BatchInstanceNorm,
    BatchNorm,
    BatchRenorm,
    FullNorm,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    MeanOnlyBatchNorm,
    Norm,
    RMSNorm,
)
from bnlight.norm.batch import BatchStatistics
from bnlight.surgery.fold import copied
from bnlight.surgery.fold_rules import channels_problem, is_layer, is_norm, layer_problem, needs_rows
from bnlight.surgery.fold_trace import Flow
from bnlight.surgery.synchronized import Synchronized

FEW_VALUES = 16
"""Values per channel: with so many independent ones the variance has a relative error of sqrt(2 / 15), a third."""
FEW_SAMPLES = 8
"""Samples per batch: below 8 errors rise on ImageNet, at 4 by 4 points, at 2 by 11 (Wu and He 2018, figure 1)."""
FEW_TO_ACCUMULATE = 32
"""Samples per batch with which large-batch training keeps its accuracy (Goyal et al. 2017, section 2.3)."""
FAR_APART = 0.5
"""Standard deviations between the means, or log of the ratio of variances, of two calls: as different data have."""


def needs_many(norm: nn.Module) -> bool:
    """Whether a layer normalizes by the batch alone, so that few values harm; others correct or mix it."""
    return isinstance(norm, _BatchNorm | BatchNorm | MeanOnlyBatchNorm | BatchInstanceNorm)


def few_values(case: Case) -> Iterator[Finding]:
    """Batch statistics over too few values or samples."""
    few: dict[tuple[int, int], list[str]] = {}
    local = False
    for norm, path, calls in case.calls():
        if not needs_many(norm) or norm not in case.batch_norms:
            continue
        call = min(calls, key=lambda call: call.values)
        ranks = case.devices if case.is_synchronized(norm) else 1
        samples, values = call.samples * ranks, call.values * ranks
        if values < FEW_VALUES or samples < FEW_SAMPLES:
            few.setdefault((samples, values), []).append(path)
            local = local or not case.is_synchronized(norm)
    if few:
        samples, values = min(few)
        sync = ", synchronize the ranks (sync=world, bnlight.NormSync)" if case.devices > 1 and local else ""
        yield Finding(
            "few_values",
            "warning",
            tuple(path for paths in few.values() for path in paths),
            f"batch statistics of {samples} sample{'s' * (samples > 1)}, {values} value{'s' * (values > 1)} per "
            "channel, are mostly noise",
            f"Use larger batches{sync}, or a norm that needs none: norm=group, layer or renorm",
        )


def accumulation(case: Case) -> Iterator[Finding]:
    """Gradient accumulation does not accumulate statistics."""
    layers = [
        (path, max(call.samples for call in calls))
        for norm, path, calls in case.calls()
        if norm in case.batch_norms and needs_many(norm) and not case.is_synchronized(norm)
    ]
    few = [(path, samples) for path, samples in layers if samples < FEW_TO_ACCUMULATE]
    if case.accumulate > 1 and few:
        samples = few[0][1]
        yield Finding(
            "accumulation",
            "warning",
            tuple(path for path, _ in few),
            f"gradients are accumulated over {case.accumulate} batches, but each is normalized by its own "
            f"{samples} samples, not by {case.accumulate * samples}",
            "Accumulate less and use larger batches, or a norm without batch statistics (norm=group)",
        )


def local_statistics(case: Case) -> Iterator[Finding]:
    """Several ranks, each with statistics of its own."""
    local = [path for norm, path in case.batch_norms.items() if not case.is_synchronized(norm)]
    own = not case.merged
    if case.devices > 1 and local:
        yield Finding(
            "local_statistics",
            "note",
            tuple(local),
            f"each of the {case.devices} ranks normalizes by its own batch"
            + own * " and keeps its own running averages",
            "sync=world (bnlight.NormSync) takes statistics over all ranks"
            + own * "; 'callbacks=[default,reduce_statistics]' (ReduceStatistics) merges the averages",
        )


def one_value_groups(case: Case) -> Iterator[Finding]:
    """Groups of one value, whose output does not depend on the input."""
    alone = []
    for norm, path, calls in case.calls():
        if any(values_of_a_group(norm, call.shape) == 1 for call in calls):
            alone.append(path)
    if alone:
        yield Finding(
            "one_value_groups",
            "warning",
            tuple(alone),
            "each group that is normalized has one value, so the output is the bias whatever the input is",
            "Use fewer groups or features with positions, or no norm at this place (norm=none, torch.nn.Identity)",
        )


def values_of_a_group(norm: Any, shape: tuple[int, ...]) -> int | None:
    """How many values of a sample share their statistics; None for norms whose statistics are not a sample's."""
    axis = getattr(norm, "channel_dim", 1)
    channels, all_values = shape[axis], math.prod(shape[1:])
    match norm:
        case nn.GroupNorm():
            return all_values // norm.num_groups
        case GroupNorm():
            return all_values // norm.num_groups
        case _InstanceNorm():
            tracked = norm.track_running_stats and not norm.training
            return None if tracked or len(shape) < 3 else all_values // channels
        case InstanceNorm():
            return all_values // channels
        case nn.LayerNorm() | nn.RMSNorm():
            return math.prod(norm.normalized_shape)
        case LayerNorm() | RMSNorm():
            return all_values if norm.over == "sample" else channels
    return None


def dropout_before(case: Case) -> Iterator[Finding]:
    """Dropout whose output reaches a batch norm: its variance differs between training and evaluation."""
    if case.look is None or not case.look.dropped:
        return
    look = case.look
    pairs = [(look.paths[norm], dropout) for norm, dropout in look.dropped.items()]
    first = pairs[0][1]
    learned = any(isinstance(norm, BatchRenorm | FullNorm) for norm in look.dropped)  # with their averages
    again = not learned and not case.estimated
    yield Finding(
        "dropout_before",
        "warning",
        tuple(path for path, _ in pairs),
        f"dropout ({look.paths[first]}, p={first.p}) comes before batch statistics: in evaluation the variance is "
        "smaller than the running average",
        "Put dropout behind the last batch norm"
        + again
        * ", or take the statistics again: 'callbacks=[default,precise_statistics]' (bnlight.precise_statistics)",
    )


def shared_layer(case: Case) -> Iterator[Finding]:
    """One layer for different data: its running averages fit neither."""
    mixed = []
    for norm, path, calls in case.calls():
        if norm not in case.batch_norms:
            continue
        for first, second in itertools.pairwise(calls):
            if first.forward == second.forward and _apart(first, second):
                mixed.append(path)
                break
    if mixed:
        yield Finding(
            "shared_layer",
            "warning",
            tuple(mixed),
            "one layer normalizes different data in the same forward: in training each by its own statistics, in "
            "evaluation all by their mixture",
            "Give each place a norm of its own (the layers around it may stay shared)",
        )


def _apart(first: Call, second: Call) -> bool:
    """Whether two calls see data that differ by more than chance: in most channels, or by far."""
    assert first.mean is not None and first.var is not None  # noqa: PT018
    assert second.mean is not None and second.var is not None  # noqa: PT018
    if min(first.compared, second.compared) < FEW_VALUES:
        return False
    between = (first.mean - second.mean).abs() / ((first.var + second.var) / 2 + 1e-12).sqrt()
    ratio = ((first.var + 1e-12) / (second.var + 1e-12)).log().abs()
    chance = 2 / math.sqrt(min(first.compared, second.compared))
    return float(between.median()) > FAR_APART + chance or float(ratio.median()) > FAR_APART + 2 * chance


def checkpointed(case: Case) -> Iterator[Finding]:
    """Activation checkpointing calls the layer again, and torch's moves its averages again."""
    twice = [
        path
        for norm, path, calls in case.calls()
        if isinstance(norm, _BatchNorm) and norm in case.batch_norms and norm.running_mean is not None
        if not isinstance(norm, Synchronized) and any(call.checkpointed for call in calls)
    ]
    if twice:
        yield Finding(
            "checkpointed",
            "warning",
            tuple(twice),
            "activation checkpointing runs these layers twice per step, and torch's move their averages each time",
            "Use bnlight.norm.BatchNorm, which counts a batch once (bnlight.replace_norm(model, 'batch'))",
        )


def frozen_moves(case: Case) -> Iterator[Finding]:
    """Frozen by requires_grad alone: the running averages move on."""
    if not any(parameter.requires_grad for parameter in case.model.parameters()):
        return
    parents = {child: parent for parent in case.paths for child in parent.children()}
    moving = []
    for norm, path in case.batch_norms.items():
        own = [*norm.parameters()]
        around = [*parents[norm].parameters()] if norm in parents else own
        if own and not any(p.requires_grad for p in around) and _follows(norm):
            moving.append(path)
    if moving:
        yield Finding(
            "frozen_moves",
            "warning",
            tuple(moving),
            "the parameters are frozen, but the running averages still move and training uses the batch's statistics",
            "Freeze them too: bnlight.freeze_norm(the frozen part), or call its eval() after each train()",
        )


def _follows(norm: Any) -> bool:
    return norm.running_mean is not None and norm.momentum != 0


def redundant_bias(case: Case) -> Iterator[Finding]:
    """A bias that the next layer subtracts again."""
    cancelling = {path: norm for norm, path in case.norms.items() if _cancels(norm) and _active(case, norm)}
    biased = [m for m in case.paths if is_layer(m) and getattr(m, "bias", None) is not None]
    pairs = ((norm, layer) for norm in cancelling.values() for layer in biased)
    # First the quick question, as following the model's calls takes a while.
    if not any(channels_problem(norm, layer, after=True) is None for norm, layer in pairs):
        return
    copy = copied(case.model, share_parameters=True).eval()
    ends = {m for m in copy.modules() if is_norm(m) or is_layer(m)}
    flow = Flow(copy, ends)
    shapes = {path: {len(call.shape) for call in calls} for _, path, calls in case.calls()}
    found = []
    for path in cancelling:
        norm = copy.get_submodule(path)
        layer = _layer_before(flow, norm)
        if layer is None or getattr(layer, "bias", None) is None or not layer.bias.requires_grad:
            continue
        if channels_problem(norm, layer, after=True) or layer_problem(layer):
            continue
        if needs_rows(norm, layer) and shapes.get(path, {2}) != {2}:
            continue
        found.append(flow.paths[layer])
    if found:
        yield Finding(
            "redundant_bias",
            "note",
            tuple(found),
            "the bias has no effect, as the norm behind it subtracts the mean",
            "Build the layer with bias=False",
        )


def _layer_before(flow: Flow, norm: nn.Module) -> Any:
    """The layer all of whose output goes to this norm, and all of whose input comes from it; None without."""

    def through(module: nn.Module) -> bool:
        return type(module) is nn.Identity

    calls = flow.calls.get(norm, [])
    sources = {flow.source(call, through) for call in calls}
    layer = sources.pop() if len(sources) == 1 else None
    if layer is None or not is_layer(layer) or {norm, layer} & (flow.unseen.keys() | flow.hooked):
        return None
    return layer if all(flow.target(call, through) is norm for call in flow.calls[layer]) else None


def _cancels(norm: Any) -> bool:
    if isinstance(norm, Norm):
        return type(norm).cancels_bias
    return isinstance(norm, _BatchNorm | _InstanceNorm)


def _active(case: Case, norm: nn.Module) -> bool:
    return norm in case.batch_norms or not isinstance(norm, BatchStatistics | _BatchNorm)


LAYER_CHECKS: tuple[Callable[[Case], Iterator[Finding]], ...] = (
    few_values,
    one_value_groups,
    accumulation,
    shared_layer,
    checkpointed,
    frozen_moves,
    dropout_before,
    local_statistics,
    redundant_bias,
)
"""In the order in which they are told."""
