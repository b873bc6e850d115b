"""The page in a real browser: all is drawn, nothing is requested, filters are right, a thousand runs are quick."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
import yaml
from browser import needs_browser
from page_sweeps import (  # noqa: F401
    draw_all,
    expected,
    large_sweep,
    open_browser,
    open_tab,
    results,
    rows,
    small_sweep,
    tick,
)
from scipy import stats
from test_compare_builder import write_job, write_metrics

from bnlight.compare import compare

pytestmark = needs_browser


def check(seen, wanted, keys):
    """The table's rows are the groups of `wanted`, with their numbers."""
    assert {tuple(row[key]["text"] for key in keys) for row in seen} == set(wanted.index)
    for row in seen:
        here = wanted.loc[tuple(row[key]["text"] for key in keys)]
        assert int(row["n"]["text"]) == here["n"]
        assert row["interval"]["value"] == pytest.approx(here["mean"], rel=1e-12)
        assert row["interval"]["half"] == pytest.approx(here["half"], rel=1e-9)
        assert row["interval"]["text"].startswith(f"{here['mean']:.4f}\u00a0±\u00a0{here['half']:.4f}")


def test_every_figure_is_drawn_and_nothing_is_requested(tab, small):
    assert draw_all(tab) == 1 + 4 + 4 + 2 + 4
    assert tab.run("[...document.querySelectorAll('figure .chart')].every(chart => chart.data.length > 0)")
    assert tab.requests == {small.page.as_uri()}
    picture = tab.screenshot()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000  # a blank page of this size has 4 kB


def test_a_request_and_an_error_would_have_been_seen(browser, tmp_path):
    control = tmp_path / "control.html"
    control.write_text('<img src="http://127.0.0.1:9/seen.png"><script>throw new Error("seen")</script>')
    tab = browser.open(control.as_uri())
    assert "http://127.0.0.1:9/seen.png" in tab.requests
    assert any("seen" in json.dumps(problem) for problem in tab.problems)
    tab.run("setTimeout(() => Promise.reject(new Error('late')))")
    assert "late" in json.dumps(tab.problems)
    tab.close()


def test_the_policy_stops_a_script_that_is_not_the_page_s_own(browser, small, tmp_path):
    tampered = tmp_path / "tampered.html"
    script = "<script>document.title = 'owned'</script><main>"
    tampered.write_text(small.page.read_text().replace("<main>", script, 1))
    tab = browser.open(tampered.as_uri())
    assert tab.run("document.title") != "owned"
    assert "Content Security Policy" in json.dumps(tab.problems)
    tab.close()


def test_a_filter_leaves_the_numbers_that_pandas_computes_from_the_files(tab, small):
    everything, keys = results(small), ["data.batch_size", "norm"]
    written = rows(tab)
    tick(tab, "seed", "0")
    tick(tab, "seed", "1")
    check(rows(tab), expected(everything[everything["seed"].isin(["0", "1"])], keys), keys)
    tick(tab, "norm", "group")
    two = everything[everything["seed"].isin(["0", "1"]) & (everything["norm"] == "group")]
    check(rows(tab), expected(two, keys), keys)
    assert tab.run("document.querySelectorAll('#runs tbody tr:not([hidden])').length") == 4
    said = tab.run("document.getElementById('filtered').textContent")
    assert "4 of 11 runs" in said
    assert "The verdict, the evidence and the settings chosen (*) remain those of all runs" in said
    assert f"bnlight compare {small.directory} --where norm=group seed=0,1" in said
    assert tab.run("document.querySelector('h1').textContent").replace("\u00a0", " ") == small.verdict
    tab.click("#filtered button")
    assert rows(tab) == written
    assert tab.run("location.hash") == ""


