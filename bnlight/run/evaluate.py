"""`bnlight test` and `bnlight adapt`: finished jobs on other or shifted data, with and without adaptation."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.model_helpers import is_overridden

from bnlight.lightning.build import arguments, instantiate
from bnlight.norm import BatchRenorm
from bnlight.population import adapt_statistics
from bnlight.population.observe import moving_layers
from bnlight.run.isolation import import_targets, isolated, log_to
from bnlight.run.job import CommandError
from bnlight.run.load import job_config, read_checkpoint, restored
from bnlight.run.module import build_data, build_module, monitored
from bnlight.run.overrides import overridden
from bnlight.run.status import read_json, read_status, write_json
from bnlight.run.weights import weights_file


@dataclass(frozen=True)
class Adaptation:
    """To which part of the data statistics are adapted, in how many batches, with how many source samples."""

    part: str = "test"  # or train, val
    batches: int | None = None  # all
    source_samples: float = 0.0
    with_source: bool = (
        False  # norms that train by their averages keep how far those are from the training data
    )


@dataclass(frozen=True)
class Row:
    """One job: its test metrics on its own data, as it was trained, and on these; adapted ones if asked for.

    `adapted` is None for a network without running statistics, which has nothing to adapt.
    """

    job: str
    norm: str
    seed: int | None
    checkpoint: str
    trained: dict[str, float]
    metrics: dict[str, float]
    adapted: dict[str, float] | None = None
    samples: int = 0  # by which it was adapted
    metric: str = ""  # the monitored one of the test, failing that the first
    settings: dict[str, Any] = field(default_factory=dict)  # what else varies between the jobs, seeds aside


def evaluate(
    checkpoint: Path,
    overrides: Sequence[str] = (),
    adaptation: Adaptation | None = None,
    batch_size: int | None = None,
    save: Path | None = None,
) -> Row:
    """Test the job that `checkpoint` belongs to on the test data that `overrides` make of its own.

    With `adaptation` it is tested once more, with statistics adapted to images of those data; labels are not
    used. `save` writes the checkpoint with them.

    Raises CommandError if the data do not fit the network, or the job has no test.
    """
    was = job_config(checkpoint)
    config = overridden(was, overrides)
    if batch_size is not None:
        _set_batch_size(config, batch_size)
    with log_to(Path(os.devnull)), isolated():
        import_targets([was, config])
        if config.get("threads") is not None:
            torch.set_num_threads(config["threads"])
        pl.seed_everything(config["seed"], workers=True, verbose=False)
        own = build_data(was)
        try:
            data = build_data(config)
        except (TypeError, ValueError) as error:
            raise CommandError(f"{' '.join(overrides)}: {error}") from error
        _refuse_other_shapes(own, data)
        saved = read_checkpoint(checkpoint)
        module = restored(build_module(was, own), saved).eval()
        if not is_overridden("test_step", module):
            raise CommandError(f"{type(module).__name__} has no test_step, so there is nothing to test")
        metrics = _tested(config, module, data)
        adapted, samples = None, 0
        if adaptation is not None and moving_layers(module):
            counted = _Counted(_batches(data, adaptation))
            _say_where_averages_began(module, was)
            source = _batches(own, Adaptation("train")) if adaptation.with_source else None
            adapt_statistics(module, counted, source_samples=adaptation.source_samples, source=source)
            adapted, samples = _tested(config, module, data), counted.samples
            if save is not None:
                note = {
                    "bnlight_adapted": {**asdict(adaptation), "samples": samples, "data": list(overrides)}
                }
                torch.save({**saved, "state_dict": module.state_dict(), "metrics": adapted, **note}, save)
        elif save is not None:
            raise CommandError(
                f"{checkpoint} has no running statistics to adapt, so there is nothing to save"
            )
    result = read_json(checkpoint.parent.parent / "result.json").get("metrics", {})
    trained = {name: value for name, value in result.items() if name in metrics and value is not None}
    norm = was["job"]["choices"].get("norm", "?")
    name = _metric(was, metrics)
    return Row(
        was["job"]["name"], norm, was.get("seed"), str(checkpoint), trained, metrics, adapted, samples, name
    )


def _say_where_averages_began(module: pl.LightningModule, config: Mapping[str, Any]) -> None:
    """What a schedule sets on a layer is in no checkpoint: that its averages have forgotten their initial values."""
    targets = [str(callback.get("_target_")) for callback in config["callbacks"].values() if callback]
    if any(target.endswith(".RenormSchedule") for target in targets):
        for layer in module.modules():
            if isinstance(layer, BatchRenorm):
                layer.warm_start = True


def checkpoints(place: Path) -> Iterator[Path]:
    """The checkpoint that `place` is or holds, or those of a sweep's finished jobs; says which it leaves out."""
    if not place.exists():
        raise CommandError(
            f"{place} does not exist: expected a job's or a sweep's directory, or a checkpoint"
        )
    if place.is_file() or (place / "config.yaml").is_file():
        yield weights_file(place)
        return
    found = False
    for job in sorted(path.parent for path in place.glob("*/status.json")):
        state = read_status(job).get("state")
        try:
            if state == "done":
                found = True
                yield weights_file(job)
                continue
            reason = f"it is {state}"
        except FileNotFoundError as error:
            reason = str(error)
        print(f"{job.name}: left out, {reason}", file=sys.stderr)
    if not found:
        raise CommandError(f"{place} holds no finished job: expected a job's or a sweep's directory")


