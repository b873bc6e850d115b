"""`${bnlight.eval:...}`: arithmetic in a config, and nothing but arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import SMALL
from omegaconf import OmegaConf

from bnlight.cli import main
from bnlight.run.application import compose_job
from bnlight.run.arithmetic import evaluate
from bnlight.run.overrides import overridden


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("32 / 8", 4),
        ("32 / 64", 0.5),
        ("0.1 * 8 / 256", 0.003125),
        ("(2 + 3) * 4 - 5 // 2 + 7 % 4", 21),
        ("2 ** 10", 1024),
        ("2 ** -1", 0.5),
        ("(-3) ** 2", 9),
        ("-(3 ** 2)", -9),
        ("2 - -1", 3),
        ("sqrt(16)", 4.0),
        ("max(1, 8) + min(2, 3) + round(2.6) + int(1.9) + ceil(0.1)", 15),
        ("1e-05 * 2", 2e-05),
        ("0.9 > 0", True),
        ("2 * 3 == 6", True),
        ("sqrt(16) != 4", False),
        ("-1 >= 0", False),
    ],
)
def test_whole_numbers_stay_whole_where_that_is_exact(text: str, value: float) -> None:
    assert evaluate(text) == value
    assert type(evaluate(text)) is type(value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("full * 2", "'full' is no number"),
        ("None * 2", "'None' is no number"),
        ("True + 1", "'True' is no number"),
        ("'a' * 3", "is no number"),
        ("__import__('os').getcwd()", "is no number"),
        ("(1).real", "is no number"),
        ("[1][0]", "is no number"),
        ("1 / 0", "division by zero"),
        ("-3 ** 2", "a sign before a power"),
        ("(-8) ** 0.5", "a root of a negative number"),
        ("9 ** 9 ** 9", "the power is too large"),
        ("1e400", "the result is not finite"),
        ("1 < 2 < 3", "is no number"),
        ("(1 < 2) + 1", "is no number"),
        ("1 in 2", "is no number"),
        ("2 +", "invalid syntax"),
        ("", "invalid syntax"),
    ],
)
def test_what_is_no_arithmetic_is_refused_in_words(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=r"bnlight\.eval cannot compute .*It knows numbers") as error:
        evaluate(text)
    assert said in str(error.value)


RATE = 'optimizer.lr="${bnlight.eval:6.4 / ${data.batch_size}}"'


def test_a_learning_rate_follows_the_batch_size_in_a_sweep(project: Path) -> None:
    several = ["-m", "data.batch_size=32,64", "+trainer.limit_train_batches=2"]
    assert main(["train", *SMALL, *several, RATE]) == 0
    configs = [json.loads(path.read_text())["config"] for path in project.glob("outputs/train/*/result.json")]
    assert {c["data"]["batch_size"]: c["optimizer"]["lr"] for c in configs} == {32: 0.2, 64: 0.1}
    assert RATE in configs[0]["job"]["overrides"]  # as it was typed


def test_it_is_there_for_every_command(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compose_job([RATE])["optimizer"]["lr"] == 0.1  # the doctor's
    assert main(["train", '+model.name="${bnlight.eval:2 * x}"', "--cfg", "job", "--resolve"]) == 2
    assert "bnlight.eval cannot compute '2 * x'" in capsys.readouterr().err
    config = {"data": {"_target_": "bnlight.data.Digits", "batch_size": 64}, "paths": {}}
    changed = overridden(
        config, ['data.batch_size="${bnlight.eval:2 * ${data.batch_size}}"']
    )  # `bnlight test`
    assert changed["data"]["batch_size"] == 128


def test_parts_that_omegaconf_splits_at_commas_are_one_expression(project: Path) -> None:
    compose_job([])
    config = OmegaConf.create({"n": 8, "x": "${bnlight.eval:'max(${n}, 3) * 2'}"})
    assert config.x == 16