def agreed(tab):
    """The table as Python wrote it, which is what the script computes of all runs."""
    tab.run("document.getElementById('more').click()")
    written = rows(tab)
    for value in ("batch", "group"):  # both of them: the filter is on, and leaves everything
        tick(tab, "norm", value)
    computed = rows(tab)
    assert tab.run("!document.getElementById('filtered').hidden")
    assert len(written) == len(computed)
    for before, after in zip(written, computed, strict=True):
        del before["boot"], after["boot"]
        assert {kind: cell["text"] for kind, cell in before.items()} == {
            kind: cell["text"] for kind, cell in after.items()
        }
    return written


def test_the_script_agrees_with_python_on_the_table_of_all_runs(tab):
    assert len(agreed(tab)) == 4


def averaged(root):
    """Two momenta in each mean, three seeds, one run without the metric, whose name has a sign and a space."""
    for norm in ("batch", "group"):
        for momentum in (0.8, 0.9):
            for seed in range(3):
                known = (norm, momentum, seed) != ("batch", 0.8, 2)
                result = {"test/error %": 9 + 20 * momentum + seed**2} if known else {"test/loss": 0.1}
                settings = {"optimizer.momentum": momentum}
                write_job(root, norm=norm, seed=seed, settings=settings, result=result)
    for seed in (3, 4):  # of a run that diverged before the target the median of the steps must know
        write_job(
            root, norm="batch", seed=seed, state="diverged", epochs=1, settings={"optimizer.momentum": 0.9}
        )
    return compare(root, metric="test/error %", by="norm", tune=[])


def repeated(root):
    """Each seed ran twice, in W&B's eyes: nothing says that the second is a copy."""
    for again in (False, True):
        for norm in ("batch", "group"):
            for seed in range(3):
                result = {"test/accuracy": 0.9 + seed**2 / 100 - 0.05 * again}
                job = write_job(root / f"{again}", norm=norm, seed=seed, result=result)
                config = yaml.safe_load((job / "config.yaml").read_text())
                config["job"]["identity"] += str(again)
                config["paths"] = {"outputs": "outputs"}
                (job / "config.yaml").write_text(yaml.safe_dump(config))
    return compare(root / "False", root / "True", output=root / "both")


def without_a_seed(root):
    """Runs that nobody seeded are repeats of their own."""
    for norm in ("batch", "group"):
        for run in range(3):
            job = write_job(root, norm=norm, seed=run, result={"test/accuracy": 0.9 + run**2 / 100})
            config = yaml.safe_load((job / "config.yaml").read_text())
            del config["seed"]
            (job / "config.yaml").write_text(yaml.safe_dump(config))
    return compare(root)


@pytest.mark.parametrize(
    ("sweep", "means", "runs"), [(averaged, 3, [6, 6]), (repeated, 3, [6, 6]), (without_a_seed, 3, [3, 3])]
)
def test_a_mean_is_over_seeds_with_and_without_a_filter(browser, tmp_path, sweep, means, runs):
    comparison = sweep(tmp_path)
    tab = browser.open(comparison.page.as_uri())
    table = agreed(tab)
    assert [int(row["n"]["text"]) for row in table] == [cell.metric.n for cell in comparison.cells]
    assert [int(row["n"]["text"]) for row in table] == [means, means]
    assert [int(row.get("runs", row["n"])["text"]) for row in table] == runs
    assert [row["interval"]["half"] for row in table] == [cell.metric.half_width for cell in comparison.cells]
    assert tab.problems == []
    tab.close()


def test_the_figures_follow_the_filter(tab, small):
    draw_all(tab)
    tick(tab, "seed", "1")
    tab.run("document.querySelector('[data-figure=\"0\"]').scrollIntoView()")
    tab.until("document.querySelector('[data-figure=\"0\"] .chart').data[0].error_y === undefined")
    everything = results(small)
    drawn = "document.querySelector('[data-figure=\"0\"] .chart').data"
    for trace in tab.run(f"{drawn}.map(({{ name, text, y }}) => ({{ name, text, y }}))"):
        one = everything[(everything["norm"] == trace["name"]) & (everything["seed"] == "1")].copy()
        one.index = one["data.batch_size"]
        assert trace["y"] == one.loc[trace["text"], "test/accuracy"].tolist()


