"""Fetch published files, or say how to get them by hand."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path


def download(base_url: str, md5: Mapping[str, str], folder: Path) -> None:
    """Fetch the files into ``folder``, each checked against its sum before it takes its name.

    A file that is there with the right sum is not fetched again.

    Args:
        base_url: address that a file's name is appended to.
        md5: file names with their published MD5 sums.
        folder: made if absent.

    Raises:
        OSError: no connection, the server refuses, or the folder cannot be written.
        ValueError: what came has another sum.
    """
    import pooch  # here, because most runs fetch nothing

    fetch = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), chunk_size=2**16)
    for name, checksum in md5.items():
        url = f"{base_url.rstrip('/')}/{name}"
        pooch.retrieve(url, known_hash=f"md5:{checksum}", fname=name, path=folder, downloader=fetch)
