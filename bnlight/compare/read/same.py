"""Tell runs apart: each gets a key of its own, and one that is seen twice is counted once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from bnlight.compare.read.run import Run

Place = tuple[str, ...]


def tell_apart(runs: Sequence[Run], notes: list[str]) -> list[Run]:
    """The runs, each with its `key`; a run of W&B that a job's directory shows too is left out.

    A copied directory is the same run twice: counting it as another seed would shrink the interval. So is a sweep
    that ran the same configuration with the same seed. Such a run stays, its state is `duplicate`. Of several, the
    one that is done and still has its own name counts.
    """
    copies: list[tuple[Run, Run]] = []
    views: Counter[tuple[str, str]] = Counter()
    first: dict[str, Run] = {}
    left_out = set()
    for run in sorted(runs, key=_rank):
        there = None if run.folder else f"{run.project}/{run.wandb_id}"
        names = [name for name in (run.row["identity"], run.wandb_id, there) if isinstance(name, str)]
        known = next((first[name] for name in names if name in first), None)
        for name in names:
            if run.folder or name != run.wandb_id:  # which another project may have too; a job knows no more
                first.setdefault(name, known or run)
        if known is None:
            continue
        if run.folder is None and (known.folder or known.wandb_id == run.wandb_id):
            known.row["url"] = known.row["url"] or run.row["url"]
            views[run.source, known.source] += 1
            left_out.add(id(run))
        else:
            copies.append((run, known))
    kept = [run for run in runs if id(run) not in left_out]
    labels = _name(kept)
    for (source, other), count in views.items():
        notes.append(f"{source}: {count} of its W&B runs are in {other} too, counted once")
    elsewhere: Counter[tuple[Place, Place]] = Counter()
    for run, known in copies:
        run.row["state"] = "duplicate"
        if run.place == known.place:
            notes.append(f"{run.key}: the same run as {known.key}, counted once")
        else:
            elsewhere[run.place, known.place] += 1
    for (place, other_place), count in elsewhere.items():
        same = (
            f"{count} run{'s' * (count > 1)} with the configuration and seed of one in {labels[other_place]}"
        )
        notes.append(f"{labels[place]}: {same}, counted once")
    return kept


def _rank(run: Run) -> tuple[bool, ...]:
    return run.folder is None, run.row["state"] != "done", run.row["job"] != run.name


def _name(runs: Sequence[Run]) -> dict[Place, str]:
    """Set every run's key: its name, with the sweep's label before it where there are several; the labels."""
    labels = _labels({run.place for run in runs})
    for run in runs:
        run.key = run.name if len(labels) == 1 else f"{labels[run.place]}/{run.name}"
    seen = Counter(run.key for run in runs)
    for run in runs:  # the names of W&B's runs may be equal
        if seen[run.key] > 1 and run.folder is None:
            run.key = f"{run.key}-{run.wandb_id}"
    return labels


def _labels(places: set[Place]) -> dict[Place, str]:
    """The shortest ends of the places that tell them apart."""
    length = dict.fromkeys(places, 1)
    while True:
        labels = {place: "/".join(place[-size:]) for place, size in length.items()}
        seen = Counter(labels.values())
        clash = [place for place, label in labels.items() if seen[label] > 1 and length[place] < len(place)]
        if not clash:
            return labels
        for place in clash:
            length[place] += 1
