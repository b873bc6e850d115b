"""The page as text: what it says and carries, that nothing in it loads or runs, and which figures fit a sweep."""

import html
import json
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from test_compare_builder import scored, write_job, write_metrics, write_result, write_sweep

from bnlight.compare import compare
from bnlight.compare.page import data, look, plan

EVIL = '<script>alert(1)</script><b onclick="x()">"\'&'


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    root = tmp_path_factory.mktemp("outputs") / "norms"
    for batch_size in (4, 32):
        write_sweep(root, ("batch", "renorm", "group"), (0, 1, 2), settings={"data.batch_size": batch_size})
    settings = {"data.batch_size": 32}
    write_job(root, norm="tanh", state="failed", traceback=f"RuntimeError: {EVIL}", settings=settings)
    return root


def carried(comparison):
    """The data of the page, as its script reads them."""
    text = re.search(r'id="data">(.*?)</script>', comparison.page.read_text(), re.DOTALL)
    return json.loads(text[1])


def kinds(comparison):
    """The kinds of figures of the page, with how many there are of each."""
    return pd.Series([figure["kind"] for figure in carried(comparison)["figures"]]).value_counts().to_dict()


class Loads(HTMLParser):
    """Collects every attribute that would make a browser load something, and the tags seen."""

    def __init__(self):
        super().__init__()
        self.loads, self.links, self.tags, self.handlers = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        for name, value in attrs:
            if name in ("src", "srcset", "data", "action", "poster") or (tag == "link" and name == "href"):
                self.loads.append(value)
            elif name == "href":
                self.links.append(value)


def parsed(page):
    parser = Loads()
    parser.feed(page.read_text())
    return parser


def test_the_page_opens_with_the_verdict_then_the_table_the_pictures_and_the_evidence(sweep):
    comparison = compare(sweep)
    text = comparison.page.read_text()
    first = re.search(r"<h1>(.*?)</h1>", text)[1]
    assert html.unescape(first).replace("\u00a0", " ") == comparison.verdict
    order = [text.index(part) for part in (
        "<h1>", 'id="filters"', 'id="cells"', "Learning curves", "Pair by pair", "Stability", "Quality against cost",
        "What went wrong", 'id="runs"', "<footer>")]  # fmt: skip
    assert order == sorted(order)
    assert 1e6 < len(text) < 8e6


def test_nothing_in_the_page_loads_from_outside_and_links_are_relative(sweep):
    page = compare(sweep).page
    seen = parsed(page)
    assert seen.loads == []
    assert seen.links
    for link in seen.links:
        assert link.startswith("./")
        assert (sweep / link).exists()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page.read_text())[1]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy.replace("style-src 'unsafe-inline'", "")
    # What `default-src` does not cover.
    assert "base-uri 'none'; form-action 'none'" in policy


def test_links_lead_to_the_runs_from_wherever_the_page_is_written(sweep, tmp_path):
    comparison = compare(sweep, output=tmp_path / "report # 1")
    links = parsed(comparison.page).links
    assert links
    assert all(link.startswith("../") for link in links)
    run = carried(comparison)["runs"]
    assert (comparison.page.parent / run["path"][0] / "job.log").exists()


def test_a_link_is_only_made_of_an_address_of_the_web(sweep):
    comparison = compare(sweep)
    run = comparison.runs.iloc[0].to_dict()
    assert (
        data.links(comparison, run | {"url": "https://wandb.ai/a/b/runs/c"})[1]
        == "https://wandb.ai/a/b/runs/c"
    )
    assert data.links(comparison, run | {"url": "javascript:alert(1)"})[1] is None
    assert data.links(comparison, run | {"path": None, "url": None}) == (None, None)


def test_a_script_in_a_name_is_text(tmp_path):
    root = tmp_path / "norms"
    for seed in (0, 1):
        job = write_job(root, norm="batch", seed=seed)
        config = (job / "config.yaml").read_text()
        (job / "config.yaml").write_text(config.replace("norm: batch", f"norm: {json.dumps(EVIL)}"))
        result = json.loads((job / "result.json").read_text())
        write_result(job, result["metrics"], git="</script><script>alert(2)</script>", hardware={EVIL: EVIL})
    write_job(root, norm="group", state="failed", traceback=f"Error: {EVIL}")
    (root / "<img src=x onerror=alert(3)>").mkdir()
    page = compare(root).page
    text = page.read_text()
    assert html.escape(EVIL) in text
    for words in ("<script>alert", "<img src=x", "<b onclick"):
        assert words not in text
    assert "<" not in re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1]
    seen = parsed(page)
    assert "img" not in seen.tags
    assert seen.handlers == []
    assert seen.tags.count("script") == 3  # the data, plotly, and the page's own


