"""`bnlight bench norm` measures every layer, says what it measured, and writes all of it down."""

from __future__ import annotations

import json
import math
import queue
from pathlib import Path

import pytest
import torch

from bnlight.bench import measure, sync
from bnlight.bench.cases import Case, cases, percentiles
from bnlight.bench.contenders import (
    BASELINE,
    OF_POSITIONS,
    ChunkedBatchNorm,
    NaiveBatchRenorm,
    NaiveFilterResponseNorm,
    OverChannels,
    layers,
    norm_names,
)
from bnlight.bench.norm import main, summary
from bnlight.cli import main as command
from bnlight.norm import NORMS, BatchNorm, BatchRenorm, FilterResponseNorm, LayerNorm

CPU = torch.device("cpu")
SMALL = ["--shapes", "8x8x4x4,16x8", "--rounds", "3"]


@pytest.fixture(autouse=True)
def threads():
    """The benchmark sets torch's threads for its process; the other tests keep theirs."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict:
    file = tmp_path_factory.mktemp("bench") / "norm.json"
    assert main([*SMALL, "--json", str(file)]) == 0
    return json.loads(file.read_text())


def test_the_quick_run_prints_every_norm_what_ran_and_where(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["bench", "norm", "--quick", "--rounds", "3"]) == 0
    printed = capsys.readouterr().out
    for name in [
        *NORMS,
        "virtual",
        "naive renorm",
        "torch GroupNorm",
        "torch LayerNorm",
        "torch InstanceNorm",
        "torch RMSNorm",
        "naive frn",
        "chunked",
    ]:
        assert f"\n{name} " in printed
    for said in [
        "8x512x7x7 float32 channels_last, 3 rounds",
        "256x128",
        torch.__version__,
        "threads 1",
        "cores",
    ]:
        assert said in printed
    assert "All 3 cases: ratio to torch BatchNorm" in printed


def test_every_number_is_positive_and_finite_and_the_baseline_is_one(written: dict) -> None:
    for case in written["cases"]:
        rounds = len(case["layers"][BASELINE]["seconds"])
        for layer in case["layers"].values():
            assert len(layer["seconds"]) == rounds >= 3
            assert 0 < layer["p10"] <= layer["median"] <= layer["p90"] < math.inf
            assert layer["microseconds"] > 0
            assert layer["bandwidth"] > 0
            assert 1 <= layer["memory"] < 60  # of so small an x
        assert case["layers"][BASELINE]["median"] == 1


def test_the_file_has_every_case_every_layer_and_the_circumstances(written: dict) -> None:
    assert {"what", "hardware", "device", "torch", "threads", "rounds", "seconds"} <= written.keys()
    found = {
        (tuple(case["shape"]), case["dtype"], case["layout"]): case["layers"] for case in written["cases"]
    }
    assert len(found) == 2 * 2 + 2
    for (shape, _, _), measured in found.items():
        missing = {*OF_POSITIONS, "torch InstanceNorm", "naive frn"} if len(shape) == 2 else set()
        assert {BASELINE, *NORMS, "virtual", "naive renorm"} - missing <= measured.keys()
        assert not missing & measured.keys()
    assert written["summary"].keys() == {name for measured in found.values() for name in measured}


def test_the_summary_is_the_geometric_mean_and_the_worst_case(written: dict) -> None:
    medians = [case["layers"]["renorm"]["median"] for case in written["cases"]]
    row = written["summary"]["renorm"]
    assert row["geometric_mean"] == pytest.approx(math.prod(medians) ** (1 / len(medians)))
    assert row["worst"] == max(medians)
    assert set(summary({})) == set()


def test_only_the_chosen_norms_run(capsys: pytest.CaptureFixture[str]) -> None:
    main([*SMALL, "--norms", "renorm", "--dtypes", "float32", "--layouts", "contiguous"])
    printed = capsys.readouterr().out
    assert "\nrenorm " in printed
    assert "\nnaive renorm " in printed
    assert "\ngroup " not in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--norms", "renrom"], "there is no 'renrom'; choose from batch,renorm"),
        (["--dtypes", "float16"], "there is no 'float16'; choose from float32,bfloat16"),
        (["--layouts", "nhwc"], "there is no 'nhwc'; choose from contiguous,channels_last"),
        (["--shapes", "8x4x2"], "expected shapes NxC (N at least 8) or NxCxHxW"),
        (["--shapes", "8xa"], "got '8xa'"),
        (["--rounds", "0"], "at least 1, got '0'"),
        (["--sync", "--norms", "batch,layer,virtual"], "layer, virtual: no statistics over ranks"),
        (["--json", "missing/file.json"], "there is no folder"),
    ],
)
def test_a_wrong_option_is_named_before_anything_runs(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err


def test_the_command_says_what_it_can_measure(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["bench", "nrom"]) == 2
    assert "bnlight bench norm" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--device", "cuda"])
    assert "torch sees no GPU" in capsys.readouterr().err


def test_the_naive_formula_is_batch_renorm() -> None:
    x = torch.randn(8, 4, 5, 5) * 2 + 1
    naive, layer = NaiveBatchRenorm(4), BatchRenorm(4)
    for _ in range(3):
        torch.testing.assert_close(naive(x), layer(x), rtol=1e-4, atol=1e-5)


def test_the_other_forms_compute_what_the_layers_do() -> None:
    x = torch.randn(8, 4, 5, 5) * 2 + 1
    for other, layer in (
        (NaiveFilterResponseNorm(4), FilterResponseNorm(4)),
        (OverChannels(torch.nn.LayerNorm(4)), LayerNorm(4, over="channels")),
    ):
        torch.testing.assert_close(other(x), layer(x), rtol=1e-4, atol=1e-5)
    chunked = ChunkedBatchNorm(torch.nn.BatchNorm2d(4), 4)
    # Its groups are neighbours, the layer's are n mod 4.
    interleaved = x.unflatten(0, (4, 2)).transpose(0, 1).flatten(0, 1)
    y = BatchNorm(4, virtual_batch_size=2)(interleaved).unflatten(0, (2, 4)).transpose(0, 1).flatten(0, 1)
    torch.testing.assert_close(chunked(x), y, rtol=1e-4, atol=1e-5)


def test_two_processes_compare_synchronized_layers_with_local_ones(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "sync.json"
    assert main(["--sync", *SMALL, "--dtypes", "float32", "--json", str(file)]) == 0
    assert "processes 2" in capsys.readouterr().out
    written = json.loads(file.read_text())
    assert len(written["cases"]) == 3
    for case in written["cases"]:
        both = ["batch", "batch, 2 ranks", "renorm", "renorm, 2 ranks"]
        assert list(case["layers"]) == [BASELINE, *both, "all_reduce, 2 ranks"]
        # Nothing but the exchange is added, and that is not for nothing.
        assert all(case["layers"][f"{name}, 2 ranks"]["median"] > 1 for name in ("batch", "renorm"))


def test_a_process_that_fails_ends_the_command_with_its_error() -> None:
    case = Case((8, 4), "float32", "contiguous")
    with pytest.raises(Exception, match="there_is_none"):
        list(sync.measure_ranks([case], ["there_is_none"], threads=1, rounds=3, budget=0.0))


def test_processes_that_do_not_finish_end_the_command() -> None:
    class Running:
        def join(self, timeout: float) -> bool:
            return False

    with pytest.raises(TimeoutError, match="did not finish a case within 1 seconds"):
        sync._next(queue.Queue(), Running(), patience=1.0)


def test_two_dimensional_input_has_one_layout() -> None:
    chosen = cases([(16, 8), (8, 8, 4, 4)], ["float32"], ["contiguous", "channels_last"])
    assert [str(case) for case in chosen] == [
        "16x8 float32 contiguous",
        "8x8x4x4 float32 contiguous",
        "8x8x4x4 float32 channels_last",
    ]
    assert chosen[2].tensor(CPU).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(8, 8, 4, 4), (16, 8)], ids=str)
def test_every_contender_keeps_shape_and_dtype(shape: tuple[int, ...]) -> None:
    x = Case(shape, "bfloat16", "contiguous").tensor(CPU)
    for layer in layers(norm_names(), x).values():
        y = layer(x)
        assert (y.shape, y.dtype) == (x.shape, x.dtype)


def test_each_round_runs_every_step_equally_often_and_the_time_limits_the_rounds() -> None:
    ran = {"a": 0, "b": 0}

    def step(name: str) -> None:
        ran[name] += 1
        sum(range(200_000))  # several milliseconds: no repeats

    steps = {name: (lambda name=name: step(name)) for name in ran}
    seconds = measure.interleaved(steps, CPU, rounds=50, budget=0.0)
    assert [len(times) for times in seconds.values()] == [3, 3]
    assert min(ran.values()) >= 2 + 3


def test_peak_memory_counts_what_lives_at_the_same_time() -> None:
    x = torch.zeros(1000, 100)

    def one_after_the_other() -> None:
        for _ in range(3):
            torch.empty_like(x)

    def together() -> None:
        _kept = [torch.empty_like(x) for _ in range(3)]

    assert measure.peak_memory(one_after_the_other, CPU) == pytest.approx(x.nbytes, rel=0.01)
    assert measure.peak_memory(together, CPU) == pytest.approx(3 * x.nbytes, rel=0.01)


def test_processes_that_agree_repeat_a_step_equally_often() -> None:
    met: list[float] = []

    def slowest(number: float) -> float:
        met.append(number)
        return max(number, 1.0)

    ran = {"a": 0}

    def step() -> None:
        ran["a"] += 1

    seconds = measure.interleaved({"a": step}, CPU, rounds=4, budget=10.0, agree=slowest)
    assert ran["a"] == 2 + 4  # a second each: no repeats
    assert len(seconds["a"]) == 4
    assert len(met) == 1 + 4


def test_percentiles_are_the_tenth_and_the_ninetieth() -> None:
    assert percentiles([float(n) for n in range(11)]) == (1.0, 9.0)


def test_a_copy_takes_time() -> None:
    assert 0 < measure.copy_seconds(torch.zeros(1000)) < 1
