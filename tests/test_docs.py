"""docs/norms.md: its program runs, and its tables, signatures and commands are those of the code."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

import bnlight
from bnlight import norm
from bnlight.lightning.build import instantiate
from bnlight.norm import NORMS, Norm
from bnlight.run import identity, searchpath
from bnlight.run.application import VERSION_BASE

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "norms.md").read_text()
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SECTIONS = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##)", PAGE, re.DOTALL | re.MULTILINE))
SIGNATURES = dict(re.findall(r"`(\w+)(\([^`]*, \*[^`]*\))`", PAGE))
FACTS = {
    name: (class_name, over, same, own)
    for name, class_name, over, same, own in re.findall(
        r"^\| `(\w+)` \| \[`(\w+)`\]\(#\w+\) \| (.*?) \| (.*?) \| (.*?) ?\|$", PAGE, re.MULTILINE
    )
}
SHARED = {name: p.default for name, p in inspect.signature(Norm).parameters.items()}


def test_the_program_of_the_page_runs() -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    ran = 0
    for block in BLOCK.finditer(PAGE):
        if block[1] == "python":
            above = PAGE.count("\n", 0, block.start(2))  # so that a failure names the page's own line
            exec(compile("\n" * above + block[2], "docs/norms.md", "exec"), names)
            ran += 1
    assert ran >= 12


def test_both_tables_have_every_norm_in_the_order_of_the_code() -> None:
    assert [*FACTS] == [*NORMS]
    assert re.findall(r"^\| `(\w+)` \| (?!\[)", PAGE, re.MULTILINE)[: len(NORMS)] == [*NORMS]


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_has_its_row_and_its_section(name: str) -> None:
    class_name, _, _, own = FACTS[name]
    assert NORMS[name].__name__ == class_name
    assert [*re.findall(r"\w+", own)] == [
        p for p in written_signature(class_name) if p not in (*SHARED, "shared")
    ]
    wanted = ["training", "evaluation", "**when**", "**not**", *(["**source**"] if name != "none" else [])]
    assert [word for word in wanted if word not in SECTIONS[class_name].lower()] == []


def written_signature(name: str) -> dict[str, Any]:
    """The arguments that the page's section writes, with their defaults."""
    (function,) = ast.parse(f"def f{SIGNATURES[name]}: pass").body
    assert isinstance(function, ast.FunctionDef)
    arguments = function.args
    defaults = [None if d is None else ast.literal_eval(d) for d in arguments.kw_defaults]
    required = [d is None for d in arguments.kw_defaults]
    shown = {argument.arg: inspect.Parameter.empty for argument in arguments.args}
    for argument, default, none in zip(arguments.kwonlyargs, defaults, required, strict=True):
        shown[argument.arg] = inspect.Parameter.empty if none else default
    return shown | ({} if arguments.kwarg is None else {arguments.kwarg.arg: inspect.Parameter.empty})


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_written_signature_is_the_codes(name: str) -> None:
    written = written_signature(name)
    function = getattr(norm, name, None) or getattr(bnlight, name)
    actual = {name: p.default for name, p in inspect.signature(function).parameters.items()}
    if "shared" in written:
        del written["shared"]
        first = {"num_features": actual.pop("num_features")}
        actual = first | {name: d for name, d in actual.items() if name not in SHARED or d != SHARED[name]}
    assert written == actual


@pytest.mark.parametrize("name", norm.__all__)
def test_everything_public_is_on_the_page(name: str) -> None:
    assert f"`{name}" in PAGE


def made(name: str) -> tuple[Norm, torch.Tensor]:
    """A layer, and a batch so far from zero that batch renormalization meets its bounds."""
    torch.manual_seed(0)
    return NORMS[name](8).double(), torch.randn(6, 8, 5, dtype=torch.float64) * 20 + 50


@pytest.mark.parametrize("name", NORMS)
def test_the_statistics_are_over_the_axes_of_the_table(name: str) -> None:
    """An output depends on another value exactly if both share statistics."""
    _, over, _, _ = FACTS[name]
    over = over.split(" or ")[0]
    pools = [set(pool) - {",", " "} for pool in re.findall(r"`([NC*, ]+)`", over)]
    for axes in ({"N"}, {"C"}, {"*"}, {"N", "C"}, {"N", "*"}, {"C", "*"}):
        layer, x = made(name)
        other = x.clone()
        # The next channel is in the same group.
        other[int("N" in axes), int("C" in axes), int("*" in axes)] += 30
        change = (layer(other) - made(name)[0](x))[0, 0, 0].abs()
        assert bool(change > 1e-9) == any(axes <= pool for pool in pools), axes


@pytest.mark.parametrize("name", NORMS)
def test_training_equals_evaluation_where_the_table_says_so(name: str) -> None:
    layer, x = made(name)
    _, _, same, _ = FACTS[name]
    y = layer(x)
    assert torch.allclose(y, layer.eval()(x)) == (same == "yes")


def test_links_inside_the_page_lead_somewhere() -> None:
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", PAGE), re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(#(.*?)\)", PAGE)
    assert links
    assert {*links} <= anchors
    assert "(docs/norms.md)" in README


COMMANDS = [line for kind, text in BLOCK.findall(PAGE) if kind == "bash" for line in text.splitlines()]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_page_compose_and_build_their_norm(command: str) -> None:
    program, train, *overrides = shlex.split(command)
    assert (program, train) == ("bnlight", "train")
    identity.register()
    searchpath.register()
    overrides = [o for o in overrides if o != "-m" and not re.search(r"=[^\[]*,", o)]
    with initialize_config_module("bnlight.conf", **VERSION_BASE):
        config = OmegaConf.to_container(compose("train", overrides), resolve=True)
    instantiate(config["norm"])(8)