def test_failed_runs_are_marked_and_their_error_can_be_read(sweep):
    text = compare(sweep).page.read_text()
    assert f"RuntimeError: {html.escape(EVIL)}" in text
    assert text.count('<tr class="lost"') == 1
    assert text.count('<td class="job">') == 19


def test_a_sweep_without_results_still_has_a_page_without_figures(tmp_path):
    write_job(tmp_path, state="failed", traceback="boom")
    comparison = compare(tmp_path)
    text = comparison.page.read_text()
    assert "No run has finished" in text
    assert "plotly.js" not in text
    assert carried(comparison)["figures"] == []
    assert len(text) < 1e5


def test_the_page_carries_every_run_with_its_numbers_and_its_config(sweep):
    comparison = compare(sweep)
    page = carried(comparison)
    runs, configs = page["runs"], page["configs"]
    assert sorted(runs["key"]) == sorted(comparison.runs.index)
    expected = comparison.runs.loc[runs["key"], "test/accuracy"]
    given = pd.Series(runs["columns"]["test/accuracy"], dtype=float)
    assert np.array_equal(given, expected, equal_nan=True)
    for key, column in comparison.configs.items():
        if key in configs["same"]:
            assert column.nunique(dropna=False) == 1
            continue
        varying = configs["varying"][key]
        shown = [varying["levels"][code] for code in varying["codes"]]
        assert shown == [data.shown(value) for value in column.loc[runs["key"]]]


def test_histories_are_thinned_to_a_hundred_points_and_keep_their_ends(tmp_path):
    for seed, count in enumerate((1000, 40)):
        rows = [
            {"attempt": 1, "step": s, "epoch": 0, "time": 0, "val/loss": 1 / (s + 3)} for s in range(count)
        ]
        write_metrics(write_job(tmp_path, seed=seed), rows)
    comparison = compare(tmp_path)
    history = carried(comparison)["history"]["val/loss"]
    for run, (grid, values) in enumerate(zip(history["grid"], history["values"], strict=True)):
        steps = history["grids"][grid]
        last = 999 if comparison.runs["seed"].iloc[run] == 0 else 39
        assert len(steps) == len(values) == min(last + 1, 100)
        assert steps[0] == 0
        assert steps[-1] == last
        assert values == pytest.approx([1 / (step + 3) for step in steps], rel=1e-4)


def test_numbers_at_the_edge_of_the_floats_are_carried(tmp_path):
    losses = (5e-324, 1.23456789e-310, 0.0, -1.0, float("nan"), float("inf"), 1.23456789e308)
    rows = [
        {"attempt": 1, "step": s, "epoch": 0, "time": 0, "val/loss": loss} for s, loss in enumerate(losses)
    ]
    write_metrics(write_job(tmp_path), rows)
    history = carried(compare(tmp_path))["history"]["val/loss"]
    assert history["values"] == [[5e-324, 1.2346e-310, 0.0, -1.0, 1.2346e308]]
    assert history["grids"] == [[0, 1, 2, 3, 6]]


def test_a_sweep_over_batch_sizes_and_learning_rates_has_lines_and_maps_and_tells_divergence(tmp_path):
    for batch_size in (4, 32):
        for lr in (0.01, 0.1, 1.0):
            for norm in ("batch", "group"):
                settings = {"data.batch_size": batch_size, "optimizer.lr": lr}
                state = "diverged" if lr == 1.0 and norm == "batch" else "done"
                write_job(tmp_path, norm=norm, settings=settings, state=state)
    comparison = compare(tmp_path)
    page = carried(comparison)
    figures = [f for f in page["figures"] if f["kind"] in ("line", "heat", "divergence")]
    assert [(f["kind"], f.get("x"), f.get("y")) for f in figures] == [
        ("line", "data.batch_size", None),
        ("divergence", "optimizer.lr", None),
        ("line", "optimizer.lr", None),
        ("line", "optimizer.lr", None),
        ("heat", "data.batch_size", "optimizer.lr"),
    ]
    assert {axis["key"]: axis["log"] for axis in page["axes"] if axis["numeric"]} == {
        "data.batch_size": True, "optimizer.lr": True,
    }  # fmt: skip


