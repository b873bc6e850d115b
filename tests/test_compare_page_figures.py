"""What the page's figures draw in a real browser, held against pandas, scipy and the evidence."""

import itertools

import numpy as np
import pandas as pd
import pytest
from browser import needs_browser
from page_sweeps import (  # noqa: F401
    draw_all,
    open_browser,
    open_tab,
    results,
    rows,
    small_sweep,
    tick,
)
from scipy import stats
from test_compare_builder import scored, write_job, write_metrics

from bnlight.compare import compare
from bnlight.compare.axes import shown

pytestmark = needs_browser


def numbers(tab, title):
    """The table of numbers below a figure: its rows, each entry exact where it is a number."""
    return tab.run(f"""(() => {{
        const named = each => each.querySelector(".chart").ariaLabel === "{title}";
        const figure = [...document.querySelectorAll("figure")].find(named);
        const exact = ({{ dataset: {{ value }}, textContent }}) => value === undefined ? textContent : Number(value);
        return [...figure.querySelectorAll(".numbers tbody tr")].map(row => [...row.cells].map(exact));
    }})()""")


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


def test_lines_over_a_contending_setting_can_be_told_apart(browser, tmp_path):
    for momentum in (0.5, 0.9):
        for size in (4, 8):
            write_job(tmp_path, settings={"optimizer.momentum": momentum, "optimizer.dampening": size})
    tab = browser.open(compare(tmp_path, by=["momentum", "dampening"]).page.as_uri())
    draw_all(tab)
    drawn = tab.run("document.querySelector('.chart').data")
    assert [each["name"] for each in drawn] == ["dampening = 4", "dampening = 8"]
    for part in ("line", "marker"):
        assert drawn[0][part]["color"] != drawn[1][part]["color"]
    named = tab.run(
        "[...document.querySelectorAll('figure:first-of-type .legendtext')].map(each => each.textContent)"
    )
    assert named[:2] == ["dampening = 4", "dampening = 8"]
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


def test_the_figures_of_the_evidence_draw_what_it_found(browser, tmp_path):
    for batch_size in (4, 32):
        for norm, accuracies in {
            "batch": (90, 91, 90.5),
            "group": (80, 82, 81),
            "layer": (81, 79, 80),
        }.items():
            shifted = [(accuracy + batch_size / 10) / 100 for accuracy in accuracies]
            scored(tmp_path, norm, shifted, settings={"data.batch_size": batch_size})
    comparison = compare(tmp_path)
    found = comparison.evidence
    tab = browser.open(comparison.page.as_uri())
    draw_all(tab)
    tab.until("[...document.querySelectorAll('.numbers')].every(each => each.querySelector('table'))")
    ranking = found.ranking
    ranks = list(map(list, zip(ranking.contenders, ranking.mean_ranks, strict=True)))
    assert numbers(tab, "Mean ranks by test accuracy") == ranks
    assert {pair.told_apart for pair in found.pairs} == {True, False}
    for condition in ("batch size = 4", "batch size = 32"):
        wanted = [
            [p.better, p.worse, p.n, p.difference, p.low, p.high, p.p_holm, "yes" if p.told_apart else "no"]
            for p in found.pairs if p.condition == condition
        ]  # fmt: skip
        assert numbers(tab, f"Differences of test accuracy, {condition}") == wanted
        points = next(front for front in found.fronts if front.cost == "seconds").points
        points = points[points["condition"] == condition]
        wanted = [
            [p.contender, p.cost, p.quality, "yes" if p.on_front else "no"] for p in points.itertuples()
        ]
        assert numbers(tab, f"Test accuracy against seconds, {condition}") == wanted
    assert tab.problems == []
    tab.close()


def test_parallel_coordinates_lead_every_done_run_through_its_settings(browser, tmp_path):
    for lr, momentum, batch_size, norm in itertools.product(
        (0.1, 0.2), (0.8, 0.9), (4, 32), ("batch", "group")
    ):
        settings = {"optimizer.lr": lr, "optimizer.momentum": momentum, "data.batch_size": batch_size}
        write_job(
            tmp_path,
            norm=norm,
            settings=settings,
            state="diverged" if lr == 0.2 and norm == "batch" else "done",
        )
    comparison = compare(tmp_path)
    tab = browser.open(comparison.page.as_uri())
    draw_all(tab)
    done = comparison.runs[comparison.runs["state"] == "done"]
    settings = comparison.axes.values[comparison.axes.keys].loc[done.index].map(shown)
    wanted = [
        [job, *values, "0", accuracy]
        for job, values, accuracy in zip(done["job"], settings.to_numpy(), done["test/accuracy"], strict=True)
    ]
    assert sorted(numbers(tab, "Every run through all settings")) == sorted(wanted)
    assert len(wanted) == 12
    tab.close()
