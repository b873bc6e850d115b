"""Absent files: downloaded once and checked, or an error that says how to get them."""

import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from test_data_files import write_idx

from bnlight.data import CIFAR10, MNIST, FashionMNIST
from bnlight.data.idx import FILES


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """A local mirror: its address, its folder, and the list of what was asked for."""
    requests: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            requests.append(self.path)

    folder = tmp_path / "mirror"
    folder.mkdir()
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}", folder, requests
    httpd.shutdown()
    thread.join()
    httpd.server_close()


class SmallMNIST(MNIST):
    """MNIST's code with the sums of small files."""


def publish(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_idx(folder, gzipped=True)
    md5 = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    monkeypatch.setattr(SmallMNIST, "md5", md5)


def test_absent_files_are_downloaded_once(
    tmp_path: Path, server: tuple[str, Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, mirror, requests = server
    publish(mirror, monkeypatch)
    root = tmp_path / "root"
    data = SmallMNIST(root, url=url, batch_size=8)
    data.prepare_data()
    assert sorted(requests) == sorted(f"/{name}.gz" for name in FILES)
    data.setup()
    assert len(data.test_dataloader().x) == 20
    SmallMNIST(root, url=url).prepare_data()
    assert len(requests) == 4
    assert sorted(path.name for path in (root / "mnist").iterdir()) == sorted(f"{name}.gz" for name in FILES)


def test_only_missing_files_are_downloaded_and_none_replaced(
    tmp_path: Path, server: tuple[str, Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, mirror, requests = server
    publish(mirror, monkeypatch)
    write_idx(tmp_path / "root" / "mnist")  # plain files, so other sums
    (tmp_path / "root" / "mnist" / FILES[1]).unlink()
    SmallMNIST(tmp_path / "root", url=f"{url}/").prepare_data()
    assert requests == [f"/{FILES[1]}.gz"]


def test_a_download_with_a_wrong_sum_is_refused_and_leaves_nothing(
    tmp_path: Path, server: tuple[str, Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, mirror, _ = server
    publish(mirror, monkeypatch)
    (mirror / f"{FILES[0]}.gz").write_bytes(b"something else")
    with pytest.raises(FileNotFoundError, match="hash of downloaded file"):
        SmallMNIST(tmp_path / "root", url=url).prepare_data()
    assert not any(path.name.startswith(FILES[0]) for path in (tmp_path / "root" / "mnist").iterdir())


def test_without_a_network_one_error_says_all_ways_to_get_the_files(tmp_path: Path) -> None:
    data = CIFAR10(tmp_path, url="http://127.0.0.1:9")
    with pytest.raises(FileNotFoundError) as caught:
        data.prepare_data()
    message = str(caught.value)
    for part in (
        str(tmp_path / "cifar10"),
        "cifar-10-python.tar.gz",
        "paths.data",
        "data.url",
        "batches-bin",
    ):
        assert part in message
    with pytest.raises(FileNotFoundError, match=r"prepare_data\(\) has not been called"):
        data.setup()


def test_a_file_the_mirror_lacks_gives_the_same_error(
    tmp_path: Path, server: tuple[str, Path, list[str]]
) -> None:
    with pytest.raises(FileNotFoundError, match="404"):
        MNIST(tmp_path / "root", url=server[0]).prepare_data()


def test_fashion_mnist_advises_the_debian_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FashionMNIST, "system_folder", tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="apt install dataset-fashion-mnist"):
        FashionMNIST(tmp_path, url="http://127.0.0.1:9").prepare_data()
