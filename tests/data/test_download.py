"""fetch, from a real server on loopback: a wrong or incomplete file is never kept."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from esm_efficient import load_deeploc
from esm_efficient.data import deeploc, download
from esm_efficient.data.download import cache_folder, fetch, sha256_of
from esm_efficient.errors import DataError, DownloadError


@pytest.fixture
def server(demo_table):
    """Serves the demo table and broken answers, and counts requests as ``server.hits``.

    The table is at /table.csv, half of it at /cut.csv. /loop and /far/N redirect for ever; /endless
    and /slow send no end.
    """
    content = demo_table.read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.hits += 1
            if self.path.startswith(("/loop", "/far/")):
                self.send_response(302)
                further = "/loop" if self.path == "/loop" else f"/far/{int(self.path[5:]) + 1}"
                self.send_header("Location", further)
                self.end_headers()
                return
            if self.path in ("/endless", "/slow"):
                self.send_response(200)
                self.end_headers()
                with contextlib.suppress(ConnectionError):
                    for _ in range(1000):
                        self.wfile.write(b"A" * (100_000 if self.path == "/endless" else 1))
                        time.sleep(0.0 if self.path == "/endless" else 0.05)
                return
            if self.path not in ("/table.csv", "/cut.csv"):
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content if self.path == "/table.csv" else content[: len(content) // 2])

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as instance:
        instance.hits = 0
        instance.url = f"http://127.0.0.1:{instance.server_port}"
        instance.sha256 = hashlib.sha256(content).hexdigest()
        thread = threading.Thread(target=instance.serve_forever)
        thread.start()
        yield instance
        instance.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_a_file_is_fetched_once_and_checked(server, tmp_path, demo_table):
    destination = tmp_path / "new" / "table.csv"
    for _ in range(2):
        assert fetch(f"{server.url}/table.csv", destination, sha256=server.sha256) == destination
    assert server.hits == 1
    assert destination.read_bytes() == demo_table.read_bytes()
    assert sha256_of(destination) == server.sha256
    assert [path.name for path in destination.parent.iterdir()] == ["table.csv"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/loop", "cannot fetch .*infinite loop"),
        ("/far/0", "cannot fetch .*infinite loop"),
        ("/endless", "more than 1,000,000 bytes"),
        ("/slow", "too slow"),
        ("/table.csv", r"has [\d,]+ bytes, more than 1,000"),
    ],
)
def test_a_download_without_end_is_refused(server, tmp_path, monkeypatch, path, message):
    monkeypatch.setattr(download, "MAX_BYTES", 1000 if path == "/table.csv" else 1_000_000)
    with pytest.raises(DownloadError, match=message):
        fetch(server.url + path, tmp_path / "table.csv", timeout=0.3 if path == "/slow" else 10)
    assert list(tmp_path.iterdir()) == []
    assert server.hits < 20


def test_an_address_of_a_file_on_this_machine_is_refused(tmp_path):
    for address in ("file:///dev/zero", "ftp://127.0.0.1/a", "/dev/zero"):
        with pytest.raises(DownloadError, match=r"not an http or https address\. Give the path"):
            fetch(address, tmp_path / "table.csv")
    with pytest.raises(DataError, match=r"no file at .*Give a path"):
        load_deeploc("file:///dev/zero")


@pytest.mark.parametrize(
    ("path", "sha256", "message"),
    [
        ("/table.csv", "0" * 64, "has SHA-256"),
        ("/cut.csv", None, "ended after|cannot fetch"),
        ("/absent.csv", None, "404"),
    ],
)
def test_a_failed_download_leaves_no_file(server, tmp_path, path, sha256, message):
    with pytest.raises(DownloadError, match=message):
        fetch(server.url + path, tmp_path / "table.csv", sha256=sha256)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_in_the_cache_is_an_error(tmp_path):
    (tmp_path / "table.csv").write_text("damaged")
    with pytest.raises(DownloadError, match="Delete it"):
        fetch("http://127.0.0.1:9/table.csv", tmp_path / "table.csv", sha256="0" * 64)


def test_offline_the_error_says_which_file_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setenv("ESM_EFFICIENT_CACHE", str(tmp_path / "cache"))
    # Nothing answers at port 9 (discard) of loopback.
    address = "http://127.0.0.1:9/Swissprot_Train_Validation_dataset.csv"
    monkeypatch.setattr(deeploc, "DEEPLOC_URL", address)
    with pytest.raises(DownloadError) as caught:
        load_deeploc()
    wanted = tmp_path / "cache" / "Swissprot_Train_Validation_dataset.csv"
    assert f"get {address} on another machine and put it at {wanted}" in str(caught.value)


def test_the_default_table_is_checked_against_the_published_checksum(server, tmp_path, monkeypatch):
    monkeypatch.setenv("ESM_EFFICIENT_CACHE", str(tmp_path))
    monkeypatch.setattr(deeploc, "DEEPLOC_URL", f"{server.url}/table.csv")
    with pytest.raises(DownloadError, match=deeploc.DEEPLOC_SHA256):
        load_deeploc()
    monkeypatch.setattr(deeploc, "DEEPLOC_SHA256", server.sha256)
    assert len(load_deeploc()["train"]) > 0


def test_an_address_is_loaded_through_the_cache(server, tmp_path, monkeypatch, demo_table):
    monkeypatch.setenv("ESM_EFFICIENT_CACHE", str(tmp_path))
    for _ in range(2):
        data = load_deeploc(f"{server.url}/table.csv", sha256=server.sha256)
    assert server.hits == 1
    assert data["test"][:] == load_deeploc(demo_table)["test"][:]


def test_addresses_with_the_same_file_name_are_cached_apart(server, tmp_path, monkeypatch):
    monkeypatch.setenv("ESM_EFFICIENT_CACHE", str(tmp_path))
    load_deeploc(f"{server.url}/table.csv")
    with pytest.raises(DownloadError, match="404"):
        load_deeploc(f"{server.url}/other/table.csv")


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("ESM_EFFICIENT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "esm_efficient"
    monkeypatch.setenv("ESM_EFFICIENT_CACHE", str(tmp_path / "moved"))
    assert cache_folder() == tmp_path / "moved"


def test_the_published_checksum_is_that_of_the_real_table(deeploc_csv, tmp_path):
    import lzma

    packed = deeploc_csv.read_bytes()
    content = lzma.decompress(packed) if deeploc_csv.suffix == ".xz" else packed
    assert hashlib.sha256(content).hexdigest() == deeploc.DEEPLOC_SHA256
