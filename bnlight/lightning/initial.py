"""Start from given weights: into another module, under other prefixes, with another norm."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bnlight.norm.paths import fitting, named_layers, plain
from bnlight.surgery.known import is_norm

PREFIXES = ("", "model.", "module.", "module.model.")
NESTS = ("state_dict", "model_state_dict", "model")  # where a checkpoint keeps its weights
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def initialize(module: nn.Module, file: str | Path) -> str:
    """Load the weights in `file` into `module`; returns what was loaded and what was not, in words.

    `file` holds a state dict or a checkpoint with one. Its keys may differ from the module's by a prefix
    (`model.` of a LightningModule, `module.` of DDP, `_orig_mod.` of torch.compile). Norms may differ: what the
    file has of another norm is left out, what it lacks keeps its first value, and a bias that one norm makes
    redundant and the other does not becomes 0, or is left out.

    Raises ValueError for anything else that is missing, unexpected or of another shape, listing it, and for a
    file that holds more than plain data and tensors.
    """
    given = read_state_dict(Path(file))
    wanted = module.state_dict()
    given = {plain(key): value for key, value in given.items()}
    strip, add = _prefixes(given, {*map(plain, wanted)})
    ours = {add + key.removeprefix(strip): value for key, value in given.items() if key.startswith(strip)}
    renamed = fitting(ours, wanted)
    ignored = [key for key in given if not key.startswith(strip)]
    modules = dict(named_layers(module))
    loaded = {key: value for key, value in renamed.items() if key in wanted}
    _refuse_shapes(file, loaded, wanted)
    others = [key for key in renamed if key not in wanted]
    lost_biases = [key for key in others if _is_bias(key, modules)]
    of_norms = [key for key in others if _is_norm(key, modules, renamed)]
    unexpected = [*ignored, *(key for key in others if key not in {*lost_biases, *of_norms})]
    lacking = module.load_state_dict(loaded, strict=False).missing_keys
    zeroed = [
        key for key in lacking if _is_bias(key, modules) and key.removesuffix("bias") + "weight" in loaded
    ]
    fresh = [key for key in lacking if _of_norm(key, modules)]
    missing = [key for key in lacking if key not in {*zeroed, *fresh}]
    differs = bool(of_norms or fresh)  # a bias comes and goes with the norm behind it, never alone
    if not differs:
        missing, unexpected = missing + zeroed, unexpected + lost_biases
    if missing or unexpected or not loaded:
        raise ValueError(
            f"init_from={file} does not fit {type(module).__name__}.\n"
            f"  missing in the file: {_listed(missing)}\n  in the file, but not in the module: {_listed(unexpected)}"
        )
    with torch.no_grad():
        for key in zeroed:
            module.get_parameter(key).zero_()
    parts = [f"started from {file}: {len(loaded)} tensors"]
    notes = {
        "of another norm, left out": of_norms,
        "redundant biases, left out": lost_biases,
        "not in the file, first values": fresh,
        "not in the file, set to 0": zeroed,
    }
    return "\n".join(parts + [f"  {what}: {_listed(keys)}" for what, keys in notes.items() if keys])


def read_state_dict(file: Path) -> dict[str, Tensor]:
    """The state dict in `file`; ValueError if it holds none, or more than tensors and plain data."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} holds more than tensors and plain data, or is no file of torch.save, and is not read, as it could "
            f"run any program. Save the weights alone: torch.save(model.state_dict(), path). ({_first_line(error)})"
        ) from error
    for name in NESTS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    tensors = (
        {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    )
    if not tensors:
        keys = f" with {_listed(map(str, content))}" if isinstance(content, Mapping) else ""
        raise ValueError(
            f"{file} holds a {type(content).__name__}{keys}; expected a state dict, or a checkpoint with one under "
            f"{', '.join(NESTS)}"
        )
    return tensors


def _prefixes(given: Mapping[str, Any], wanted: set[str]) -> tuple[str, str]:
    """What to strip from the file's keys and what to add, such that most of them are the module's."""

    def hits(pair: tuple[str, str]) -> int:
        strip, add = pair
        return sum(add + key.removeprefix(strip) in wanted for key in given if key.startswith(strip))

    return max(((strip, add) for strip in PREFIXES for add in PREFIXES), key=hits)


def _refuse_shapes(file: str | Path, loaded: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    wrong = [
        f"{key} {tuple(value.shape)}, here {tuple(wanted[key].shape)}"
        for key, value in loaded.items()
        if not is_lazy(wanted[key]) and value.shape != wanted[key].shape
    ]
    if wrong:
        raise ValueError(f"init_from={file} has other shapes: {_listed(wrong)}")


def _owner(key: str, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    return modules.get(plain(key).rpartition(".")[0])


def _of_norm(key: str, modules: Mapping[str, nn.Module]) -> bool:
    owner = _owner(key, modules)
    return owner is not None and is_norm(owner)


def _is_bias(key: str, modules: Mapping[str, nn.Module]) -> bool:
    linear = (nn.Linear, nn.modules.conv._ConvNd)
    return key.endswith(".bias") and isinstance(_owner(key, modules), linear)


def _is_norm(key: str, modules: Mapping[str, nn.Module], given: Mapping[str, Any]) -> bool:
    """Whether the key is one of a norm: here, or, as it has running statistics, in the file."""
    path = key.rpartition(".")[0]
    return _of_norm(key, modules) or any(f"{path}.{name}" in given for name in STATISTICS)


def _listed(keys: Iterable[str], most: int = 8) -> str:
    names = list(keys)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + rest


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
