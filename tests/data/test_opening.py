"""Files open in bounded memory: packed as bombs, growing, with endless lines, or of a format that is not read."""

from __future__ import annotations

import gzip
import lzma
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from conftest import each_value
from pyarrow import parquet
from sequence_files import frame

from esm_efficient import load_sequences
from esm_efficient.data import opening, readers
from esm_efficient.data.opening import open_text
from esm_efficient.data.readers import read_blocks
from esm_efficient.data.splits import read_clusters
from esm_efficient.errors import DataError

PACKERS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}
MEGABYTE, QUARTER = 1 << 20, 1 << 18


def bomb(pack, content: bytes, times: int) -> bytes:
    """Many repeats of a content, packed a part at a time."""
    if pack == ".gz":
        return gzip.compress(content) * times
    compressor = lzma.LZMACompressor()
    return b"".join([*(compressor.compress(content) for _ in range(times)), compressor.flush()])


def peak_of(action) -> int:
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


BOMBS = {
    "line": (b">P1\n", b"A" * QUARTER),
    "record": (b">P1\n", (b"A" * 63 + b"\n") * (QUARTER // 64)),
    "records": (b"", b">P\nMKTVAYIAKQ\n" * (QUARTER // 14)),
    "rows": (b"id,sequence\n", b"P,MKTVAYIAKQ\n" * (QUARTER // 13)),
    "row over lines": (b"id,sequence\n", b'"a\n",' * (QUARTER // 6)),
    "empty lines": (b"\n", b"\n" * QUARTER),
}
"""The beginning of a file, and what it has without end."""


@pytest.mark.parametrize(("endless", "pack"), each_value(BOMBS, [".gz", ".xz"]))
def test_a_bomb_is_refused_in_bounded_memory(tmp_path, monkeypatch, pack, endless):
    start, content = BOMBS[endless]
    monkeypatch.setattr(opening, "FREE_BYTES", QUARTER)
    monkeypatch.setattr(opening, "MAX_RATIO", 4)
    path = tmp_path / f"bomb{pack}"
    path.write_bytes(PACKERS[pack](start) + bomb(pack, content, 8))

    def read():
        with pytest.raises(DataError, match="more than 4 times its size"):
            for _ in read_blocks(path):
                pass

    assert peak_of(read) < 30 * MEGABYTE


@pytest.mark.parametrize(
    ("cells", "options", "message"),
    [
        (["A" * 3_000_000], {"compression": "zstd"}, "unpacks to more than 200 times"),
        (["A" * 3_000_000], {"compression": "gzip"}, "unpacks to more than 200 times"),
        (["A" * 5_000_000], {"compression": "snappy"}, "row 0: more than 4,194,304 characters"),
        ([[0] * 5_000_000], {"compression": "snappy"}, "5,000,000 values per row"),
    ],
)
def test_a_parquet_file_is_read_in_bounded_memory(tmp_path, monkeypatch, cells, options, message):
    monkeypatch.setattr(readers, "FREE_BYTES", MEGABYTE)
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"sequence": cells}), path, **options)

    with pytest.raises(DataError, match=message):
        list(read_blocks(path))


@pytest.mark.parametrize(
    "column",
    [
        pa.DictionaryArray.from_arrays(pa.array(np.zeros(1000, np.int32)), ["A" * 900_000]),
        pa.ListArray.from_arrays(
            np.arange(0, 10_000_001, 100_000, dtype=np.int32), pa.array(np.zeros(10_000_000, np.int8))
        ),
    ],
)
def test_cells_that_repeat_in_parquet_are_read_in_bounded_memory(tmp_path, column):
    """Written out, each column has hundreds of megabytes; the file has some kilobytes."""
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"sequence": column}), path)
    sizes = [len(block.places) for block in read_blocks(path)]
    assert sum(sizes) == len(column)
    assert max(sizes) < 100


def test_several_streams_in_a_file_are_all_read(tmp_path):
    for pack in (".gz", ".xz"):
        path = tmp_path / f"a.csv{pack}"
        packer = PACKERS[pack]
        path.write_bytes(packer(b"a,b\n") + packer(b"") + packer(b"1,2\n") + b"\0" * 8)
        with open_text(path) as handle:
            assert list(handle) == ["a,b\n", "1,2\n"]


def test_an_xz_file_that_asks_for_much_memory_is_refused(tmp_path):
    path = tmp_path / "a.xz"
    filters = [
        {"id": lzma.FILTER_LZMA2, "dict_size": 512 << 20, "preset": 0, "mode": lzma.MODE_FAST, "mf": lzma.MF_HC3}
    ]
    path.write_bytes(lzma.compress(b"a,b\n1,2\n", filters=filters))
    with pytest.raises(DataError, match=r"LZMAError: .*[Mm]emory"):
        list(read_blocks(path))


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,sequence\n" + "P,MKTV\n" * 100_000)
    blocks = read_blocks(path, rows=100)
    next(blocks)
    with open(path, "a") as handle:
        handle.write("Q,MKTV\n" * 100_000)
    with pytest.raises(DataError, match="grows while it is read"):
        list(blocks)


def test_a_file_that_changes_while_it_is_read_is_not_cached(tmp_path, table_cache, monkeypatch):
    path = tmp_path / "a.csv"
    frame()[["id", "sequence", "label"]].to_csv(path, index=False)
    original = opening._FixedSize.readinto

    def readinto(self, buffer):
        count = original(self, buffer)
        if not count:
            frame(seed=1)[["id", "sequence", "label"]].to_csv(path, index=False)
        return count

    monkeypatch.setattr(opening._FixedSize, "readinto", readinto)
    with pytest.raises(DataError, match="changed while it was read"):
        load_sequences(path)
    assert not list(table_cache.glob("tables/*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04\x14\x00", "Excel workbook or another zip file. Save the sheet as CSV"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1", "old Excel workbook"),
        (b"BZh91AY&SY", "bzip2. Unpack it"),
        (b"(\xb5/\xfd\x04", "Zstandard"),
        ("id,sequence\n".encode("utf-16"), "UTF-16. Save it in UTF-8"),
        (b'[{"sequence": "MK"}]', "one JSON list. Write one object per line"),
        (b"[\n", "one JSON list"),
        (b"id,seq\0uence\n", "null character"),
    ],
)
def test_a_foreign_format_is_refused_with_what_to_do(tmp_path, content, message):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_blocks(path))


def test_an_address_instead_of_a_path_is_refused(table_cache):
    for address in ("https://example.org/a.csv", "file:///tmp/a.csv"):
        with pytest.raises(DataError, match="expected a path, so download the file first"):
            load_sequences(address)


def test_clusters_are_read_in_bounded_memory(tmp_path):
    path = tmp_path / "clusters.tsv"
    path.write_text("A" * 5_000_000)
    with pytest.raises(DataError, match="a line of more than 4,194,304 characters"):
        read_clusters(path)


@pytest.mark.parametrize("content", [">P1\n" + ("A" * 63 + "\n") * 70_000, "id,sequence\n" + '"a\n",' * 1_000_000])
def test_an_endless_record_is_refused(tmp_path, content):
    path = tmp_path / "a"
    path.write_text(content)
    with pytest.raises(DataError, match=r"(record 1|line \d+): .*more than 4,194,304 characters"):
        list(read_blocks(path))


@pytest.mark.parametrize("pack", PACKERS.values())
def test_text_that_is_not_utf_8_names_the_line_and_the_cure(tmp_path, pack):
    path = tmp_path / "t.csv"
    path.write_bytes(pack(b"id,note\n" + b"P1,x\n" * 20_000 + "P2,caf\u00e9\n".encode("latin-1")))
    with (
        pytest.raises(DataError, match=r"t.csv, line 20002 is not UTF-8.*in Excel, as 'CSV UTF-8'"),
        open_text(path) as text,
    ):
        list(text)
