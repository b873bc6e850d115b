"""The data sets that come with bnlight: one embedded, three read from published files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from bnlight.data import cifar, idx
from bnlight.data.download import download
from bnlight.data.module import Arrays, TensorData


class Digits(TensorData):
    """1797 handwritten digits of 8x8 pixels, embedded in scikit-learn: nothing to download, fast to train.

    The last 360 in published order, from other writers than the first, are the test samples.

    Args:
        val_fraction: share of the other 1437 samples set aside for validation.
        options: see :class:`bnlight.data.TensorData`.
    """

    input_shape = (1, 8, 8)
    num_classes = 10
    peak = 16.0

    def __init__(self, *, val_fraction: float = 0.2, **options: Any) -> None:
        super().__init__(val_fraction=val_fraction, **options)

    def load(self) -> Arrays:
        return _digits()


class FileData(TensorData):
    """A data set read from published files under ``root``, which are downloaded if absent.

    Looked for in each of the class's ``folders`` under ``root``, and in its ``system_folder``. Only
    ``prepare_data`` downloads (Lightning calls it on one process of a machine), into the first folder.

    Args:
        root: folder of all data sets.
        url: base address of a mirror to download from, in place of the published one.
        options: see :class:`bnlight.data.TensorData`.

    Raises:
        FileNotFoundError: the files are absent and cannot be downloaded; the message says how to get them.
        ValueError: a file is damaged.
    """

    folders: ClassVar[tuple[str, ...]]
    system_folder: ClassVar[Path | None] = None
    published: ClassVar[str]  # base address
    md5: ClassVar[Mapping[str, str]]
    hint: ClassVar[str] = ""

    def __init__(self, root: str | Path = "data", url: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.root = Path(root).expanduser().resolve()
        self.url = url

    def find(self, folder: Path) -> Path | None:
        """What to read if the folder holds the whole data set, else None."""
        raise NotImplementedError

    def read(self, found: Path) -> Arrays:
        """Read what :meth:`find` found."""
        raise NotImplementedError

    def wanted(self, folder: Path) -> dict[str, str]:
        """Published files, with their MD5 sums, that the folder lacks."""
        return dict(self.md5)

    def prepare_data(self) -> None:
        if self._found() is not None:
            return
        folder = self.root / self.folders[0]
        try:
            download(self.url or self.published, self.wanted(folder), folder)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(self._advice(f"and cannot be downloaded ({error})")) from error

    def load(self) -> Arrays:
        found = self._found()
        if found is None:
            raise FileNotFoundError(self._advice("and prepare_data() has not been called"))
        return self.read(found)

    def _places(self) -> list[Path]:
        places = [self.root / folder for folder in self.folders]
        return places if self.system_folder is None else [*places, self.system_folder]

    def _found(self) -> Path | None:
        return next((found for folder in self._places() if (found := self.find(folder)) is not None), None)

    def _advice(self, problem: str) -> str:
        name = type(self).__name__
        ways = [
            f"put {', '.join(self.md5)} into {self.root / self.folders[0]}",
            f"set root (on the command line: paths.data) to the folder that holds {self.folders[0]}/",
            f"set url (data.url) to a mirror of {self.published}",
        ]
        if self.hint:
            ways.append(self.hint)
        looked = ", ".join(map(str, self._places()))
        return "\n  - ".join([f"{name} is not in {looked} {problem}. Ways to get it:", *ways])


class IdxData(FileData):
    """Images in four idx files, plain or gzipped."""

    input_shape = (1, 28, 28)
    num_classes = 10

    def find(self, folder: Path) -> Path | None:
        return folder if all(idx.present(folder, name) for name in idx.FILES) else None

    def wanted(self, folder: Path) -> dict[str, str]:
        return {
            name: md5 for name, md5 in self.md5.items() if not idx.present(folder, name.removesuffix(".gz"))
        }

    def read(self, found: Path) -> Arrays:
        return _read_idx(found)


class MNIST(IdxData):
    """70,000 handwritten digits of 28x28 pixels (LeCun et al. 1998), 10,000 of them for testing.

    The arguments are those of :class:`FileData`.
    """

    folders = ("mnist", "MNIST/raw")
    published = "https://ossci-datasets.s3.amazonaws.com/mnist"
    md5: ClassVar[Mapping[str, str]] = {
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    }


class FashionMNIST(IdxData):
    """70,000 clothes of 28x28 pixels (Xiao et al. 2017, arXiv:1708.07747), 10,000 of them for testing.

    The arguments are those of :class:`FileData`.
    """

    can_augment = True
    folders = ("fashion_mnist", "FashionMNIST/raw")
    system_folder = Path("/usr/share/datasets/fashion-mnist")
    published = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
    md5: ClassVar[Mapping[str, str]] = {
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    }
    hint = "on Debian and Ubuntu: apt install dataset-fashion-mnist"


class CIFAR10(FileData):
    """60,000 colour photographs of 32x32 pixels in ten classes (Krizhevsky 2009), 10,000 of them for testing.

    Reads both published forms, unpacked or as the archive, under ``<root>/cifar10`` or ``<root>``.

    The arguments are those of :class:`FileData`.
    """

    input_shape = (3, 32, 32)
    num_classes = 10
    can_augment = True
    folders = ("cifar10", ".")
    published = "https://www.cs.toronto.edu/~kriz"
    md5: ClassVar[Mapping[str, str]] = {"cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a"}
    hint = (
        "the folders cifar-10-batches-py and cifar-10-batches-bin and cifar-10-binary.tar.gz will do as well"
    )

    def find(self, folder: Path) -> Path | None:
        return cifar.present(folder)

    def read(self, found: Path) -> Arrays:
        return _read_cifar(found)


# Each process reads a data set once: in a sweep, later jobs find it here.


@cache
def _digits() -> Arrays:
    from sklearn.datasets import load_digits  # here, because other data sets do without

    x, y = load_digits(return_X_y=True)
    x = x.reshape(-1, 1, 8, 8).astype(np.uint8)
    return Arrays(x[:-360], y[:-360], x[-360:], y[-360:])


@cache
def _read_idx(folder: Path) -> Arrays:
    paths = [idx.present(folder, name) for name in idx.FILES]
    x_train, y_train, x_test, y_test = (idx.read_idx(path) for path in paths if path is not None)
    return Arrays(x_train[:, None], y_train, x_test[:, None], y_test)


@cache
def _read_cifar(path: Path) -> Arrays:
    return Arrays(*cifar.read_cifar(path))
