"""Runs of several sources in one table: sweeps combined, single jobs, folders of sweeps, each run counted once."""

import json
import os
import shutil

import pytest
import yaml
from test_compare_builder import write_job, write_json, write_sweep

from bnlight.compare import compare, read_runs


def keys(*sources):
    return sorted(read_runs(*sources).runs["directory"])


def test_sweeps_are_combined_and_each_run_says_where_it_is_from(tmp_path):
    norms, more = tmp_path / "norms", tmp_path / "more"
    write_sweep(norms, norms=("batch", "renorm"), seeds=(0, 1))
    (late,) = write_sweep(more, norms=("batch",), seeds=(2,))
    read = read_runs(norms, more)
    assert read.directories == [norms, more]
    assert len(read.runs) == 5
    key = f"more/{late.name}"
    row = read.runs.loc[key]
    assert (row["directory"], row["job"], row["sweep"], row["source"]) == (key, late.name, "more", str(more))
    assert (row["path"], row["log"]) == (str(late), str(late / "job.log"))
    assert set(read.history["directory"]) == set(read.runs.index) == set(read.configs.index)
    assert read.runs["source"].value_counts().to_dict() == {str(norms): 4, str(more): 1}


def test_a_folder_of_sweeps_gives_them_all_with_the_same_keys(tmp_path):
    outputs = tmp_path / "outputs"
    for name in ("norms", "depths"):
        write_sweep(outputs / name, norms=("batch",), seeds=(0, 1), settings={"model.name": name})
    (outputs / "plots").mkdir()
    read = read_runs(outputs)
    assert sorted(read.runs.index) == keys(outputs / "norms", outputs / "depths")
    assert {key.partition("/")[0] for key in read.runs.index} == {"norms", "depths"}
    for key, row in read.runs.iterrows():
        assert outputs / row["log"] == outputs / key / "job.log"
    assert not read.notes


def test_one_job_is_read_alone_and_beside_its_sweep_it_is_no_second_run(tmp_path):
    job, other = write_sweep(tmp_path / "norms", norms=("batch",), seeds=(0, 1))
    read = read_runs(job)
    assert list(read.runs.index) == [job.name]
    assert read.runs.loc[job.name, "log"] == "job.log"
    both = read_runs(tmp_path / "norms", job)
    assert sorted(both.runs.index) == sorted([job.name, other.name])
    assert (both.runs["state"] == "done").all()
    assert not both.notes


def test_sweeps_of_one_name_are_told_apart_by_the_folder_above(tmp_path):
    write_job(tmp_path / "cpu" / "norms", seed=0)
    write_job(tmp_path / "gpu" / "norms", seed=1)
    found = keys(tmp_path / "cpu" / "norms", tmp_path / "gpu" / "norms")
    assert [key.rpartition("/")[0] for key in found] == ["cpu/norms", "gpu/norms"]


def test_what_two_sweeps_ran_alike_is_counted_once_and_the_one_that_is_done_counts(tmp_path):
    failed = write_job(tmp_path / "first", seed=0, state="failed")
    shutil.copytree(failed, tmp_path / "second" / failed.name)
    again = tmp_path / "second" / failed.name
    write_json(again / "status.json", {"state": "done"})
    write_json(again / "result.json", {"metrics": {"test/accuracy": 0.5}})
    write_job(tmp_path / "second", seed=1)
    read = read_runs(tmp_path / "first", tmp_path / "second")
    assert read.runs["state"].value_counts().to_dict() == {"done": 2, "duplicate": 1}
    assert read.runs.loc[f"first/{failed.name}", "state"] == "duplicate"
    assert read.notes == ["first: 1 run with the configuration and seed of one in second, counted once"]


def test_a_run_s_page_at_wandb_is_in_its_row(tmp_path):
    job, plain = write_sweep(tmp_path / "norms", norms=("batch",), seeds=(0, 1))
    result = json.loads((job / "result.json").read_text())
    write_json(job / "result.json", result | {"wandb_url": "https://wandb.example/us/p/runs/1"})
    urls = read_runs(tmp_path / "norms").runs["url"]
    assert urls[job.name] == "https://wandb.example/us/p/runs/1"
    assert urls.isna()[plain.name]


def test_a_link_that_leads_back_is_not_followed_forever(tmp_path):
    job = write_job(tmp_path / "outputs" / "norms")
    (tmp_path / "outputs" / "again").symlink_to(tmp_path / "outputs")
    assert keys(tmp_path / "outputs") == [job.name]


def test_a_second_source_that_holds_nothing_is_an_error_that_names_it(tmp_path):
    write_job(tmp_path / "norms")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: expected one sub-directory per job"):
        read_runs(tmp_path / "norms", tmp_path / "empty")


def test_a_thousand_jobs_in_two_sweeps_are_all_there(tmp_path):
    job = write_job(tmp_path / "one")
    config = yaml.safe_load((job / "config.yaml").read_text())
    result = json.loads((job / "result.json").read_text())
    for number in range(1000):
        copy = tmp_path / "many" / ("even", "odd")[number % 2] / f"job-{number}"
        copy.mkdir(parents=True)
        for file in ("status.json", "metrics.csv", "config.yaml"):
            os.link(job / file, copy / file)
        config["seed"], config["job"] = number, config["job"] | {"identity": f"{number:064d}"}
        write_json(copy / "result.json", result | {"config": config})
    write_job(tmp_path / "many" / "odd", state="failed")
    read = read_runs(tmp_path / "many")
    assert read.runs["state"].value_counts().to_dict() == {"done": 1000, "failed": 1}
    assert sorted(read.runs["seed"]) == [0, *range(1000)]
    assert len(read.configs) == 1001
    assert len(read.history) == 20 * 1001
    assert read.history.groupby("directory").size().eq(20).all()


def test_the_comparison_of_a_folder_of_sweeps_has_every_run(tmp_path):
    for name, seeds in (("first", (0, 1)), ("second", (2, 3))):
        write_sweep(tmp_path / "outputs" / name, norms=("batch", "renorm"), seeds=seeds)
    comparison = compare(tmp_path / "outputs")
    assert {cell.contender: cell.metric.n for cell in comparison.cells} == {"batch": 4, "renorm": 4}
