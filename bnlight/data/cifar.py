"""Read CIFAR-10 in each form in which it is published: pickles or binary, unpacked or as an archive."""

from __future__ import annotations

import io
import pickle
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

IMAGE = (3, 32, 32)
BYTES = 3 * 32 * 32
PYTHON = ("cifar-10-batches-py", "cifar-10-python.tar.gz")
BINARY = ("cifar-10-batches-bin", "cifar-10-binary.tar.gz")
BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")


def present(folder: Path) -> Path | None:
    """The unpacked folder or the archive of CIFAR-10 within ``folder``, or None."""
    names = (BINARY[0], PYTHON[0], BINARY[1], PYTHON[1])
    return next((folder / name for name in names if (folder / name).exists()), None)


def read_cifar(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images (n, 3, 32, 32) and labels (n,), test images and labels, all unsigned bytes.

    Args:
        path: one of the folders or archives of ``PYTHON`` and ``BINARY``.

    Raises:
        ValueError: a file is missing, damaged or of the wrong size.
    """
    binary = path.name in BINARY
    names = [f"{name}.bin" for name in BATCHES] if binary else list(BATCHES)
    contents = _members(path, names) if path.is_file() else _files(path, names)
    parse = _from_binary if binary else _from_pickle
    images, labels = zip(*(parse(contents[name], path / name) for name in names), strict=True)
    return np.concatenate(images[:-1]), np.concatenate(labels[:-1]), images[-1], labels[-1]


def _files(folder: Path, names: list[str]) -> dict[str, bytes]:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks {', '.join(missing)}: complete it, or delete it to have it downloaded"
        )
    return {name: (folder / name).read_bytes() for name in names}


def _members(archive: Path, names: list[str]) -> dict[str, bytes]:
    """Files of a tar archive by their last name, read in place: nothing is unpacked onto the disk."""
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                name = Path(member.name).name
                file = tar.extractfile(member) if name in names else None
                if file is not None:
                    contents[name] = file.read()
    except (EOFError, OSError, tarfile.TarError, zlib.error) as error:
        raise ValueError(
            f"{archive} is damaged ({error}): replace it, or delete it to have it downloaded"
        ) from error
    missing = [name for name in names if name not in contents]
    if missing:
        raise ValueError(
            f"{archive} lacks {', '.join(missing)}: replace it, or delete it to have it downloaded"
        )
    return contents


def _from_binary(content: bytes, path: Path) -> tuple[np.ndarray, np.ndarray]:
    if not content or len(content) % (1 + BYTES):
        raise ValueError(
            f"{path} has {len(content)} bytes, no multiple of {1 + BYTES}: replace it or delete {path.parent}"
        )
    rows = np.frombuffer(content, dtype=np.uint8).reshape(-1, 1 + BYTES)
    return rows[:, 1:].reshape(-1, *IMAGE), rows[:, 0]


def _from_pickle(content: bytes, path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
        images = np.asarray(batch[b"data"], dtype=np.uint8).reshape(-1, *IMAGE)
        labels = np.asarray(batch[b"labels"], dtype=np.uint8)
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(
            f"{path} is no batch of CIFAR-10 ({error}): replace it, or delete {path.parent}"
        ) from error
    return images, labels


class _ArraysOnly(pickle.Unpickler):
    """Loads the arrays and builtin containers of CIFAR's pickles, and refuses to look up anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        if name == "_reconstruct" and module in {"numpy.core.multiarray", "numpy._core.multiarray"}:
            return np.empty(0).__reduce__()[0]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file holds")
