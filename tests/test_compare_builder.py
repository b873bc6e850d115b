"""Writes job directories as bnlight's jobs leave them, for the tests of `bnlight.compare`."""

import csv
import hashlib
import json
import math
import random
import struct
import time
from pathlib import Path

import yaml

QUALITY = {"renorm": 0.975, "batch": 0.972, "group": 0.962, "layer": 0.951, "instance": 0.935, "none": 0.90}

# The beginning of a script on a machine that has not got some packages.
WITHOUT = """
import sys
class Absent:
    def find_spec(name, *_):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent)
"""


def write_job(
    root,
    *,
    norm="batch",
    seed=0,
    state="done",
    settings=None,
    choices=None,
    quality=None,
    epochs=10,
    steps_per_epoch=40,
    result=None,
    traceback=None,
    wandb=False,
    norm_options=None,
):
    """Write one job and return its directory. `settings` are dotted config keys that the sweep typed."""
    settings = settings or {}
    chosen = {
        "norm": norm,
        "model": "cnn",
        "data": "digits",
        "optimizer": "sgd",
        "weight": "none",
        "sync": "none",
    }
    chosen |= choices or {}
    config = {
        "seed": seed,
        "norm": {"_target_": f"bnlight.norm.{norm}", "_partial_": True, "eps": 1e-5, **(norm_options or {})},
        "model": {"_target_": "bnlight.models.CNN", "widths": [32, 64], "dropout": 0.0},
        "data": {"batch_size": 32, "split_seed": 0},
        "optimizer": {"lr": 0.1, "momentum": 0.9},
        "trainer": {"devices": 1, "max_epochs": epochs, "accelerator": "auto"},
        "paths": {"outputs": str(root)},
    }
    for key, value in settings.items():
        section = config
        for part in key.split(".")[:-1]:
            section = section.setdefault(part, {})
        section[key.split(".")[-1]] = value
    identity = hashlib.sha256(json.dumps([chosen, config], sort_keys=True).encode()).hexdigest()
    name = "-".join([norm.replace("/", "_"), "cnn-digits", f"s{seed}", identity[:8]])
    typed = [f"norm={norm}", f"seed={seed}"]
    typed += [f"{key}={value}" for key, value in (settings | (choices or {})).items()]
    config["job"] = {
        "name": name, "sweep": Path(root).name, "identity": identity, "choices": chosen, "overrides": typed,
    }  # fmt: skip
    job = Path(root) / name
    job.mkdir(parents=True)
    (job / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    status = {"state": state, "pid": 1, "host": "elsewhere", "attempt": 1, "traceback": traceback}
    write_json(job / "status.json", status | {"heartbeat": time.time(), "wandb_id": None})
    (job / "job.log").write_text("epoch 0\n")
    rows = training(
        random.Random(f"{chosen}{settings}{seed}"), quality or QUALITY.get(norm, 0.9), epochs, steps_per_epoch
    )
    write_metrics(job, rows)
    if state == "done":
        best = max(row["val/accuracy"] for row in rows if "val/accuracy" in row)
        metrics = {"test/accuracy": best - 0.004, "test/loss": 0.2, "val/accuracy": best, "val/loss": 0.21}
        write_result(job, metrics if result is None else result)
    if wandb:
        (job / "wandb" / f"offline-run-20250101_000000-{identity[:8]}").mkdir(parents=True)
    return job


def training(rng, quality, epochs, steps_per_epoch):
    """Rows of a plausible training: a train row every half epoch, a validation row after each epoch."""
    rate, final = rng.uniform(0.5, 0.9), quality + rng.gauss(0, 0.004)
    rows = []
    for epoch in range(epochs):
        for half in (1, 2):
            step = epoch * steps_per_epoch + half * steps_per_epoch // 2 - 1
            rows.append(
                {
                    "step": step,
                    "epoch": epoch,
                    "train/loss": 2.3 * math.exp(-rate * (epoch + half / 2)) + 0.02,
                }
            )
        seconds = 0.012 + rng.uniform(0, 0.002) + (0.5 if epoch == 0 else 0)
        rows[-1] |= {"train/seconds_per_step": seconds, "optimizer/lr": 0.1}
        accuracy = final * (1 - 0.9 * math.exp(-rate * (epoch + 1))) + rng.gauss(0, 0.002)
        loss = 2.3 * math.exp(-rate * (epoch + 1)) + (1 - final) * 2 + rng.gauss(0, 0.003)
        rows.append({"step": step, "epoch": epoch, "val/accuracy": min(accuracy, 1.0), "val/loss": abs(loss)})
    return [{"attempt": 1, "time": 1.7e9 + row["step"], **row} for row in rows]


def write_metrics(job, rows):
    columns = ["attempt", "step", "epoch", "time"]
    columns += sorted({name for row in rows for name in row} - set(columns))
    with (job / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def write_result(job, metrics, **fields):
    write_json(job / "result.json", {
        "metrics": metrics, "world_size": 1, "git": "2e95c7c",
        "versions": {"torch": "2.9.0", "bnlight": "0.1.0"},
        "hardware": {"cpu": "AMD EPYC", "gpu": None}, "seconds": 12.3, "steps": 400, "epochs": 10, **fields,
    })  # fmt: skip


def write_json(path, value):
    path.write_text(json.dumps(value))


def write_sweep(root, norms=tuple(QUALITY), seeds=(0, 1, 2), **options):
    """One job for every norm and seed."""
    return [write_job(root, norm=norm, seed=seed, **options) for norm in norms for seed in seeds]


def scored(root, norm, accuracies, settings=None, validation=None, **options):
    """Jobs of one norm whose results are exactly `accuracies`, one seed each."""
    for seed, accuracy in enumerate(accuracies):
        result = {"test/accuracy": accuracy, "test/loss": 1 - accuracy}
        job = write_job(root, norm=norm, seed=seed, settings=settings, result=result, **options)
        value = accuracy if validation is None else validation
        write_metrics(job, [{"attempt": 1, "step": 9, "epoch": 0, "time": 0, "val/accuracy": value}])


def write_offline_run(folder, run_id, config, rows, exit_code=0, project="bnlight"):
    """Write a run as W&B does offline: protobuf records in LevelDB's framing. Without an exit code it was killed."""
    from wandb.proto.wandb_internal_pb2 import Record

    begin = Record()
    begin.run.run_id, begin.run.display_name, begin.run.project = run_id, f"run {run_id}", project
    for key, value in config.items():
        begin.run.config.update.add(key=key, value_json=json.dumps(value))
    records = [begin]
    for row in rows:
        records.append(Record())
        for name, value in row.items():
            records[-1].history.item.add(nested_key=[name], value_json=json.dumps(value))
    if exit_code is not None:
        records.append(Record())
        records[-1].exit.exit_code = exit_code
    folder.mkdir(parents=True)
    (folder / f"run-{run_id}.wandb").write_bytes(framed([r.SerializeToString() for r in records]))


def framed(records, block=32768):
    """W&B's header, then each record in parts that end where a block does; the checksums are left out."""
    data = bytearray(b":W&B" + bytes(3))
    for record in records:
        rest, begun = record, False
        while not begun or rest:
            left = block - len(data) % block
            if left < 7:
                data += bytes(left)
                left = block
            part, rest = rest[: left - 7], rest[left - 7 :]
            kind = (3 if rest else 4) if begun else (2 if rest else 1)
            data += struct.pack("<IHB", 0, len(part), kind) + part
            begun = True
    return bytes(data)


def test_a_written_job_has_the_files_of_a_job(tmp_path):
    job = write_job(tmp_path / "norms", norm="renorm", seed=1, wandb=True)
    names = {path.name for path in job.iterdir()}
    assert names == {"config.yaml", "status.json", "result.json", "metrics.csv", "job.log", "wandb"}
