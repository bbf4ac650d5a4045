"""Download a file once, check it, and keep it in a cache folder."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import IO, Any

from tqdm.auto import tqdm

from esm_efficient.errors import ConfigurationError, DownloadError

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "ESM_EFFICIENT_CACHE"
MAX_BYTES = 1 << 30
"""The most bytes of a download; the DeepLoc-2.0 table has 18 million."""

_CHUNK_BYTES = 1 << 20
_MIN_BYTES_PER_SECOND = 1024


def cache_folder() -> Path:
    """Return the folder for downloads: ``$ESM_EFFICIENT_CACHE``, or ``esm_efficient`` in the user's cache folder."""
    if moved := os.environ.get(CACHE_VARIABLE):
        return Path(moved).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "esm_efficient"


def made_folder(*parts: str) -> Path:
    """Return a folder in the cache folder, which is made if it is not there.

    Raises:
        ConfigurationError: it cannot be made or written to.
    """
    folder = cache_folder().joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(_not_writable(folder, error)) from error
    if not os.access(folder, os.W_OK):
        raise ConfigurationError(_not_writable(folder, "no permission"))
    return folder


def _not_writable(folder: Path, reason: object) -> str:
    return f"cannot write into {folder} ({reason}). Set {CACHE_VARIABLE} to a folder that is writable"


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def unfinished(path: Path) -> Path:
    """Return another name in the folder of a file, to write under until it is whole; no other process has the name."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")


def fetch(url: str, destination: str | Path, *, sha256: str | None = None, timeout: float = 30.0) -> Path:
    """Download a file with a progress bar, unless it exists.

    The file is written under another name beside its destination, checked, and moved into place in one step. So an
    interrupted or wrong download never leaves a file that looks complete.

    Args:
        url: http or https address.
        destination: where the file goes.
        sha256: the expected SHA-256 in hexadecimal; None to accept any content.
        timeout: seconds to wait for an answer, and after which a download must have an average speed of 1 KiB/s.

    Returns:
        `destination`.

    Raises:
        DownloadError: the address is not http or https, it cannot be reached or redirects without end, the content is
            too slow, has more than `MAX_BYTES`, is incomplete or has another SHA-256.
    """
    destination = Path(destination)
    if not url.lower().startswith(("http://", "https://")):
        raise DownloadError(f"{url} is not an http or https address. Give the path of a file on this machine as it is")
    if destination.exists():
        if sha256 is not None and (actual := sha256_of(destination)) != sha256:
            raise DownloadError(
                f"{destination} has SHA-256 {actual}, expected {sha256}: it is damaged or another version. Delete it "
                "to download it again."
            )
        return destination
    advice = f"To work offline, get {url} on another machine and put it at {destination}"
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=destination.parent, prefix=f".{destination.name}.")
    except OSError as error:
        raise DownloadError(_not_writable(destination.parent, error)) from error
    temporary = Path(name)
    try:
        try:
            with os.fdopen(handle, "wb") as output, urllib.request.urlopen(url, timeout=timeout) as response:
                actual = _receive(response, output, url, destination.name, timeout)
        except DownloadError as error:
            raise DownloadError(f"{error}. {advice}") from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise DownloadError(f"cannot fetch {url} ({error}). {advice}") from error
        if sha256 is not None and actual != sha256:
            raise DownloadError(
                f"{url} has SHA-256 {actual}, expected {sha256}: the file on the server has changed, or the download "
                "was altered. Nothing was kept."
            )
        temporary.chmod(0o644)  # mkstemp makes it private; a cache folder may be shared
        os.replace(temporary, destination)
    finally:
        temporary.unlink(missing_ok=True)
    logger.info("fetched %s to %s", url, destination)
    return destination


def _receive(response: Any, output: IO[bytes], url: str, name: str, timeout: float) -> str:
    """Write the content of a response, and return its SHA-256.

    Raises:
        DownloadError: the content is too long, too slow or incomplete.
    """
    length = response.headers.get("Content-Length")
    expected = int(length) if length else None
    if expected is not None and expected > MAX_BYTES:
        raise DownloadError(f"{url} has {expected:,} bytes, more than {MAX_BYTES:,}")
    digest, size, start = hashlib.sha256(), 0, time.monotonic()
    with tqdm(total=expected, unit="B", unit_scale=True, desc=name) as bar:
        while chunk := response.read1(_CHUNK_BYTES):
            size += len(chunk)
            if size > MAX_BYTES:
                raise DownloadError(f"{url} has more than {MAX_BYTES:,} bytes")
            seconds = time.monotonic() - start
            if seconds > timeout and size < _MIN_BYTES_PER_SECOND * seconds:
                raise DownloadError(f"{url} sent {size:,} bytes in {seconds:.0f} seconds, which is too slow")
            output.write(chunk)
            digest.update(chunk)
            bar.update(len(chunk))
    if expected is not None and size != expected:
        raise DownloadError(f"{url} ended after {size} of {expected} bytes. Try again")
    return digest.hexdigest()