def test_the_learning_curve_is_the_mean_over_seeds_with_its_interval(browser, tmp_path):
    values = ([0.1, 0.5, 0.9], [0.3, 0.7, 0.8])
    for seed, steps in enumerate(((0, 10, 20, 30), (0, 10, 20))):
        rows_ = [{"attempt": 1, "step": s, "epoch": 0, "time": 0, "val/accuracy": v}
                 for s, v in zip(steps, [*values[seed], 0.95], strict=False)]  # fmt: skip
        write_metrics(write_job(tmp_path, seed=seed), rows_)
    tab = browser.open(compare(tmp_path).page.as_uri())
    draw_all(tab)
    band, line = tab.run(
        "document.querySelector('[data-figure=\"0\"] .chart').data.map(({ x, y }) => ({ x, y }))"
    )
    assert line["x"] == [0, 10, 20]  # as far as both got
    assert line["y"] == pytest.approx([0.2, 0.6, 0.85])
    half = stats.t.ppf(0.975, 1) * np.std(values, axis=0, ddof=1) / np.sqrt(2)
    assert band["y"][:3] == pytest.approx(np.array([0.2, 0.6, 0.85]) + half)
    tab.click("[name=band][value=range]")
    tab.until("document.querySelector('[data-figure=\"0\"] .chart').data[0].y[0] === 0.3")
    assert tab.problems == []
    tab.close()


def test_a_learning_curve_over_further_settings_is_a_mean_over_seeds(browser, tmp_path):
    values = {0.8: (0.1, 0.2), 0.9: (0.5, 0.8)}  # by momentum, of two seeds
    for momentum, accuracies in values.items():
        for seed, accuracy in enumerate(accuracies):
            job = write_job(tmp_path, seed=seed, settings={"optimizer.momentum": momentum})
            write_metrics(job, [{"attempt": 1, "step": 0, "epoch": 0, "time": 0, "val/accuracy": accuracy}])
    tab = browser.open(compare(tmp_path, by="norm", tune=[]).page.as_uri())
    draw_all(tab)
    band, line = tab.run("document.querySelector('[data-figure=\"0\"] .chart').data.map(({ y }) => y)")
    assert line == pytest.approx([0.4])
    assert band[0] - line[0] == pytest.approx(stats.t.ppf(0.975, 1) * 0.1)
    assert tab.problems == []
    tab.close()


def test_maps_and_divergence_are_what_pandas_computes(browser, tmp_path):
    counted = []
    for norm, batch_size, lr, seed in itertools.product(
        ("batch", "group"), (4, 32), (0.1, 0.2, 0.3), range(3)
    ):
        lost = norm == "batch" and 10 * lr + seed > 4  # at 0.3 two of three
        settings = {"data.batch_size": batch_size, "optimizer.lr": lr}
        accuracy = batch_size / 100 + lr + seed**2 / 100
        write_job(tmp_path, norm=norm, seed=seed, state="diverged" if lost else "done", settings=settings,
                  result={"test/accuracy": accuracy})  # fmt: skip
        counted.append((norm, str(batch_size), str(lr), lost, np.nan if lost else accuracy))
    table = pd.DataFrame(counted, columns=["norm", "batch size", "lr", "lost", "accuracy"])
    tab = browser.open(compare(tmp_path).page.as_uri())
    draw_all(tab)
    charts = "[...document.querySelectorAll('.chart')]"
    maps = tab.run(f"{charts}.find(({{ data }}) => data[0].type === 'heatmap').data")
    assert [each["name"] for each in maps] == ["batch", "group"]
    for drawn in maps:
        cells = table[table["norm"] == drawn["name"]].groupby(["lr", "batch size"])["accuracy"]
        means = cells.mean().unstack().loc[drawn["y"], drawn["x"]].to_numpy()
        assert np.array(drawn["z"]) == pytest.approx(means)
        counts = cells.count().unstack().loc[drawn["y"], drawn["x"]].to_numpy()
        assert drawn["hovertext"] == [[f"n = {n}" for n in line] for line in counts]
    rates = tab.run(f"{charts}.find(({{ layout }}) => layout.yaxis.title.text === 'diverged runs, %').data")
    for drawn in rates:
        shares = table[table["norm"] == drawn["name"]].groupby("lr")["lost"].mean() * 100
        assert drawn["y"] == pytest.approx(shares.loc[drawn["text"]].tolist())
    assert sorted(each["name"] for each in rates) == ["batch", "group"]
    assert tab.problems == []
    tab.close()


