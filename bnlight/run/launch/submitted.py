"""Which jobs a scheduler has been given, by files in the sweep's directory: nothing else knows of one that only waits.

For `bnlight status`, and so that the same command does not submit a job twice.
"""

from __future__ import annotations

from pathlib import Path

from bnlight.run.status import read_json, write_json

FOLDER = ".submitted"  # beside the jobs' directories, which a waiting job does not have yet


def submit(directory: Path, number: str) -> None:
    """Note that the job in `directory` was given to the scheduler as its `number`, such as 7_3."""
    write_json(_file(directory), {"number": number})


def submitted(directory: Path) -> str | None:
    """The scheduler's number of the job; None if it was not submitted, or its end has been seen."""
    number = read_json(_file(directory)).get("number")
    return None if number is None else str(number)


def forget(directory: Path) -> None:
    """The scheduler has no more to do with the job."""
    _file(directory).unlink(missing_ok=True)


def waiting(sweep: Path) -> dict[str, str]:
    """The submitted jobs of a sweep's directory by name, also those that have begun."""
    found = {path.stem: read_json(path).get("number") for path in sweep.glob(f"{FOLDER}/*.json")}
    return {name: str(number) for name, number in found.items() if number is not None}


def has_begun(directory: Path, number: str) -> bool:
    """Whether the job's last attempt is the one that was submitted as `number`."""
    return bool(read_json(directory / "status.json").get("slurm_job") == number)


def _file(directory: Path) -> Path:
    return directory.parent / FOLDER / f"{directory.name}.json"
