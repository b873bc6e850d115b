"""The page, opened in a real browser: everything is drawn, nothing is requested, nothing is injected."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from test_compare_builder import write_job, write_metrics, write_result, write_sweep

from bnlight.compare import compare, figures

BROWSER = next(
    (path for name in ("chromium", "google-chrome", "chromium-browser") if (path := shutil.which(name))), ""
)
needs_browser = pytest.mark.skipif(not BROWSER, reason="needs Chromium")
EVIL = '<script>alert(1)</script><b onclick="x()">"\'&'


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    root = tmp_path_factory.mktemp("outputs") / "norms"
    for batch_size in (4, 32):
        write_sweep(root, ("batch", "renorm", "group"), (0, 1, 2), settings={"data.batch_size": batch_size})
    settings = {"data.batch_size": 32}
    write_job(root, norm="tanh", state="failed", traceback=f"RuntimeError: {EVIL}", settings=settings)
    return root


def browse(page, tmp_path, *flags):
    """Open the page and return the document after its scripts ran, and what the browser logged."""
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=8000",
         *flags, "--dump-dom", page.resolve().as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout, done.stderr


def specs(page):
    """The figures of the page, as they are handed to plotly."""
    text = re.search(r'id="figures">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(text[1])


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


@needs_browser
def test_every_figure_is_drawn_without_an_error_on_the_console(sweep, tmp_path):
    page = compare(sweep).page
    document, log = browse(page, tmp_path)
    assert "CONSOLE" not in log, log
    figure_count = len(specs(page))
    assert figure_count == 1 + 2 * 2 + 2 * 2  # the trend; curves and dots, for each batch size
    assert document.count('<svg class="main-svg"') >= figure_count
    traces = sum(len(spec["data"]) for spec in specs(page).values())
    assert len(re.findall(r'<g class="trace scatter', document)) == traces


def requests_of_the_page(page, tmp_path):
    """The addresses the page asked for; what Chromium asks for itself has no page as its initiator."""
    log = tmp_path / "net.json"
    browse(page, tmp_path, f"--log-net-log={log}")
    events = json.loads(log.read_text())["events"]
    asked = [event["params"] for event in events if "url" in event.get("params", {})]
    return {
        x["url"] for x in asked if x.get("initiator") in ("null", "file://") and x["url"].startswith("http")
    }


@needs_browser
def test_the_browser_requests_nothing_but_the_page(sweep, tmp_path):
    assert requests_of_the_page(compare(sweep).page, tmp_path) == set()
    control = tmp_path / "control.html"
    control.write_text('<img src="http://127.0.0.1:9/seen.png">')
    assert requests_of_the_page(control, tmp_path) == {"http://127.0.0.1:9/seen.png"}


@needs_browser
def test_the_dark_page_repaints_the_figures(sweep, tmp_path):
    page = compare(sweep).page
    light, _ = browse(page, tmp_path)
    dark, log = browse(page, tmp_path, "--blink-settings=preferredColorScheme=0")
    assert "CONSOLE" not in log, log
    for before, after in [figures.PALETTE[0], figures.INK]:
        painted = [f"rgb({triple})".replace(",", ", ") for triple in (before, after)]
        assert painted[0] in light
        assert painted[1] not in light
        assert painted[1] in dark


@needs_browser
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
    document, log = browse(page, tmp_path)
    assert "CONSOLE" not in log, log
    assert html.escape(EVIL) in page.read_text()
    for text in (page.read_text(), document):
        assert "<script>alert" not in text
        assert "<img src=x" not in text
        assert "<b onclick" not in text
    assert "<" not in re.search(r'id="figures">(.*?)</script>', page.read_text(), re.DOTALL)[1]
    names = {trace["name"] for spec in specs(page).values() for trace in spec["data"]}
    assert names == {html.escape(EVIL)}  # plotly reads names as HTML too
    seen = parsed(page)
    assert "img" not in seen.tags
    assert seen.handlers == []
    assert seen.tags.count("script") == 4  # the figures, the colours, plotly, and the page's own


@needs_browser
def test_the_policy_stops_a_script_that_is_not_the_page_s_own(sweep, tmp_path):
    page = compare(sweep).page
    tampered = sweep / "tampered.html"
    tampered.write_text(
        page.read_text().replace("<main>", "<script>document.title = 'owned'</script><main>", 1)
    )
    document, log = browse(tampered, tmp_path)
    tampered.unlink()
    assert "<title>owned" not in document
    assert "Content Security Policy" in log


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
    assert "unsafe-inline'; script" not in policy.replace("style-src 'unsafe-inline'", "")


def test_the_page_opens_with_the_verdict_and_is_about_as_large_as_plotly(sweep):
    comparison = compare(sweep)
    text = comparison.page.read_text()
    first = re.search(r"<h1>(.*?)</h1>", text)[1]
    assert html.unescape(first).replace("\u00a0", " ") == comparison.verdict
    assert text.index("<h1>") < text.index("<table")
    assert 1e6 < len(text) < 8e6


def test_failed_runs_are_marked_and_their_error_can_be_read(sweep):
    text = compare(sweep).page.read_text()
    assert f"RuntimeError: {html.escape(EVIL)}" in text
    assert text.count('<tr class="lost">') == 1
    assert text.count('<td class="job">') == 19


def test_the_curve_is_the_mean_over_seeds_and_the_band_their_range(tmp_path):
    for seed, values in enumerate(([0.1, 0.5, 0.9], [0.3, 0.7, 0.8])):
        steps = zip((0, 10, 20), values, strict=True)
        rows = [{"attempt": 1, "step": s, "epoch": 0, "time": 0, "val/accuracy": v} for s, v in steps]
        write_metrics(write_job(tmp_path, seed=seed), rows)
    comparison = compare(tmp_path)
    curve = figures.mean_curve(comparison.history, list(comparison.runs.index), "val/accuracy")
    assert curve["mean"].tolist() == pytest.approx([0.2, 0.6, 0.85])
    assert curve["low"].tolist() == [0.1, 0.5, 0.8]
    assert curve["high"].tolist() == [0.3, 0.7, 0.9]
    band, line = specs(comparison.page)["figure-0"]["data"]
    assert line["x"] == [0, 10, 20]
    assert line["y"] == pytest.approx([0.2, 0.6, 0.85])
    assert band["y"] == [0.3, 0.7, 0.9, 0.8, 0.5, 0.1]


def test_a_curve_ends_where_its_shortest_run_ends_and_joins_different_steps(tmp_path):
    for seed, steps in enumerate(([0, 10, 20, 30], [0, 20])):
        write_metrics(write_job(tmp_path, seed=seed), [
            {"attempt": 1, "step": s, "epoch": 0, "time": 0, "val/loss": s / 10 + seed} for s in steps
        ])  # fmt: skip
    comparison = compare(tmp_path)
    curve = figures.mean_curve(comparison.history, list(comparison.runs.index), "val/loss")
    assert curve.index.tolist() == [0, 10, 20]
    assert curve["mean"].tolist() == pytest.approx([0.5, 1.5, 2.5])


def test_the_dots_are_the_seeds_and_the_bar_is_the_interval(sweep):
    comparison = compare(sweep)
    cells = [cell for cell in comparison.cells if cell.metric.n and cell.condition == "batch size = 4"]
    figure = figures.dots(cells, "test/accuracy", figures.look_of(comparison.cells))
    for cell, seeds, mean in zip(cells, figure.data[::2], figure.data[1::2], strict=True):
        assert seeds["x"] == cell.done["test/accuracy"].tolist()
        assert mean["x"] == [cell.metric.mean]
        assert mean["error_x"]["array"] == [cell.metric.half_width]


def test_plotly_accepts_every_figure_and_every_axis_says_what_it_shows(sweep):
    from plotly.graph_objects import Figure

    titles = set()
    for spec in specs(compare(sweep).page).values():
        figure = Figure(spec)
        titles.add(figure.layout.xaxis.title.text)
    assert titles == {"batch size", "optimizer steps", "test accuracy", "milliseconds per step"}


def test_a_contender_keeps_its_look_in_every_figure_and_no_two_share_one():
    look = figures.Look([f"norm {i}" for i in range(24)])
    looks = {(look.colour(name), look.dash(name)) for name in look.names}
    assert len(looks) == 24


def test_one_seed_draws_no_band_and_no_bar(tmp_path):
    write_sweep(tmp_path, ("batch", "renorm"), (0,))
    for spec in specs(compare(tmp_path).page).values():
        assert not any("fill" in trace or "error_x" in trace for trace in spec["data"])


def test_a_sweep_without_results_still_has_a_page(tmp_path):
    write_job(tmp_path, state="failed", traceback="boom")
    text = compare(tmp_path).page.read_text()
    assert "No run has finished" in text
    assert "Plotly" not in text
    assert "script-src 'none'" in text