def test_where_settings_share_a_point_survivors_of_divergence_do_not_stand_for_it(browser, tmp_path):
    for lr in (0.1, 0.2):
        for momentum, accuracy in ((0.8, 0.80), (0.9, 0.85)):
            for seed in range(2):
                state = "diverged" if lr == 0.2 and momentum == 0.9 and seed else "done"
                settings = {"optimizer.lr": lr, "optimizer.momentum": momentum}
                result = {"test/accuracy": accuracy}
                job = write_job(tmp_path, seed=seed, state=state, settings=settings, result=result)
                write_metrics(
                    job, [{"attempt": 1, "step": 9, "epoch": 0, "time": 0, "val/accuracy": accuracy}]
                )
    tab = browser.open(compare(tmp_path, tune=["lr", "momentum"]).page.as_uri())
    draw_all(tab)
    line = tab.run("""(() => {
        const titles = ({ layout: { xaxis, yaxis } }) => `${yaxis.title.text} against ${xaxis.title.text}`;
        const charts = [...document.querySelectorAll(".chart")];
        return charts.find(chart => titles(chart) === "test accuracy against lr").data.map(({ text, y }) => [text, y]);
    })()""")
    assert line == [[["0.1", "0.2"], [0.85, 0.80]]]
    tick(tab, "lr", "0.2")  # which nobody's best setting has
    seen = {(row["optimizer.lr"]["text"], row["optimizer.momentum"]["text"]) for row in rows(tab)}
    assert seen == {("0.2", "0.8"), ("0.2", "0.9")}
    tab.close()


def test_a_thousand_runs_load_and_draw_in_two_seconds_and_take_less_than_fifteen_megabytes(browser, large):
    assert len(large.runs) == 1000
    assert large.page.stat().st_size < 15e6
    tab = browser.open("about:blank", height=2400)
    tab.call("Performance.enable")
    tab.go(large.page.as_uri())
    tab.until("document.querySelector('.main-svg')")
    # Of processor time, so that it does not depend on what else this machine does.
    used = {each["name"]: each["value"] for each in tab.call("Performance.getMetrics")["metrics"]}
    assert 0.1 < used["ProcessTime"] < 2, used
    assert tab.problems == []
    tab.close()


def test_a_filter_over_a_thousand_runs_is_right_and_quick(browser, large):
    everything, keys = results(large), ["data.batch_size", "norm", "optimizer.lr"]
    tab = browser.open(large.page.as_uri())
    tab.run("document.getElementById('tried').click()")
    for seed in ("1", "4", "7"):
        tick(tab, "seed", seed)
    tick(tab, "norm", "renorm")
    kept = everything[everything["seed"].isin(["1", "4", "7"]) & (everything["norm"] == "renorm")]
    check(rows(tab), expected(kept, keys), keys)
    took = tab.run("""(() => {
        const begin = performance.now();
        document.querySelector("#filters input").click();
        return performance.now() - begin;
    })()""")
    assert took < 1000
    assert tab.problems == []
    tab.close()
