"""What the browser's tests of the page share: sweeps with known results, and how a reader looks and clicks."""

import json
import random
import shutil

import numpy as np
import pandas as pd
import pytest
import yaml
from browser import Browser
from scipy import stats
from test_compare_builder import QUALITY, write_job, write_metrics, write_sweep

from bnlight.compare import compare


@pytest.fixture(scope="module", name="browser")
def open_browser(tmp_path_factory):
    opened = Browser(tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.close()


@pytest.fixture(scope="module", name="small")
def small_sweep(tmp_path_factory):
    """Eleven runs of two norms at two batch sizes, one of which failed."""
    root = tmp_path_factory.mktemp("outputs") / "norms"
    for batch_size, seeds in ((4, (0, 1, 2)), (32, (0, 1))):
        write_sweep(root, ("batch", "group"), seeds, settings={"data.batch_size": batch_size})
    write_job(root, norm="group", seed=2, state="failed", traceback="boom", settings={"data.batch_size": 32})
    return compare(root)


@pytest.fixture(scope="module", name="large")
def large_sweep(tmp_path_factory):
    """A thousand runs: five norms, five batch sizes, four learning rates, ten seeds, 400 validations each."""
    root, chance = tmp_path_factory.mktemp("outputs") / "large", random.Random(0)
    first = write_job(root, norm="batch")
    rows = [{"attempt": 1, "step": s, "epoch": s, "time": s, "val/accuracy": 1 - 1 / (s + 2), "val/loss": 1 / (s + 2)}
            for s in range(400)]  # fmt: skip
    write_metrics(first, rows)
    config = json.loads((first / "result.json").read_text()) | {"config": None}
    kept = (first / "metrics.csv").read_text()
    shutil.rmtree(first)
    for norm in list(QUALITY)[:5]:
        for batch_size in (2, 4, 8, 16, 32):
            for lr in (0.01, 0.03, 0.1, 0.3):
                for seed in range(10):
                    settings = {"data.batch_size": batch_size, "optimizer.lr": lr}
                    job = write_job(root, norm=norm, seed=seed, settings=settings, epochs=1)
                    accuracy = QUALITY[norm] - abs(lr - 0.1) / 10 + chance.gauss(0, 0.01)
                    config["metrics"] = {"test/accuracy": accuracy, "test/loss": 1 - accuracy}
                    (job / "result.json").write_text(json.dumps(config))
                    (job / "metrics.csv").write_text(kept)
    return compare(root)


@pytest.fixture(name="tab")
def open_tab(browser, small):
    opened = browser.open(small.page.as_uri())
    yield opened
    assert opened.problems == []
    opened.close()


def draw_all(tab):
    """Scroll every figure into sight, and wait until it is drawn."""
    tab.run("document.querySelectorAll('details').forEach(each => each.open = true)")
    count = tab.run("document.querySelectorAll('[data-figure]').length")
    for at in range(count):
        tab.run(f"document.querySelector('[data-figure=\"{at}\"]').scrollIntoView({{ behavior: 'instant' }})")
        tab.until(f"document.querySelector('[data-figure=\"{at}\"] .main-svg')")
    return count


def rows(tab):
    """The table as the reader sees it: one dictionary of texts, and exact numbers, per row."""
    return tab.run("""(() => {
        const table = document.getElementById("cells"), heads = [...table.tHead.rows[0].cells];
        const name = ({ dataset: { kind, of } }) => kind === "setting" ? of : kind;
        const seen = ({ textContent: text, dataset: { value, half } }) =>
            ({ text, value: Number(value), half: Number(half) });
        return [...table.tBodies[0].rows].filter(row => row.checkVisibility()).map(row =>
            Object.fromEntries([...row.cells].map((cell, at) => [name(heads[at]), seen(cell)])));
    })()""")


def tick(tab, field, value):
    """Click the box of `value` in the filter called `field`."""
    tab.run(f"""(() => {{
        const fields = [...document.querySelectorAll("#filters fieldset")];
        const found = fields.find(each => each.querySelector("legend").textContent === "{field}");
        const label = [...found.querySelectorAll("label")].find(each => each.textContent === "{value}");
        label.id = "wanted";
    }})()""")
    tab.click("#wanted")
    tab.run("document.getElementById('wanted').removeAttribute('id')")


def expected(results, by):
    """Mean and half-width of the 95 % interval of each group, from the results alone."""
    grouped = results.groupby(by)["test/accuracy"]
    half = stats.t.ppf(0.975, grouped.size() - 1) * grouped.std() / np.sqrt(grouped.size())
    return pd.DataFrame({"mean": grouped.mean(), "half": half, "n": grouped.size()})


def results(comparison):
    """The results of the done jobs, read from their files alone."""
    found = []
    for status in comparison.directory.glob("*/status.json"):
        if json.loads(status.read_text())["state"] != "done":
            continue
        config = yaml.safe_load((status.parent / "config.yaml").read_text())
        row = {"norm": config["job"]["choices"]["norm"], "seed": str(config["seed"])}
        row |= {
            "data.batch_size": str(config["data"]["batch_size"]),
            "optimizer.lr": f"{config['optimizer']['lr']:g}",
        }
        found.append(row | json.loads((status.parent / "result.json").read_text())["metrics"])
    return pd.DataFrame(found)
