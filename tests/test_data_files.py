"""Published files: found, read, refused when damaged."""

import gzip
import io
import pickle
import struct
import tarfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from bnlight.data import CIFAR10, MNIST, FashionMNIST
from bnlight.data.cifar import BATCHES, read_cifar
from bnlight.data.idx import FILES, read_idx

RNG = np.random.default_rng(0)


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder: Path, *, gzipped: bool = False, n: int = 40) -> list[np.ndarray]:
    """A small data set in MNIST's format; the four arrays as written."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = []
    for name, size in zip(FILES, (n, n, n // 2, n // 2), strict=True):
        if "images" in name:
            arrays.append(RNG.integers(0, 256, (size, 28, 28), dtype=np.uint8))
        else:
            arrays.append((np.arange(size) % 10).astype(np.uint8))
        content = idx_bytes(arrays[-1])
        if gzipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return arrays


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2's str, as the published batches of CIFAR-10 have them."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = save_bytes


def cifar_batches(n: int = 20) -> list[tuple[np.ndarray, np.ndarray]]:
    return [
        (RNG.integers(0, 256, (n, 3072), dtype=np.uint8), RNG.permutation(n).astype(np.uint8) % 10)
        for _ in BATCHES
    ]


def cifar_files(batches: list[tuple[np.ndarray, np.ndarray]], *, binary: bool) -> dict[str, bytes]:
    files = {}
    for name, (x, y) in zip(BATCHES, batches, strict=True):
        if binary:
            files[f"{name}.bin"] = np.concatenate([y[:, None], x], axis=1).tobytes()
        else:
            stream = io.BytesIO()
            batch = {b"batch_label": b"a batch", b"labels": y.tolist(), b"data": x, b"filenames": [b"a.png"]}
            Python2Pickler(stream, protocol=2).dump(batch)
            files[name] = stream.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    return files


def write_archive(path: Path, folder: str, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize("folder", ["mnist", "MNIST/raw"])
def test_mnist_reads_idx_files_from_either_folder_plain_or_gzipped(
    tmp_path: Path, folder: str, gzipped: bool
) -> None:
    x_train, y_train, x_test, y_test = write_idx(tmp_path / folder, gzipped=gzipped)
    loaded = MNIST(tmp_path).load()
    np.testing.assert_array_equal(loaded.x_train[:, 0], x_train)
    np.testing.assert_array_equal(loaded.y_train, y_train)
    np.testing.assert_array_equal(loaded.x_test[:, 0], x_test)
    np.testing.assert_array_equal(loaded.y_test, y_test)


@pytest.mark.parametrize("place", ["cifar10", "."])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("binary", [False, True])
def test_cifar_reads_pickles_and_binary_files_unpacked_or_as_an_archive(
    tmp_path: Path, binary: bool, packed: bool, place: str
) -> None:
    batches = cifar_batches()
    files = cifar_files(batches, binary=binary)
    folder = "cifar-10-batches-bin" if binary else "cifar-10-batches-py"
    if packed:
        archive = "cifar-10-binary.tar.gz" if binary else "cifar-10-python.tar.gz"
        write_archive(tmp_path / place / archive, folder, files)
    else:
        (tmp_path / place / folder).mkdir(parents=True)
        for name, content in files.items():
            (tmp_path / place / folder / name).write_bytes(content)
    loaded = CIFAR10(tmp_path).load()
    # red, green and blue planes of 32x32, row by row
    np.testing.assert_array_equal(loaded.x_train[20:40].reshape(20, 3072), batches[1][0])
    np.testing.assert_array_equal(loaded.x_train[3, 1, 2, 5], batches[0][0][3, 1024 + 2 * 32 + 5])
    np.testing.assert_array_equal(loaded.y_train, np.concatenate([y for _, y in batches[:5]]))
    np.testing.assert_array_equal(loaded.x_test.reshape(20, 3072), batches[5][0])
    np.testing.assert_array_equal(loaded.y_test, batches[5][1])


def test_a_data_set_is_read_once_per_process(tmp_path: Path) -> None:
    write_idx(tmp_path / "mnist")
    first = MNIST(tmp_path).load()
    for file in (tmp_path / "mnist").iterdir():
        file.write_bytes(b"")
    assert MNIST(tmp_path).load() is first


def test_a_cached_data_set_is_not_changed_by_scaling(tmp_path: Path) -> None:
    write_idx(tmp_path / "mnist")
    data = MNIST(tmp_path, batch_size=8)
    before = [array.copy() for array in data.load()]
    data.setup()
    for batch, _ in data.test_dataloader():
        batch.zero_()
    for array, copy in zip(data.load(), before, strict=True):
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no idx file"),
        (b"\x00\x00\x0d\x01\x00\x00\x00\x01\x00\x00\x00\x00", "no idx file"),
        (idx_bytes(np.zeros((4, 3), np.uint8))[:-1], "has 11 values where its header says 4x3"),
        (idx_bytes(np.zeros((4, 3), np.uint8)) + b"\x00", "has 13 values"),
        (idx_bytes(np.zeros((4, 3), np.uint8))[:9], "no idx file"),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "file-idx"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"file-idx .*{message}"):
        read_idx(path)


@pytest.mark.parametrize("cut", [5, 40, -3])
def test_a_cut_off_gzip_file_is_named(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "file-idx.gz"
    path.write_bytes(gzip.compress(idx_bytes(RNG.integers(0, 256, (40, 30), dtype=np.uint8)))[:cut])
    with pytest.raises(ValueError, match=r"file-idx\.gz is damaged .*replace it, or delete it"):
        read_idx(path)


def test_a_cut_off_archive_is_named(tmp_path: Path) -> None:
    archive = tmp_path / "cifar-10-python.tar.gz"
    write_archive(archive, "cifar-10-batches-py", cifar_files(cifar_batches(), binary=False))
    archive.write_bytes(archive.read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"cifar-10-python\.tar\.gz is damaged"):
        read_cifar(archive)


def test_missing_and_cut_off_batches_of_cifar_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name, content in cifar_files(cifar_batches(), binary=True).items():
        (folder / name).write_bytes(content)
    (folder / "data_batch_2.bin").write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"data_batch_2\.bin has 3 bytes"):
        read_cifar(folder)
    (folder / "data_batch_2.bin").unlink()
    with pytest.raises(ValueError, match=r"lacks data_batch_2\.bin"):
        read_cifar(folder)


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("harmed"),)


def test_a_pickle_that_calls_anything_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in BATCHES:
        (folder / name).write_bytes(pickle.dumps({b"data": Harmful(), b"labels": []}))
    with pytest.raises(ValueError, match=r"data_batch_1 is no batch of CIFAR-10 .*which no CIFAR file holds"):
        read_cifar(folder)
    assert not (tmp_path / "harmed").exists()


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    write_idx(tmp_path / "mnist")
    (tmp_path / "mnist" / FILES[0]).write_bytes(idx_bytes(np.zeros((40, 14, 14), np.uint8)))
    with pytest.raises(ValueError, match=r"samples \(n, 1, 28, 28\).* are \(40, 1, 14, 14\) and \(40,\)"):
        MNIST(tmp_path).setup()


def test_labels_beyond_the_classes_are_refused(tmp_path: Path) -> None:
    write_idx(tmp_path / "mnist")
    (tmp_path / "mnist" / FILES[3]).write_bytes(idx_bytes(np.full(20, 11, np.uint8)))
    with pytest.raises(ValueError, match="test data of MNIST should have labels from 0 to 9"):
        MNIST(tmp_path).setup()


@pytest.mark.skipif(
    not (FashionMNIST.system_folder and FashionMNIST.system_folder.is_dir()),
    reason="the Debian package dataset-fashion-mnist is not installed",
)
def test_fashion_mnist_comes_from_the_debian_package(tmp_path: Path) -> None:
    data = FashionMNIST(tmp_path, url="http://127.0.0.1:9", limit=5000)
    data.prepare_data()
    data.setup()
    x, y = data.train_dataloader().x, data.test_dataloader().y
    assert x.shape == (5000, 1, 28, 28)
    assert y.bincount().tolist() == [1000] * 10
    assert not any(tmp_path.iterdir())
    raw = torch.from_numpy(data.load().x_train.astype(np.float32))
    assert raw.mean().item() / 255 == pytest.approx(0.2860, abs=1e-4)  # as published with the data set
