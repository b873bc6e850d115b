"""`bnlight compare`: its options and formats, where it writes, and a sweep's end."""

import contextlib
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from test_compare_builder import scored, write_job, write_sweep

from bnlight.cli import main
from bnlight.compare import compare
from bnlight.compare.command import finish
from bnlight.compare.formats import latex, markdown
from bnlight.compare.table import Column


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """A sweep norms x batch size x learning rate, in the folder `outputs` of the working directory."""
    monkeypatch.chdir(tmp_path)
    for size in (4, 32):
        for rate in (0.1, 0.01):
            for norm, base in (("batch", 0.8), ("renorm", 0.9)):
                values = [base + rate / 10 + step for step in (0.0, 0.004, 0.003)]
                scored("outputs/norms", norm, values, {"data.batch_size": size, "optimizer.lr": rate})
    write_job(
        "outputs/norms", norm="tanh", state="diverged", settings={"data.batch_size": 4, "optimizer.lr": 0.1}
    )
    return Path("outputs/norms")


def run(capsys, *arguments):
    code = main(["compare", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_the_options_reach_the_comparison(sweep, capsys):
    options = ["--metric", "test/loss", "--by", "batch_size", "--tune", "lr", "--target", "0.85"]
    options += ["--where", "norm=batch,renorm", "seed!=1", "--output", "out"]
    code, text, _ = run(capsys, sweep, *options)
    expected = compare(
        sweep, metric="test/loss", by=["batch_size"], tune=["lr"], where=["norm=batch,renorm", "seed!=1"], target=0.85,
        output="out",
    )  # fmt: skip
    assert (code, [line.rstrip() for line in text.splitlines()]) == (0, str(expected).splitlines())
    assert "steps to" in text
    assert "85 %" in text
    assert expected.command == (
        "bnlight compare outputs/norms --metric test/loss --by batch_size --tune lr "
        "--where norm=batch,renorm 'seed!=1' --target 0.85 --output out"
    )


def test_tune_none_compares_at_shared_settings(sweep, capsys):
    _, text, _ = run(capsys, sweep, "--tune", "none")
    assert "All at shared settings." in text
    assert "at batch size = 4, lr = 0.01" in " ".join(text.split())


def test_csv_is_the_table_of_cells(sweep, capsys):
    _, text, errors = run(capsys, sweep, "--format", "csv")
    table, comparison = pd.read_csv(io.StringIO(text)), compare(sweep)
    assert len(table) == len(comparison.cells) == 9
    for row, cell in zip(table.to_dict("records"), comparison.cells, strict=True):
        assert (row["norm"], row["chosen"], row["diverged"]) == (
            cell.contender,
            cell.chosen,
            "diverged" in cell.states,
        )
        if cell.metric.n:
            assert row["test/accuracy mean"] == pytest.approx(cell.metric.mean, rel=1e-12)
            assert (row["test/accuracy boot low"], row["test/accuracy boot high"]) == pytest.approx(
                cell.metric.boot
            )
            assert row["test/accuracy worst"] == pytest.approx(cell.done["test/accuracy"].min())
    assert errors.splitlines() == [f"{sweep}/results.csv", f"{sweep}/comparison.html"]


def test_json_holds_verdict_cells_and_evidence(sweep, capsys):
    _, text, _ = run(capsys, sweep, "--format", "json", "--against", sweep)
    found, comparison = json.loads(text), compare(sweep)
    assert "NaN" not in text
    assert found["verdict"] == comparison.verdict
    assert [cell["metric"]["n"] for cell in found["cells"]] == [cell.metric.n for cell in comparison.cells]
    assert {name for cell in found["cells"] for name in cell["runs"]} == set(comparison.runs.index)
    assert len(found["evidence"]["pairs"]) == len(comparison.evidence.pairs)
    assert found["evidence"]["pairs"][0]["text"] == comparison.evidence.pairs[0].text
    assert found["tuned_by"] == "best_val/accuracy"
    assert found["written"] == [f"{sweep}/results.csv", f"{sweep}/comparison.html"]
    assert {one["difference"] for one in found["against"]["differences"] if one["n"]} == {0.0}


def test_markdown_is_one_table_between_verdict_and_caveats(sweep, capsys):
    _, text, _ = run(capsys, sweep, "--format", "markdown")
    comparison = compare(sweep)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(comparison.cells)
    assert len({line.count("|") for line in rows}) == 1
    assert f"**{comparison.verdict}**" in text
    assert sum(line.startswith("| **") for line in rows) == 2  # the best at each batch size
    assert all(f"- {caveat}" in text for caveat in comparison.caveats)


def test_latex_is_a_booktabs_table_with_a_row_per_cell(sweep, capsys):
    _, text, _ = run(capsys, sweep, "--format", "latex")
    inside = text[text.index("\\midrule") : text.index("\\bottomrule")].splitlines()[1:]
    columns = re.search(r"\\begin{tabular}{([lr]+)}", text)[1]
    assert len(inside) == 9
    assert all(line.endswith(r" \\") and line.count("&") == len(columns) - 1 for line in inside)
    assert r"95 \%" in text
    assert "*: chosen by best validation accuracy.}" in text
    assert text.count("{") == text.count("}")


def test_a_target_that_nobody_reaches_is_said(sweep, capsys):
    _, text, _ = run(capsys, sweep, "--target", "95")  # per cent, where a share is meant
    assert "No finished run has reached a validation accuracy of 95." in text
    assert "steps to" not in text


def test_what_means_something_to_latex_or_markdown_is_escaped():
    columns = [
        Column("a_b & 5 %", ["x|y", r"\input{$HOME}", "#~^", "`<b>`"]),
        Column("n", ["1", "2", "3", "4"]),
    ]
    assert latex(columns).splitlines()[4:10] == [
        r"a\_b \& 5 \% & n \\",
        r"\midrule",
        r"x|y & 1 \\",
        r"\textbackslash{}input\{\$HOME\} & 2 \\",
        r"\#\textasciitilde{}\textasciicircum{} & 3 \\",
        r"`\textless{}b\textgreater{}` & 4 \\",
    ]
    assert markdown(columns).splitlines() == [
        r"| a\_b & 5 % | n |", "|--:|--:|",
        r"| x\|y | 1 |", r"| \\input{$HOME} | 2 |", "| #~^ | 3 |", r"| \`\<b>\` | 4 |",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["outputs/nothing"], "outputs/nothing: expected the directory of a sweep"),
        (["--by", "batchsize"], "Did you mean data.batch_size?"),
        (["--where", "lr<fast"], "'lr<fast': < takes one number, not 'fast'"),
        (["--metric", "test/f1"], "no run in outputs/norms has the metric 'test/f1'"),
        (["--metric", "test_acuracy"], "Did you mean test/accuracy or"),
        (["--where", "norm=renrom"], "norm is one of: batch, renorm, tanh. Did you mean renorm?"),
        (["--where", "batchsize=4"], "Did you mean data.batch_size?"),
        (["--against", "outputs/nothing"], "outputs/nothing"),
        (["--output", "outputs/norms/file/below"], "outputs/norms/file"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(sweep, capsys, arguments, message):
    (sweep / "file").touch()
    given = arguments if arguments[0][0] != "-" else [sweep, *arguments]
    code, text, errors = run(capsys, *given)
    assert (code, text) == (2, "")
    assert message in errors
    assert "Traceback" not in errors


def test_a_reader_that_has_seen_enough_is_no_error(sweep):
    command = f"{sys.executable} -m bnlight compare {sweep} --format json | head -n 1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "{\n")
    assert "Error" not in done.stderr


def test_several_sweeps_are_written_beside_each_other(sweep, capsys):
    write_sweep("outputs/more", ("group",), (0, 1), settings={"data.batch_size": 4})
    code, text, _ = run(capsys, sweep, "outputs/more")
    assert code == 0
    assert "outputs/comparison/results.csv\noutputs/comparison/comparison.html" in text
    with Path("outputs/comparison/results.csv").open(newline="") as file:
        assert {row["norm"] for row in csv.DictReader(file)} == {"batch", "renorm", "tanh", "group"}
    assert not (sweep / "results.csv").exists()


def unprivileged(*command):
    """Run a command for which a read-only folder is one, also where the tests are run by root."""
    dropped = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"] if os.getuid() == 0 else []
    if dropped and not shutil.which("setpriv"):
        pytest.skip("root may write everywhere, and there is no setpriv to drop that")
    return subprocess.run([*dropped, *command], capture_output=True, text=True, timeout=120)


def test_a_read_only_sweep_is_printed_and_written_elsewhere(sweep, capsys):
    sweep.chmod(0o555)
    try:
        done = unprivileged(sys.executable, "-m", "bnlight", "compare", str(sweep))
        there = unprivileged(sys.executable, "-m", "bnlight", "compare", str(sweep), "--output", "there")
    finally:
        sweep.chmod(0o755)
    assert (done.returncode, done.stderr) == (0, "")
    assert "renorm" in done.stdout
    assert f"Nothing was written (Permission denied: {sweep}): --output DIR writes elsewhere" in done.stdout
    assert not (sweep / "results.csv").exists()
    assert there.returncode == 0
    assert sorted(path.name for path in Path("there").iterdir()) == ["comparison.html", "results.csv"]


def test_at_a_sweeps_end_a_comparison_that_fails_is_one_line(tmp_path, capsys):
    (tmp_path / "ours").mkdir()
    finish(tmp_path / "ours")
    text, errors = capsys.readouterr()
    assert text == ""
    assert errors.count("\n") == 1
    assert errors.startswith("The comparison could not be made (ValueError: ")
    assert errors.endswith(f"Compare what has finished with: bnlight compare {tmp_path / 'ours'}\n")


def test_on_a_full_disk_it_is_printed_and_the_last_one_stays_whole(tmp_path, capsys):
    small = tmp_path / "norms"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs to mount a small file system (root)")
    try:
        write_sweep(small, ("batch", "renorm"), (0, 1))
        finish(small)
        before = {file.name: file.read_bytes() for file in small.glob("*.*")}
        assert set(before) == {"results.csv", "comparison.html"}
        write_sweep(small, ("group",), (0, 1))
        filler = small / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        os.truncate(filler, filler.stat().st_size - 2**16)  # room for results.csv, but not for the page
        capsys.readouterr()
        finish(small)
        text, errors = capsys.readouterr()
        assert ("6 jobs, 6 done" in text, errors) == (True, "")
        assert (
            f"Nothing was written (No space left on device: {small}): --output DIR writes elsewhere" in text
        )
        assert {file.name: file.read_bytes() for file in small.glob("*.*")} == before
        code, text, errors = run(capsys, small, "--output", small / "mine")
        assert (code, text) == (2, "")
        assert f"Nothing was written (No space left on device): '{small / 'mine'}'" in errors
        assert list((small / "mine").iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_an_option_of_the_norm_is_a_condition_in_which_the_norms_meet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for size in (2, 8):
        for norm, base in (("batch", 0.8), ("batch_layer", 0.9)):
            scored("outputs/ghost", norm, [base, base + 0.01], {"norm.virtual_batch_size": size})
    comparison = compare("outputs/ghost", by=["norm.virtual_batch_size"])
    assert comparison.axes.contenders == ["norm"]
    assert comparison.axes.conditions == ["norm.virtual_batch_size"]
    assert comparison.axes.averaged == []
    assert {cell.contender for cell in comparison.cells} == {"batch", "batch_layer"}
    assert len(comparison.cells) == 4


def test_a_metric_that_is_not_there_is_answered_with_those_that_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    job = write_job("outputs/plain", result={"val_acc": 0.5})
    (job / "metrics.csv").write_text("attempt,step,epoch,time,val_acc\n1,10,0,1.0,0.5\n")
    code, _, error = run(capsys, "outputs/plain", "--metric", "val/acc")
    assert code == 2
    assert "Did you mean val_acc?" in error
    assert "val_acc" in error.partition("there are: ")[2]
    assert "epoch" not in error.partition("there are: ")[2].split(", ")