def test_figures_that_do_not_fit_are_left_out(tmp_path):
    write_sweep(tmp_path / "norms", ("batch", "renorm", "group"), (0, 1, 2))
    only_norms = kinds(compare(tmp_path / "norms"))
    assert only_norms == {"curves": 2, "dots": 2, "ranks": 1, "forest": 1, "front": 2}
    for model in ("cnn", "mlp"):
        for data_ in ("digits", "letters"):
            choices = {"model": model, "data": data_}
            write_sweep(
                tmp_path / "many", ("batch", "group"), (0, 1), choices=choices, settings={"optimizer.lr": 0.1}
            )
            write_sweep(
                tmp_path / "many", ("batch", "group"), (0, 1), choices=choices, settings={"optimizer.lr": 0.2}
            )
    many = kinds(compare(tmp_path / "many"))
    assert many["parallel"] == 1
    assert many["line"] == 4
    assert "heat" not in many


@pytest.mark.parametrize(
    ("values", "log"),
    [([1, 2, 4, 8], True), ([0.001, 0.01, 0.1], True), ([8, 16, 24, 32], False), ([0, 1, 10], False),
     ([4, 32], True), ([20, 30], False), ([3, 5, 7, 9], False), ([0.03, 0.1, 0.3, 1], True)],
)  # fmt: skip
def test_an_axis_is_logarithmic_where_its_values_are_spaced_by_factors(values, log):
    assert data.spaced_by_factors(values) is log


def test_a_contender_keeps_its_look_and_no_two_share_colour_dash_and_marker():
    looks = look.looks(f"norm {i}" for i in range(32))
    assert len({(each["colour"][0], each["dash"], each["symbol"]) for each in looks}) == 32
    first = looks[:8]
    assert len({each["colour"][0] for each in first}) == 8
    assert len({each["symbol"] for each in first}) == 8


def test_filters_are_offered_for_what_varies_and_has_few_values(tmp_path):
    for index in range(14):
        write_job(
            tmp_path, norm="batch" if index % 2 else "group", settings={"optimizer.lr": 0.01 + index / 100}
        )
    fields = {field["key"]: field["levels"] for field in carried(compare(tmp_path))["filters"]}
    assert fields == {"norm": ["batch", "group"]}


def test_the_command_of_the_page_asks_what_was_asked_without_the_filters_it_had(sweep):
    page = carried(compare(sweep, metric="test/loss", where=["norm!=tanh"]))
    assert page["command"] == f"bnlight compare {sweep} --metric test/loss"
    assert page["where"] == ["norm!=tanh"]


def test_the_bars_over_ranks_say_what_they_mean(tmp_path):
    for norm, accuracies in {
        "batch": [0.9, 0.8, 0.9],
        "group": [0.8, 0.9, 0.8],
        "layer": [0.7, 0.85, 0.95],
    }.items():
        scored(tmp_path / "close", norm, accuracies)
    for norm, accuracy in {"batch": 0.9, "group": 0.8, "layer": 0.7}.items():
        scored(
            tmp_path / "apart", norm, [accuracy, accuracy - 0.01, accuracy + 0.01, accuracy, accuracy - 0.02]
        )
    close, apart = compare(tmp_path / "close"), compare(tmp_path / "apart")
    assert close.evidence.ranking.p > 0.05 > apart.evidence.ranking.p
    assert "under one bar are not told apart" in close.page.read_text()
    assert "under one bar differ by less than the critical difference" in apart.page.read_text()


def test_no_two_figures_have_one_name(sweep):
    labels = re.findall(r'class="chart" role="img" aria-label="([^"]*)"', compare(sweep).page.read_text())
    assert len(set(labels)) == len(labels) > 10
    assert all(label.count("batch size = ") <= 1 for label in labels)


def test_another_sweep_stands_on_the_page_when_it_was_compared_with(tmp_path):
    for sweep, shift in (("old", 0.0), ("new", 0.05)):
        for norm in ("batch", "group"):
            scored(tmp_path / sweep, norm, [0.80 + shift, 0.81 + shift, 0.83 + shift])
    comparison = compare(tmp_path / "new", against=tmp_path / "old")
    text = html.unescape(comparison.page.read_text()).replace("\u00a0", " ")
    assert f"<h2>Against {comparison.against.name}</h2>" in text
    assert comparison.against.verdict in text
    rows = re.search(r'<table id="against">.*?<tbody>(.*?)</tbody>', text, re.DOTALL)[1]
    assert rows.count("<tr>") == len(comparison.against.differences) == 2


def test_a_forest_of_many_pairs_keeps_those_with_the_leader(tmp_path):
    for index in range(7):
        scored(tmp_path, f"norm{index}", [0.9 - index / 50, 0.91 - index / 50, 0.9 - index / 60])
    comparison = compare(tmp_path)
    assert len(comparison.evidence.pairs) == 21
    forest = next(figure for figure in plan.evidence(comparison)["pairs"])
    pairs = [comparison.evidence.pairs[at] for at in forest.options["pairs"]]
    assert len(pairs) == 6
    assert all("norm0" in (pair.better, pair.worse) for pair in pairs)
