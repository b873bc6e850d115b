"""What the doctor advises can be typed, helps, and is not what the job does already."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import SMALL

from bnlight.doctor import Finding
from bnlight.run import doctor
from bnlight.run.application import compose_job

RANKS = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
OVERRIDE = re.compile(r"\b(?:norm|sync|callbacks|data|optimizer|trainer)[\w.]*=(?:\[[\w,]+\]|[\w.]*\w)")


def found(*words: str) -> dict[str, Finding]:
    return {each.check: each for each in doctor.examine_job(compose_job([*SMALL, *words]))}


@pytest.mark.parametrize(
    ("words", "check", "advised"),
    [
        (["data.batch_size=4"], "few_values", "norm=group"),
        ([*RANKS, "data.batch_size=8"], "few_values", "sync=world"),
        (["data.batch_size=16", "trainer.accumulate_grad_batches=2"], "accumulation", "norm=group"),
        (RANKS, "local_statistics", "sync=world"),
        (["norm=renorm", "norm.momentum=0.001"], "unconverged", "norm.momentum=0.16"),
    ],
)
def test_what_is_advised_mends_it(project: Path, words: list[str], check: str, advised: str) -> None:
    remedy = found(*words)[check].remedy
    assert advised in OVERRIDE.findall(remedy)
    for each in OVERRIDE.findall(remedy):
        compose_job([*words, each])
    replaced = advised.partition("=")[0] + "="
    assert check not in found(*(word for word in words if not word.startswith(replaced)), advised)


@pytest.mark.parametrize(
    ("words", "check", "advised"),
    [
        ([*RANKS, "data.batch_size=2"], "few_values", "sync=world"),
        (RANKS, "local_statistics", "callbacks=[default,reduce_statistics]"),
        (["model.depth=2", "model.dropout=0.5"], "dropout_before", "callbacks=[default,precise_statistics]"),
    ],
)
def test_what_the_job_does_already_is_not_advised(
    project: Path, words: list[str], check: str, advised: str
) -> None:
    assert advised in OVERRIDE.findall(found(*words)[check].remedy)
    assert advised not in OVERRIDE.findall(found(*words, advised)[check].remedy)
