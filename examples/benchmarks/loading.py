"""Measure the memory of loading and encoding tables of several sizes, which should not grow with their size.

    python examples/benchmarks/loading.py --sequences 100000 1000000 --json loading.json

Each size runs in its own process. The process loads, splits and encodes a random CSV table and reads it once, while a
thread samples its memory. ``anonymous`` is memory that the process allocated. ``resident`` adds pages of memory-mapped
files, which the system can reclaim. Both figures exclude the memory in use after the imports. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from esm_efficient import format_table
from esm_efficient.reporting.tables import format_bytes

LETTERS = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", dtype=np.uint8)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--residues", type=int, default=300, help="mean residues per sequence")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_table(path: Path, sequences: int, residues: int) -> None:
    rng = np.random.default_rng(0)
    with open(path, "wb") as handle:
        handle.write(b"accession,sequence,label\n")
        for number in range(sequences):
            sequence = LETTERS[rng.integers(0, 20, rng.integers(residues // 2, residues * 3 // 2))].tobytes()
            handle.write(b"P%d,%s,%d\n" % (number, sequence, number % 3 == 0))


def memory() -> dict[str, int]:
    """Return the bytes that this process uses now, by kind."""
    status = Path("/proc/self/status").read_text()
    fields = {"resident": "VmRSS", "anonymous": "RssAnon"}
    return {name: 1024 * int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) for name, field in fields.items()}


@contextmanager
def grown_memory() -> Iterator[dict[str, int]]:
    """Give a dict that has, at the end, the most bytes beyond those at the start, by kind; a thread samples them.

    ``first_half`` is the most of the kind ``anonymous`` in the first half of the time.
    """
    before, samples, done = memory(), [memory()], threading.Event()
    grown: dict[str, int] = {}

    def sample() -> None:
        while not done.wait(0.02):
            samples.append(memory())

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield grown
    finally:
        done.set()
        sampler.join()
        half = samples[: len(samples) // 2 + 1]
        grown |= {name: max(sampled[name] for sampled in samples) - before[name] for name in before}
        grown["first_half"] = max(sampled["anonymous"] for sampled in half) - before["anonymous"]


def run(path: Path) -> None:
    """Load and encode a table and read it once; print seconds and peak bytes as JSON."""
    import datasets
    from transformers import AutoTokenizer

    from esm_efficient import demo_model_path, load_sequences, tokenize_dataset

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    small = path.with_name("small.csv")
    write_table(small, 1000, 100)
    tokenize_dataset(load_sequences(small), tokenizer)  # loads the modules that are imported on first use
    with grown_memory() as grown:
        began = time.perf_counter()
        data = load_sequences(path)
        loaded = time.perf_counter()
        tokenized, report = tokenize_dataset(data, tokenizer)
        encoded = time.perf_counter()
        rows = 0
        for split in tokenized.values():
            for batch in split.with_format("arrow").iter(1000):
                rows += len(batch)
    figures = {"rows": rows, "residues": report.total.residues, "load_s": loaded - began, "encode_s": encoded - loaded}
    print(json.dumps(figures | grown))


def main() -> None:
    options = parse_arguments()
    if options.run:
        run(options.run)
        return
    record = []
    for sequences in options.sequences:
        with tempfile.TemporaryDirectory() as folder:
            table = Path(folder) / "table.csv"
            write_table(table, sequences, options.residues)
            environment = os.environ | {"ESM_EFFICIENT_CACHE": folder, "HF_DATASETS_CACHE": folder}
            command = [sys.executable, "-W", "ignore", __file__, "--run", str(table)]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
        figures = json.loads(done.stdout.strip().splitlines()[-1])
        if figures["rows"] != sequences:
            raise SystemExit(f"{figures['rows']} of {sequences} rows were read back")
        record.append({"sequences": sequences} | figures)
    rows = [
        (
            f"{f['sequences']:,}",
            f"{f['load_s']:.1f}",
            f"{f['encode_s']:.1f}",
            format_bytes(f["anonymous"]),
            format_bytes(f["resident"]),
        )
        for f in record
    ]
    print(format_table(rows, ("sequences", "load s", "encode s", "anonymous", "resident")))
    if options.json:
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
