"""How a checkpoint is written: whole, and so that it can be loaded again."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it: a reader finds the old file or the new one.

    Lightning writes it to the system's folder for temporary files and moves it, which between file systems is a
    copy that a kill or a full disk cuts off.

    What could not be loaded again with `weights_only=True` is a TypeError at once, instead of after the training.
    """

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        new = place.with_name(f".{place.name}.{os.getpid()}")
        content = io.BytesIO()  # torch's own writer says nothing of a full disk
        torch.save(checkpoint, content)
        if _unknown(content):
            raise TypeError(_refusal(checkpoint))
        try:
            new.write_bytes(content.getbuffer())
            new.replace(place)
        finally:
            new.unlink(missing_ok=True)

    def load_checkpoint(self, path: Any, *how: Any, **more: Any) -> dict[str, Any]:
        """The checkpoint; a RuntimeError that names the file and the way out if it cannot be loaded."""
        try:
            return super().load_checkpoint(path, *how, **more)
        except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
            reason = f"{type(error).__name__}: {error}".split(". ")[0]
            raise RuntimeError(
                f"{path} cannot be loaded: delete it, or start the job again (--force); {reason}"
            ) from error


def _unknown(content: io.BytesIO) -> list[str]:
    """What `torch.load(..., weights_only=True)` would not take."""
    content.seek(0)
    return torch.serialization.get_unsafe_globals_in_checkpoint(content)


def _refusal(checkpoint: dict[str, Any]) -> str:
    """Which parts of the checkpoint cannot be loaded again, what is in them, and the way out."""
    parts = dict[str, Any]()
    for key, value in checkpoint.items():
        nested = isinstance(value, dict) and all(isinstance(name, str) for name in value)
        parts |= {f"{key}.{name}": part for name, part in value.items()} if nested else {key: value}
    told = []
    for name, part in parts.items():
        content = io.BytesIO()
        torch.save(part, content)
        if unknown := _unknown(content):
            told.append(f"{name} has {', '.join(sorted(set(unknown)))}")
    return (
        f"a checkpoint of this training could not be loaded again with weights_only=True: {'; '.join(told)}. Keep "
        "there (state_dict, on_save_checkpoint) numbers of Python (float(x)), strings (str(path)), lists, dicts and "
        "tensors, or allow the classes by torch.serialization.add_safe_globals"
    )
