"""Open a text file in bounded memory: plain, gzip or xz.

A small packed file can unpack to more than the memory or the disk holds, and a file can grow while it is read. Here a
line, the ratio of unpacked to packed bytes, and the size of a file have a bound, and an error says which was reached.
"""

from __future__ import annotations

import contextlib
import io
import lzma
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from esm_efficient.errors import DataError

MAX_ROW_CHARACTERS = 1 << 22
"""The most characters of a line, of a row of a table and of a FASTA record. The longest known protein has 45,212."""

MAX_RATIO = 200
"""The most unpacked bytes per packed byte, once `FREE_BYTES` are unpacked. Random proteins have about 2."""

FREE_BYTES = 1 << 26
"""Unpacked bytes that every file may have."""

_XZ_MEMORY = 1 << 28
_CHUNK_BYTES = 1 << 16
_READ_ERRORS = (OSError, EOFError, UnicodeError, lzma.LZMAError, zlib.error, MemoryError)

_GZIP, _XZ = b"\x1f\x8b", b"\xfd7zXZ\x00"
_FOREIGN = {
    b"PK\x03\x04": "an Excel workbook or another zip file. Save the sheet as CSV (UTF-8), or unpack the file",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook, or one with a password. Save the sheet as CSV (UTF-8)",
    b"BZh": "packed with bzip2. Unpack it, or pack it with gzip or xz",
    b"(\xb5/\xfd": "packed with Zstandard. Unpack it, or pack it with gzip or xz",
    b"7z\xbc\xaf": "a 7z archive. Unpack it",
    b"\x89HDF": "an HDF5 file. Write its table as CSV or Parquet",
    b"ARROW1": "an Arrow file. Write its table as Parquet",
    b"%PDF": "a PDF. Write its table as CSV",
    b"\xff\xfe": "text in UTF-16. Save it in UTF-8",
    b"\xfe\xff": "text in UTF-16. Save it in UTF-8",
}
"""First bytes of files that are not read: what the file is and what to do."""


def first_bytes(path: str | Path) -> bytes:
    """Return the first six bytes of a file: they tell its format and compression, which its name may not.

    Raises:
        DataError: there is no such file, or its format is not read.
    """
    if not Path(path).is_file():
        remote = "://" in str(path)
        raise DataError(f"no file at {path}" + (": expected a path, so download the file first" if remote else ""))
    with open(path, "rb") as handle:
        start = handle.read(6)
    for magic, what in _FOREIGN.items():
        if start.startswith(magic):
            raise DataError(f"{path} is {what}. A CSV, TSV, XLSX, Parquet, JSON lines or FASTA file can be read")
    return start


@contextlib.contextmanager
def open_text(path: str | Path) -> Iterator[IO[str]]:
    """Open a UTF-8 text file, plain, gzip or xz, without its byte order mark and with its own line ends.

    Raises:
        DataError: the file is missing; or, while it is read, it grows, a line or the unpacked text is too long, it is
            not UTF-8 text, or its compression is damaged.
    """
    try:
        with _opened(path, "strict") as handle:
            yield handle
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, line {_wrong_line(path)} is not UTF-8. Save the file in UTF-8: in Excel, as 'CSV UTF-8'"
        ) from error
    except _READ_ERRORS as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}: {error})") from error


@contextlib.contextmanager
def _opened(path: str | Path, errors: str) -> Iterator[IO[str]]:
    start = first_bytes(path)
    with open(path, "rb", buffering=0) as file:
        source: io.RawIOBase = _FixedSize(file, path)
        if start.startswith(_GZIP):
            source = _Unpacked(source, path, _Gzip)
        elif start == _XZ:
            source = _Unpacked(source, path, _Xz)
        buffer = io.BufferedReader(source, _CHUNK_BYTES)
        with _Lines(buffer, encoding="utf-8-sig", errors=errors, newline="") as handle:
            handle.source = path
            yield handle


