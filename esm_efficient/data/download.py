"""Download a file once, check it, and keep it in a cache folder."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

from tqdm.auto import tqdm

from esm_efficient.errors import DownloadError

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "ESM_EFFICIENT_CACHE"
_CHUNK_BYTES = 1 << 20


def cache_folder() -> Path:
    """Return the folder for downloads: ``$ESM_EFFICIENT_CACHE``, or ``esm_efficient`` in the user's cache folder."""
    if moved := os.environ.get(CACHE_VARIABLE):
        return Path(moved).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "esm_efficient"


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def fetch(url: str, destination: str | Path, *, sha256: str | None = None, timeout: float = 30.0) -> Path:
    """Download a file with a progress bar, unless it exists.

    The file is written under another name beside its destination, checked, and moved into place in one step. So an
    interrupted or wrong download never leaves a file that looks complete.

    Args:
        url: http, https or file address.
        destination: where the file goes.
        sha256: the expected SHA-256 in hexadecimal; None to accept any content.
        timeout: seconds to wait for an answer.

    Returns:
        `destination`.

    Raises:
        DownloadError: the address cannot be reached, the content is incomplete or has another SHA-256.
    """
    destination = Path(destination)
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
        raise DownloadError(
            f"cannot write into {destination.parent} ({error}). Set {CACHE_VARIABLE} to a folder that is writable."
        ) from error
    temporary = Path(name)
    digest = hashlib.sha256()
    try:
        try:
            with os.fdopen(handle, "wb") as output, urllib.request.urlopen(url, timeout=timeout) as response:
                length = response.headers.get("Content-Length")
                expected = int(length) if length else None
                with tqdm(total=expected, unit="B", unit_scale=True, desc=destination.name) as bar:
                    while chunk := response.read(_CHUNK_BYTES):
                        output.write(chunk)
                        digest.update(chunk)
                        bar.update(len(chunk))
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise DownloadError(f"cannot fetch {url} ({error}). {advice}") from error
        size = temporary.stat().st_size
        if expected is not None and size != expected:
            raise DownloadError(f"{url} ended after {size} of {expected} bytes. Try again. {advice}")
        if sha256 is not None and digest.hexdigest() != sha256:
            raise DownloadError(
                f"{url} has SHA-256 {digest.hexdigest()}, expected {sha256}: the file on the server has "
                "changed, or the download was altered. Nothing was kept."
            )
        temporary.chmod(0o644)  # mkstemp makes it private; a cache folder may be shared
        os.replace(temporary, destination)
    finally:
        temporary.unlink(missing_ok=True)
    logger.info("fetched %s to %s", url, destination)
    return destination
