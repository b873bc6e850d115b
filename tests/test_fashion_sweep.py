"""A real sweep, `bnlight sweep batch_size` on Fashion-MNIST: its page's numbers, computed again from the raw files.

The archive holds what the jobs left behind (config.yaml, status.json, result.json, metrics.csv). Nothing of
bnlight's reading or statistics is used on the other side: `csv`, `statistics` and scipy alone.
"""

from __future__ import annotations

import csv
import math
import re
import statistics
import tarfile
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from scipy.stats import t, ttest_rel
from statsmodels.stats.multitest import multipletests

from bnlight.compare import Comparison, compare

ROOT = Path(__file__).parents[1]
ARCHIVE = Path(__file__).parent / "data" / "batch_size.tar.xz"
Setting = tuple[int, str, float]  # batch size, norm, learning rate


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder / "batch_size"


@pytest.fixture(scope="module")
def comparison(sweep: Path) -> Comparison:
    return compare(sweep, target=0.75)


@pytest.fixture(scope="module")
def raw(sweep: Path) -> dict[Setting, dict[int, dict[str, float]]]:
    """Of each setting and seed: the best validation accuracy and the test accuracy; none of a diverged run."""
    found: dict[Setting, dict[int, dict[str, float]]] = defaultdict(dict)
    for file in sorted(sweep.glob("*/metrics.csv")):
        config = yaml.safe_load((file.parent / "config.yaml").read_text())
        setting = (config["data"]["batch_size"], config["job"]["choices"]["norm"], config["optimizer"]["lr"])
        with file.open() as lines:
            rows = list(csv.DictReader(lines))
        validations = [float(row["val/accuracy"]) for row in rows if row["val/accuracy"]]
        tests = [float(row["test/accuracy"]) for row in rows if row.get("test/accuracy")]
        if tests:  # a diverged run has none
            found[setting][config["seed"]] = {"val": max(validations), "test": tests[-1]}
        else:
            found[setting].setdefault(-1, {})
    return found


@pytest.fixture(scope="module")
def chosen(
    raw: dict[Setting, dict[int, dict[str, float]]],
) -> dict[tuple[int, str], tuple[float, list[float]]]:
    """Of each batch size and norm: the learning rate best on validation, and its test accuracies by seed."""
    best: dict[tuple[int, str], tuple[float, float]] = {}
    for (size, norm, lr), runs in raw.items():
        if -1 in runs:
            continue
        score = statistics.mean(run["val"] for run in runs.values())
        best[size, norm] = max(best.get((size, norm), (0.0, 0.0)), (score, lr))
    return {
        key: (lr, [run["test"] for _, run in sorted(raw[(*key, lr)].items())])
        for key, (_, lr) in best.items()
    }


class Table(HTMLParser):
    """The texts of the rows of the table called `cells`."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.feed(re.search(r'<table id="cells">.*?</table>', page, re.DOTALL)[0])  # type: ignore[index]

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.replace("\xa0", " ")


def test_all_jobs_of_the_sweep_are_in_the_archive(sweep: Path) -> None:
    params = yaml.safe_load((ROOT / "sweeps" / "batch_size.yaml").read_text())["hydra"]["sweeper"]["params"]
    jobs = math.prod(len(str(values).split(",")) for values in params.values())
    assert len(list(sweep.glob("*/metrics.csv"))) == jobs


def test_the_pages_numbers_are_those_of_the_raw_files(
    comparison: Comparison, chosen: dict[tuple[int, str], tuple[float, list[float]]]
) -> None:
    head, *rows = Table(comparison.page.read_text()).rows
    starred = [row for row in rows if "*" in "".join(row)]
    size, norm, lr, n, result = (
        head.index(name) for name in ("batch size", "norm", "lr", "n", "test accuracy mean ± 95 % CI")
    )
    shown = {(int(row[size]), row[norm]): (row[lr], row[n], row[result]) for row in starred}
    expected = {}
    for key, (rate, values) in chosen.items():
        half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
        result_words = f"{statistics.mean(values):.4f} ± {half:.4f} *"
        expected[key] = (f"{rate:g}", str(len(values)), result_words)
    assert shown == expected


def test_the_verdicts_differences_are_paired_by_seed_and_corrected(
    comparison: Comparison, chosen: dict[tuple[int, str], tuple[float, list[float]]]
) -> None:
    for size in sorted({size for size, _ in chosen}):
        pairs = [pair for pair in comparison.evidence.pairs if pair.condition == f"batch size = {size}"]
        norms = {norm for s, norm in chosen if s == size}
        assert {frozenset((pair.better, pair.worse)) for pair in pairs} == {
            frozenset((a, b)) for a in norms for b in norms if a != b
        }
        values = {norm: chosen[size, norm][1] for norm in norms}
        p = [ttest_rel(values[pair.better], values[pair.worse]).pvalue for pair in pairs]
        corrected = multipletests(p, method="holm")[1]
        for pair, alone, together in zip(pairs, p, corrected, strict=True):
            assert pair.difference == pytest.approx(
                statistics.mean(values[pair.better]) - statistics.mean(values[pair.worse])
            )
            assert pair.p == pytest.approx(alone)
            assert pair.p_holm == pytest.approx(together)


def test_the_readme_shows_this_comparison(comparison: Comparison) -> None:
    readme = " ".join(re.sub(r"^> ?(- )?", "", (ROOT / "README.md").read_text(), flags=re.MULTILINE).split())
    for sentence in (comparison.verdict, *(finding.text for finding in comparison.findings)):
        assert sentence in readme
