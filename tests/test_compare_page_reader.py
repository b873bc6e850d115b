"""What a reader does with the page: clicks, types, saves, prints, takes a phone, turns the light off."""

import re
import xml.etree.ElementTree as ElementTree

import pandas as pd
import pytest
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
from test_compare_builder import scored, write_job, write_sweep

from bnlight.compare import compare
from bnlight.compare.palette import hexadecimal

pytestmark = needs_browser


def test_the_address_holds_the_filter_and_the_run_that_is_open(browser, small):
    key = str(small.runs.index[0])
    tab = browser.open(f"{small.page.as_uri()}#seed=1&norm=group&run={key}")
    assert {row["norm"]["text"] for row in rows(tab)} == {"group"}
    assert tab.run("document.getElementById('panel').open")
    assert tab.run("document.getElementById('panel-title').textContent") == small.runs["job"].iloc[0]
    tab.key("Escape")
    tab.until("!document.getElementById('panel').open")
    tab.until("decodeURIComponent(location.hash) === '#norm=group&seed=1'")
    tab.close()


def click_point(tab, trace):
    """Click the first point of a trace of the first figure with one row per contender."""
    x, y = tab.run(f"""(() => {{
        const figures = [...document.querySelectorAll("figure")];
        const dots = figures.find(each => each.querySelector(".chart").layout.yaxis.ticktext?.includes("batch"));
        dots.scrollIntoView({{ block: "center", behavior: "instant" }});
        const points = dots.querySelectorAll(".scatterlayer .trace")[{trace}].querySelector(".points path");
        const box = points.getBoundingClientRect();
        return [box.x + box.width / 2, box.y + box.height / 2];
    }})()""")
    tab.click_at(x, y)
    tab.until("document.getElementById('panel').open")
    return tab.run("document.getElementById('panel-title').textContent")


def test_a_click_on_a_point_leads_to_its_run(tab, small):
    draw_all(tab)
    run = small.runs[small.runs["job"] == click_point(tab, 0)].iloc[0]
    panel = tab.run("document.getElementById('panel').textContent")
    assert f"{run['test/accuracy']:.4f}" in panel
    assert "data.batch_size" in panel
    links = tab.run("[...document.querySelectorAll('#panel a')].map(each => each.getAttribute('href'))")
    assert [link.rpartition("/")[2] for link in links] == ["", "job.log", "config.yaml"]
    assert all((small.output / link).exists() for link in links)


def test_a_click_on_a_mean_leads_to_the_runs_behind_it(tab, small):
    draw_all(tab)
    assert click_point(tab, 1) == "3 runs behind this point"
    listed = tab.run("[...document.querySelectorAll('#panel li button')].map(each => each.textContent)")
    assert len(small.runs[small.runs["job"].isin(listed) & (small.runs["batch_size"] == 4)]) == 3
    tab.click("#panel li:nth-child(2) button")
    assert tab.run("document.getElementById('panel-title').textContent") == listed[1]
    assert tab.run("document.activeElement.className") == "close"  # what had the focus is gone


def test_an_address_pasted_into_the_open_page_opens_its_run(tab, small):
    tab.run(f"location.hash = 'norm=group&run={small.runs.index[0]}'")
    tab.until("document.getElementById('panel').open")
    assert tab.run("document.getElementById('panel-title').textContent") == small.runs["job"].iloc[0]
    assert {row["norm"]["text"] for row in rows(tab)} == {"group"}


def test_a_figure_that_a_filter_has_emptied_comes_back_with_its_links(browser, tmp_path):
    write_sweep(tmp_path, ("batch", "group"), (0, 1))
    write_job(tmp_path, seed=2, state="failed", traceback="boom")
    tab = browser.open(compare(tmp_path).page.as_uri())
    draw_all(tab)
    tick(tab, "seed", "2")
    tab.run("document.querySelector('figure').scrollIntoView({ behavior: 'instant' })")
    tab.until("document.querySelector('figure').classList.contains('empty')")
    assert tab.run("document.querySelector('.chart').textContent").startswith(
        "Filter and legend leave nothing"
    )
    assert not tab.run("document.querySelector('figure .tools').checkVisibility()")
    tab.click("#filtered button")
    draw_all(tab)
    assert click_point(tab, 1) == "2 runs behind this point"
    assert tab.problems == []
    tab.close()


def test_everything_can_be_reached_by_the_keyboard_and_the_focus_is_seen(tab):
    seen = []
    for _ in range(200):
        tab.key("Tab")
        seen.append(
            tab.run("""(() => {
            const at = document.activeElement, style = getComputedStyle(at.closest("label") ?? at);
            const name = at.id || at.name || at.textContent.trim().slice(0, 12) || at.tagName;
                return [name, style.outlineStyle !== "none"];
        })()""")
        )
        if seen[-1][0].startswith("batch-cnn"):
            break
    names = [name for name, _ in seen]
    assert all(outlined for _, outlined in seen)
    assert names[0] == "theme"
    order = [names.index(name) for name in ("theme", "0", "more", "CSV", "Numbers", "SVG")]
    assert order == sorted(order)
    assert seen[-1][0].startswith("batch-cnn"), names
    tab.key("Enter", "\r")
    tab.until("document.getElementById('panel').open")
    assert tab.run("document.getElementById('panel').contains(document.activeElement)")
    tab.key("Escape")
    tab.until("!document.getElementById('panel').open")
    tab.run("document.querySelector('#filters input').focus()")
    tab.key(" ", " ")
    assert tab.run("!document.getElementById('filtered').hidden")