def _wrong_line(path: str | Path) -> int:
    """The first line that is not UTF-8."""
    with _opened(path, "surrogateescape") as lines:
        return next(number for number, line in enumerate(lines, 1) if re.search("[\udc80-\udcff]", line))


class _FixedSize(io.RawIOBase):
    """A file with the size that it had when it was opened."""

    def __init__(self, file: io.FileIO, path: str | Path) -> None:
        self.path, self.file, self.read_bytes = path, file, 0
        self.size = os.fstat(file.fileno()).st_size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self.file.readinto(buffer) or 0
        self.read_bytes += count
        if self.read_bytes > self.size:
            raise DataError(f"{self.path} grows while it is read. Wait until it is complete")
        return count


class _Gzip:
    """One member of a gzip file."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(wbits=31)

    def step(self, data: bytes, most: int) -> tuple[bytes, bytes, bool]:
        """Return at most `most` unpacked bytes, the packed bytes that are left, and whether the member ends here."""
        unpacked, member = self._member.decompress(data, most), self._member
        return unpacked, member.unused_data if member.eof else member.unconsumed_tail, member.eof


class _Xz:
    """One stream of an xz file; a header that asks for a huge dictionary is an error."""

    def __init__(self) -> None:
        self._stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)

    def step(self, data: bytes, most: int) -> tuple[bytes, bytes, bool]:
        """Return the same as `_Gzip.step`."""
        unpacked = self._stream.decompress(data, most)
        return unpacked, self._stream.unused_data if self._stream.eof else b"", self._stream.eof


class _Unpacked(io.RawIOBase):
    """The content of a packed file, unpacked as far as it is read."""

    def __init__(self, packed: io.RawIOBase, path: str | Path, stream: type[_Gzip] | type[_Xz]) -> None:
        self.packed, self.path, self.new_stream = packed, path, stream
        self.stream: _Gzip | _Xz | None = None
        self.rest, self.packed_bytes, self.unpacked_bytes = b"", 0, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._unpack(len(buffer))
        self.unpacked_bytes += len(data)
        if self.unpacked_bytes > max(FREE_BYTES, MAX_RATIO * self.packed_bytes):
            raise DataError(
                f"{self.path} unpacks to more than {MAX_RATIO} times its size, which no file of sequences does. If it "
                "is what you want, unpack it yourself"
            )
        buffer[: len(data)] = data
        return len(data)

    def _unpack(self, most: int) -> bytes:
        """The next unpacked bytes; none at the end of the file."""
        while True:
            if self.stream is None:
                # Zeros may fill up the space between two streams.
                self.rest = self.rest.lstrip(b"\0")
                if not self.rest:
                    self.rest = self._next_block()
                    if not self.rest:
                        return b""
                    continue
                self.stream = self.new_stream()
            data, self.rest, ended = self.stream.step(self.rest, most)
            if ended:
                self.stream = None
            if data:
                return data
            if not ended and not self.rest:
                self.rest = self._next_block()
                if not self.rest:
                    raise EOFError("the packed file ends too early")

    def _next_block(self) -> bytes:
        block = self.packed.read(_CHUNK_BYTES) or b""
        self.packed_bytes += len(block)
        return block


class _Lines(io.TextIOWrapper):
    """Text whose lines have a bound.

    The type hints of io's methods name another kind of iterator, which no reader of lines needs.

    Attributes:
        source: the name of the text in errors.
    """

    source: str | Path = ""

    # typeshed's methods have results of another type, because they are those of every kind of file.
    def readline(self, size: int = -1, /) -> str:  # type: ignore[override]
        return next(iter(self), "")

    def __next__(self) -> str:  # type: ignore[override]
        return next(iter(self))

    def __iter__(self) -> Iterator[str]:  # type: ignore[override]
        read = super().readline
        while line := read(MAX_ROW_CHARACTERS + 1):
            if len(line) > MAX_ROW_CHARACTERS:
                raise DataError(f"{self.source} has a line of more than {MAX_ROW_CHARACTERS:,} characters")
            yield line
