"""`bnlight bench fold` measures inference before and after folding, and says where."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bnlight.bench.fold import MODELS, NORMS
from bnlight.cli import main


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_network_of_a_run_has_its_ratio(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "fold.json"
    assert (
        main(
            [
                "bench",
                "fold",
                "--models",
                "cnn",
                "mlp",
                "--batches",
                "1",
                "--rounds",
                "3",
                "--json",
                str(file),
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    assert "cores" in printed
    written = json.loads(file.read_text())
    found = {(case["model"], case["norm"], case["batch"]): case for case in written["cases"]}
    assert found.keys() == {(model, norm, 1) for model in ("cnn", "mlp") for norm in NORMS}
    for (model, _, _), case in found.items():
        assert MODELS[model][0] in printed
        assert 0 < case["p10"] <= case["median"] <= case["p90"]
        assert case["error"] < 1e-5
        assert case["before_us"] > 0 < case["after_us"]


@pytest.mark.parametrize(
    "arguments", [["--models", "vgg"], ["--batches", "0"], ["--json", "missing/file.json"]]
)
def test_a_wrong_option_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["bench", "fold", *arguments])
    assert exit_.value.code == 2
    assert main(["bench", "flod"]) == 2
    assert "bnlight bench fold" in capsys.readouterr().err