def test_the_runs_are_sorted_by_a_column_up_and_down_and_the_missing_come_last(tab, small):
    head = "[...document.querySelectorAll('#runs th')].find(each => each.textContent === 'test accuracy')"
    column = f"[...document.querySelectorAll('#runs tbody tr')].map(row => row.cells[{head}.cellIndex].dataset.value)"
    ordered = sorted(small.runs["test/accuracy"].dropna())
    for order, wanted in (("ascending", ordered), ("descending", ordered[::-1])):
        tab.run(f"{head}.querySelector('button').click()")
        assert tab.run(f"{head}.ariaSort") == order
        seen = tab.run(column)
        assert [float(value) for value in seen[:-1]] == wanted
        assert seen[-1] is None  # it failed


def test_a_contender_can_be_hidden_in_all_figures(tab):
    draw_all(tab)
    tab.click(".legend button")
    assert tab.run("document.querySelector('.legend button').getAttribute('aria-pressed')") == "false"
    tab.run("document.querySelector('[data-figure=\"0\"]').scrollIntoView()")
    tab.until(
        "document.querySelector('[data-figure=\"0\"] .chart').data.every(trace => trace.name !== 'batch')"
    )


def test_every_table_is_saved_as_csv_latex_and_markdown(browser, tab, small):
    everything = expected(results(small), ["data.batch_size", "norm"])
    kinds = {"CSV": "table.csv", "LaTeX": "table.tex", "Markdown": "table.md"}
    saved = {}
    for at, (kind, name) in enumerate(kinds.items()):
        tab.click(f".exports[data-table=cells] button:nth-child({at + 1})")
        saved[kind] = browser.downloaded(name).decode()
    (small.output / "saved.csv").write_text(saved["CSV"])
    table = pd.read_csv(small.output / "saved.csv").set_index(["batch size", "norm"])
    for (batch_size, norm), row in everything.iterrows():
        here = table.loc[(int(batch_size), norm)]
        assert here["test accuracy mean"] == row["mean"]
        assert here["± 95 % CI"] == pytest.approx(row["half"], rel=1e-12)
    lines = saved["LaTeX"].splitlines()
    assert lines[0] == r"\begin{tabular}{llrlrrrr}"
    assert lines[-1] == r"\end{tabular}"
    row = everything.loc[("4", "batch")]
    assert any(
        f"4 & batch & 3 & & {row['mean']:.4f} $\\pm$ {row['half']:.4f}".replace(" & & ", " &  & ") in line
        for line in lines
    )
    assert f"| {row['mean']:.4f} ± {row['half']:.4f} |" in saved["Markdown"]
    assert len({line.count("|") for line in saved["Markdown"].splitlines()}) == 1


def test_a_number_that_is_missing_is_an_empty_field_of_a_csv(browser, tmp_path):
    for norm, accuracies in (("batch", [0.95, 0.96]), ("group", [0.5, 0.6])):
        scored(tmp_path, norm, accuracies)
    write_job(tmp_path, norm="layer", state="failed")
    comparison = compare(tmp_path)
    tab = browser.open(comparison.page.as_uri())
    tab.run("document.querySelectorAll('details').forEach(each => each.open = true)")
    saved = {}
    for table, name in (("cells", "table"), ("pairs", "paired-differences")):
        tab.click(f".exports[data-table={table}] button")
        (tmp_path / "saved.csv").write_bytes(browser.downloaded(f"{name}.csv"))
        saved[table] = pd.read_csv(tmp_path / "saved.csv")
    steps = saved["cells"].set_index("norm")["steps to 0.9"]
    assert steps["batch"] == 9
    assert steps[["group", "layer"]].isna().all()
    pair = comparison.evidence.pairs[0]
    row = saved["pairs"].iloc[0]
    assert (row["difference"], row["p"], row["p (Holm)"]) == (pair.difference, pair.p, pair.p_holm)
    assert saved["pairs"]["p"].isna().tolist() == [False, True, True]
    tab.close()


