"""Read the idx files in which MNIST and its relatives are published."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def present(folder: Path, name: str) -> Path | None:
    """The file of that name in the folder, plain or gzipped, or None."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def read_idx(path: Path) -> np.ndarray:
    """An array of unsigned bytes from an idx file, plain or gzipped.

    The format (Y. LeCun, "The MNIST database"): two zero bytes, the type (8 = unsigned byte), the number of
    axes, their lengths as big-endian 32-bit integers, then the values.

    Raises:
        ValueError: the file is damaged, cut short, or something else.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(
            f"{path} is damaged ({error}): replace it, or delete it to have it downloaded"
        ) from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08" or len(content) < 4 + 4 * content[3]:
        raise ValueError(
            f"{path} is no idx file of unsigned bytes (it begins with {content[:4]!r}): replace it"
        )
    shape = struct.unpack(f">{content[3]}I", content[4 : 4 + 4 * content[3]])
    values = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * len(shape))
    if len(values) != math.prod(shape):
        raise ValueError(
            f"{path} has {len(values)} values where its header says {'x'.join(map(str, shape))}: "
            "replace it, or delete it to have it downloaded"
        )
    return values.reshape(shape)