def main(given: list[str], adapt: bool) -> int:
    """The commands; returns the exit code."""
    options = parser(adapt).parse_intermixed_args(given)
    if adapt:
        adaptation = Adaptation(options.to, options.batches, options.source_samples, options.with_source)
        save = options.save
    else:
        adaptation, save = None, None
    rows, lost = [], {}
    try:
        files = list(checkpoints(options.place))
        if save is not None and len(files) > 1:
            raise CommandError(f"--save is for one job, and {options.place} holds {len(files)}")
    except (CommandError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    for file in files:
        try:
            rows.append(evaluate(file, options.overrides, adaptation, options.batch_size, save))
        except Exception as error:  # of one job, maybe in somebody's code; the table has the others
            if len(files) == 1 and not isinstance(error, CommandError | FileNotFoundError):
                raise
            lost[file] = str(error) if isinstance(error, CommandError) else f"{type(error).__name__}: {error}"
    if not rows:
        print("\n".join(dict.fromkeys(lost.values())), file=sys.stderr)
        return 2
    for file, reason in lost.items():
        print(f"{file.parent.parent.name}: left out, {reason}", file=sys.stderr)
    rows = _with_settings(options.place, rows)
    metrics = list(dict.fromkeys(row.metric for row in rows))
    print("\n\n".join(table([r for r in rows if r.metric == metric], metric, adapt) for metric in metrics))
    if adaptation is not None:
        counts = {row.samples for row in rows if row.adapted is not None}
        which = (
            f"{' or '.join(map(str, sorted(counts)))} {adaptation.part} samples" if counts else "no samples"
        )
        print(f"\nadapted: statistics of {which} of the data tested on; their labels are not used")
    if options.json is not None:
        write_json(
            options.json,
            {"metric": metrics[0], "data": options.overrides, "adaptation": adaptation and asdict(adaptation)}
            | {"jobs": [asdict(row) for row in rows]},
        )
    return 1 if lost else 0


def _with_settings(place: Path, rows: Sequence[Row]) -> list[Row]:
    """The rows with what varies between their jobs, by the comparison's own reading of the configs."""
    from bnlight.compare.axes import assign, shown, varying_keys
    from bnlight.compare.read import read_runs

    if len(rows) < 2:
        return list(rows)
    folders = [Path(row.checkpoint).parent.parent for row in rows]
    read = read_runs(*folders)
    axes = assign(varying_keys(read.runs, read.configs), read.configs)
    by_path = {str(path): str(key) for key, path in read.runs["path"].items()}
    varying = [key for key in axes.keys if key != "norm" and key in read.configs]
    settings = [dict(read.configs.loc[by_path[str(folder.absolute())]]) for folder in folders]
    return [
        replace(row, settings={axes.label(key): shown(own[key]) for key in varying})
        for row, own in zip(rows, settings, strict=True)
    ]


def parser(adapt: bool) -> argparse.ArgumentParser:
    """The arguments of `bnlight test` or `bnlight adapt`."""
    name = "adapt" if adapt else "test"
    what = "with the statistics of training and with adapted ones, side by side" if adapt else "once more"
    made = argparse.ArgumentParser(
        prog=f"bnlight {name}",
        description=f"Test a finished job, or all of a sweep, {what}: on its own test data, on others "
        "(data=fashion_mnist), or on a shifted version (data.shift.noise=0.2, .contrast, .brightness, .blur, .rotate, "
        ".invert).",
    )
    made.add_argument(
        "place", type=Path, metavar="DIR|CKPT", help="a job's or a sweep's directory, or a checkpoint"
    )
    made.add_argument("overrides", nargs="*", metavar="key=value", help="of data, trainer or threads")
    made.add_argument("--batch-size", type=_positive, metavar="N", help="samples at once")
    made.add_argument("--json", type=Path, metavar="FILE", help="write everything there too")
    if adapt:
        made.add_argument(
            "--to",
            choices=("test", "train", "val"),
            default="test",
            help="adapt to these samples (default: test)",
        )
        made.add_argument(
            "--batches", type=_positive, metavar="N", help="adapt to so many batches (default: all)"
        )
        made.add_argument(
            "--source-samples",
            type=float,
            default=0.0,
            metavar="N",
            help="count the statistics of training as those of N samples (default: 0)",
        )
        made.add_argument(
            "--with-source",
            action="store_true",
            help="norms that train by running averages (renorm, full) keep how far those are from the training data, "
            "which are read too; for averages that have not converged",
        )
        made.add_argument(
            "--save", type=Path, metavar="FILE", help="write the adapted checkpoint of a single job"
        )
    return made


def table(rows: Sequence[Row], metric: str, adapt: bool) -> str:
    """The rows as text, and below them the mean over the seeds of each norm and setting that has several."""
    heads = ["source", "adapted"] if adapt else ["in training", "here"]
    varying = list(dict.fromkeys(name for row in rows for name in row.settings))
    lines = [["job", "norm", *varying, "seed", *heads, "difference"]]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        setting = (row.norm, *(row.settings.get(name, "-") for name in varying))
        groups.setdefault(setting, []).append(row)
        lines.append([row.job, *setting, str(row.seed), *_numbers([row], metric, adapt)])
    if any(len(group) > 1 for group in groups.values()):
        lines.append([])
        for setting, group in groups.items():
            lines.append([f"mean of {len(group)}", *setting, "", *_numbers(group, metric, adapt)])
    widths = [max(len(line[i]) for line in lines if line) for i in range(len(lines[0]))]
    words = 3 + len(varying)
    text = [
        "  ".join(
            cell.ljust(width) if i < words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=False))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([metric, *text])


def _numbers(rows: Sequence[Row], metric: str, adapt: bool) -> list[str]:
    pairs = [(r.metrics, r.adapted or {}) if adapt else (r.trained, r.metrics) for r in rows]
    both = [(a.get(metric), b.get(metric)) for a, b in pairs]
    before, after = (_mean([pair[side] for pair in both]) for side in (0, 1))
    change = f"{after - before:+.4f}" if before is not None and after is not None else "-"
    return [*("-" if value is None else f"{value:.4f}" for value in (before, after)), change]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _metric(config: Mapping[str, Any], metrics: Mapping[str, float]) -> str:
    """The monitored metric of the test, failing that the first that there is."""
    wanted = (monitored(config)[0] or "").removeprefix("val")
    return next((name for name in metrics if wanted and name == f"test{wanted}"), next(iter(metrics)))


def _tested(config: Mapping[str, Any], module: pl.LightningModule, data: Any) -> dict[str, float]:
    """The test metrics, on one device."""
    trainer = instantiate(
        {**config["trainer"], "devices": 1, "num_nodes": 1, "strategy": "auto"},
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.test(module, datamodule=data, verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if not metrics:
        raise CommandError(
            f"{type(module).__name__} logs nothing in its test_step, so there is nothing to show"
        )
    module.to(trainer.strategy.root_device)
    return metrics


def _batches(data: Any, adaptation: Adaptation) -> Iterable[Any]:
    if adaptation.part != "test":
        data.setup("fit")
    loader = getattr(data, f"{adaptation.part}_dataloader")()
    return itertools.islice(loader, adaptation.batches)


class _Counted:
    """Batches that are counted as they pass."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches
        self.samples = 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.samples += len(batch[0] if isinstance(batch, tuple | list) else batch)
            yield batch


def _refuse_other_shapes(own: Any, data: Any) -> None:
    for name in ("input_shape", "num_classes"):
        was, now = getattr(own, name, None), getattr(data, name, None)
        if (
            was is not None
            and now is not None
            and (tuple(was) if name == "input_shape" else was)
            != (tuple(now) if name == "input_shape" else now)
        ):
            raise CommandError(
                f"the network was built for {name} {was}, but {type(data).__name__} has {now}: choose such data"
            )


def _set_batch_size(config: dict[str, Any], size: int) -> None:
    data = config["data"]
    names = [name for name in ("eval_batch_size", "batch_size") if name in {*data, *arguments(data)}]
    if not names:
        raise CommandError(f"--batch-size: {data['_target_']} takes neither eval_batch_size nor batch_size")
    config["data"] = data | dict.fromkeys(names, size)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 on, not {text}")
    return number