def test_every_figure_is_saved_as_svg_and_png_on_white_and_its_numbers_as_csv(browser, tab, small):
    tab.run("document.getElementById('theme').click()")
    title = tab.run("document.querySelector('figcaption').textContent").lower().replace(" ", "-")
    tab.run("document.querySelector('[data-figure=\"0\"]').scrollIntoView({ behavior: 'instant' })")
    tab.until("document.querySelector('[data-figure=\"0\"] .main-svg')")
    assert tab.run("document.querySelectorAll('.chart .legendtext').length") == 0  # the page has one for all
    for button, kind in ((1, "svg"), (2, "png")):
        tab.click(f"[data-figure='0'] .tools > .exports button:nth-child({button})")
        content = browser.downloaded(f"{title}.{kind}")
        if kind == "svg":
            assert ElementTree.fromstring(content).tag.endswith("svg")
            assert b"rgb(255, 255, 255)" in content
            assert b"batch size" in content
            assert re.findall(rb'class="legendtext"[^>]*>([^<]*)<', content) == [b"batch", b"group"]
        else:
            assert content.startswith(b"\x89PNG")
            assert int.from_bytes(content[16:20]) == 1800
    tab.click("[data-figure='0'] .numbers summary")
    tab.until("document.querySelector(\"[data-figure='0'] .numbers table\")")
    tab.click("[data-figure='0'] .numbers .exports button")
    lines = browser.downloaded(f"{title}.csv").decode().splitlines()
    assert lines[0] == "contender,batch size,n,test accuracy,± 95 %"
    assert len(lines) == 1 + 4


def test_the_theme_follows_the_system_until_the_reader_chooses_and_is_remembered(browser, small):
    tab = browser.open(small.page.as_uri(), dark=True)
    background = "getComputedStyle(document.body).backgroundColor"
    line = "document.querySelector('[data-figure=\"0\"] .chart').data[0].line.color"
    draw_all(tab)
    assert tab.run(background) == "rgb(20, 23, 28)"
    assert tab.run(line) == hexadecimal(0, dark=True)
    tab.click("#theme")
    tab.run("document.querySelector('[data-figure=\"0\"]').scrollIntoView()")
    tab.until(f"{line} === '{hexadecimal(0)}'")
    assert tab.run(background) == "rgb(255, 255, 255)"
    again = browser.open(small.page.as_uri(), dark=True)
    assert again.run(background) == "rgb(255, 255, 255)"
    again.run("localStorage.clear()")
    assert tab.problems == again.problems == []
    tab.close()
    again.close()


def test_the_page_fits_a_phone(browser, small):
    tab = browser.open(small.page.as_uri(), width=390, height=844, touch=True)
    draw_all(tab)
    assert tab.run("document.documentElement.scrollWidth") == 390
    widest = tab.run(
        "Math.max(...[...document.querySelectorAll('figure')].map(each => each.getBoundingClientRect().right))"
    )
    assert widest <= 390
    tab.run("document.querySelector('#runs a[data-run]').click()")
    assert tab.run("document.getElementById('panel').getBoundingClientRect().width") <= 390
    assert tab.problems == []
    tab.close()


def test_the_page_prints_with_all_its_figures_in_light_colours(browser, small):
    tab = browser.open(small.page.as_uri(), dark=True)
    assert tab.run("document.querySelectorAll('.main-svg').length") < 30
    printed = tab.pdf()
    assert printed.startswith(b"%PDF")
    tab.run("dispatchEvent(new Event('beforeprint'))")
    assert tab.run("[...document.querySelectorAll('figure .chart')].every(chart => chart.data?.length)")
    assert tab.run("document.querySelector('[data-figure=\"0\"] .chart').data[0].line.color") == hexadecimal(
        0
    )
    tab.media(kind="print")
    tab.size(718, 1000)  # A4 within its margins
    assert tab.run("document.documentElement.scrollWidth") == 718
    assert tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.run("getComputedStyle(document.getElementById('theme')).display") == "none"
    assert tab.problems == []
    tab.close()


def test_what_is_folded_is_not_drawn_for_the_printer(browser, large):
    tab = browser.open(large.page.as_uri())
    tab.run("dispatchEvent(new Event('beforeprint'))")
    figures = "[...document.querySelectorAll('figure')]"
    seen = tab.run(f"{figures}.map(each => each.checkVisibility())")
    assert set(seen) == {True, False}
    assert tab.run(f"{figures}.map(each => each.querySelector('.main-svg') !== null)") == seen
    tab.close()


def test_a_script_in_a_name_never_runs(browser, tmp_path):
    evil = '<script>alert(1)</script><img src=x onerror="document.title=1">'
    for norm in (evil, "batch"):
        for batch_size in (4, 32):
            write_sweep(tmp_path, (norm,), (0, 1), settings={"data.batch_size": batch_size})
    write_job(tmp_path, norm="group", state="failed", traceback=evil)
    tab = browser.open(compare(tmp_path).page.as_uri())
    draw_all(tab)
    shown = "[...document.querySelectorAll('.legend button')].map(each => each.textContent)"
    assert sorted(tab.run(shown)) == sorted([evil, "batch"])
    tab.run("document.querySelectorAll('details').forEach(each => each.open = true)")
    named = "[...document.querySelectorAll('.numbers td:first-child')].map(each => each.textContent)"
    tab.until(f"{named}.length")
    assert {name for name in tab.run(named) if "script" in name} == {evil}
    tab.click("#runs tbody tr:last-child a[data-run]")
    assert evil in tab.run("document.getElementById('panel').textContent")
    assert tab.run("document.querySelectorAll('img').length") == 0
    assert tab.run("document.title") == f"{tmp_path.name}: comparison"
    assert tab.problems == []
    assert len(tab.requests) == 1
    tab.close()
