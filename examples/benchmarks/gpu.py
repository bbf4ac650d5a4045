"""Measure on one GPU whatever only a GPU can tell, in nine minutes at most, and write it to one file.

    python examples/benchmarks/gpu.py --json gpu.json          # from a checkout, with pytest installed
    python examples/benchmarks/gpu.py --json tiny.json --tiny  # the same code on a tiny model, also on a CPU

The parts run in the order of their importance (`PARTS`): the machine, the steps of every recipe with ESM-2
650M, the tests marked ``cuda``, launched kernels, fusion, estimates against these measurements, ESM-2 8M, fp16,
gradients, recomputation, attention backends, and the cost of the profiler. All weights are random. In every comparison,
both sides alternate in one process with the same weights and batches, and a figure is the median of ``--steps`` steps.

The parts run in a process of their own, which is watched. A row that fails is written with its error, and the part goes
on. A part that takes longer than its limit, or that ends the process, is written with the reason, and a new process
continues with the next part. A part that gets no time is written as well. The file is written after every row, so that
it is useful even if the script is killed. The exit status is 1 if a part did not end or a row failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from esm_efficient import format_table

LIMIT = 540.0
"""Seconds that all parts may take together."""
PARTS = {
    "machine": 45,
    "recipes_650m": 150,
    "cuda_tests": 120,
    "launches": 45,
    "fusion": 90,
    "estimates": 90,
    "recipes_8m": 60,
    "gradients": 20,
    "fp16": 45,
    "recompute": 40,
    "attention": 60,
    "profiler": 60,
}
"""The seconds that each part may take, the most important first. The functions in gpu_parts.py have these names."""
STARTUP = 60
"""The seconds that a process may take before its first part, and between two parts."""
STARTED, ENDED = "started", "done"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="the file with all figures")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few steps; also without a GPU")
    parser.add_argument("--steps", type=int, help="measured steps per side; by default 7, or 1 with --tiny")
    parser.add_argument("--seconds", type=float, default=LIMIT, help="seconds for all parts together")
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)  # given by the script to its own process
    return parser.parse_args()


def work(options: argparse.Namespace) -> None:
    """Run the parts in this process, and write a line for each row."""
    from gpu_parts import run_part  # with torch, which the watching process does not need
    from gpu_rows import Rows, Settings

    rows = Rows(options.lines)
    settings = Settings(tiny=options.tiny, steps=options.steps or (1 if options.tiny else 7))
    for name in options.parts:
        rows.begin(name)
        run_part(name, rows, settings)
        rows.end()


class Record:
    """Everything that is known so far, and the file that it is written to."""

    def __init__(self, file: Path, parts: list[str]) -> None:
        self.file = file
        self.parts: dict[str, dict] = {name: {"status": "not run", "seconds": 0.0, "rows": []} for name in parts}
        self.running: str | None = None
        self.began = time.monotonic()

    def add(self, line: dict) -> None:
        """Add a line of the process that runs the parts."""
        part = self.parts[line["part"]]
        if "row" in line:
            part["rows"].append(line["row"])
        elif line["status"] == STARTED:
            self.running, self.began = line["part"], time.monotonic()
            part["status"] = STARTED
        else:
            self.finish(line["status"])
        self.write()

    def finish(self, status: str) -> None:
        """End the part that runs, if one does."""
        if self.running is not None:
            self.parts[self.running] |= {"status": status, "seconds": round(time.monotonic() - self.began, 1)}
            self.running, self.began = None, time.monotonic()
            self.write()

    def write(self) -> None:
        self.file.write_text(json.dumps({"parts": self.parts}, indent=1) + "\n")

    @property
    def failures(self) -> list[str]:
        """What did not end or failed, by name."""
        found = [f"{name}: {part['status']}" for name, part in self.parts.items() if part["status"] != ENDED]
        for name, part in self.parts.items():
            found += [f"{name}, {name_of(row)}: {row['error']}" for row in part["rows"] if "error" in row]
        return found


def name_of(row: dict) -> str:
    """Name a row by its texts."""
    return " ".join(value for key, value in row.items() if isinstance(value, str) and key not in ("error", "at"))


def watch(record: Record, options: argparse.Namespace, deadline: float) -> None:
    """Run all parts, in as many processes as are needed."""
    with tempfile.TemporaryDirectory() as folder:
        lines, output = Path(folder) / "lines", Path(folder) / "output"
        lines.touch()
        read = 0
        while (left := not_run(record)) and time.monotonic() < deadline:
            command = [sys.executable, __file__, "--json", str(options.json), "--lines", str(lines), "--parts", *left]
            command += ["--tiny"] * options.tiny + (["--steps", str(options.steps)] if options.steps else [])
            with output.open("w") as stream:
                process = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True)
            record.running, record.began = None, time.monotonic()
            try:
                read, reason = follow(process, lines, read, record, deadline)
            finally:
                stop(process)
            os.truncate(lines, read)  # a process that was killed may have left half a line
            if not reason:
                tail = output.read_text(errors="replace").strip().splitlines()[-1:]
                reason = " ".join([f"its process ended with status {process.returncode}", *tail])
            if not_run(record) == left:  # the process began no part
                record.running = left[0]
            record.finish(f"stopped: {reason}")
    for name in not_run(record):
        record.parts[name]["status"] = "not run: no time was left"
    record.write()


def follow(process: subprocess.Popen, lines: Path, read: int, record: Record, deadline: float) -> tuple[int, str]:
    """Record the lines of a process until it ends, or until a part has taken too long.

    Returns:
        The bytes of `lines` that are recorded, and why the process has to be stopped; empty if it ended.
    """
    while True:
        ended = process.poll() is not None
        whole = lines.read_bytes()[read:].rpartition(b"\n")[0]
        for line in whole.splitlines():
            record.add(json.loads(line))
        read += len(whole) + bool(whole)
        if ended:
            return read, ""
        limit = PARTS[record.running] if record.running else STARTUP
        if time.monotonic() > deadline:
            return read, "no time was left"
        if time.monotonic() - record.began > limit:
            return read, f"it took longer than {limit} s"
        time.sleep(0.05)  # the file of rows is read again; nothing tells when a row was written


def not_run(record: Record) -> list[str]:
    return [name for name, part in record.parts.items() if part["status"] == "not run"]


def stop(process: subprocess.Popen) -> None:
    """End a process and those that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def summary(record: Record) -> str:
    """Show each part's rows as a table."""
    blocks = []
    for name, part in record.parts.items():
        blocks.append(f"{name}: {part['status']}, {part['seconds']:.1f} s")
        columns = list(dict.fromkeys(key for row in part["rows"] for key in row if key not in ("error", "at")))
        columns = [key for key in columns if not any(isinstance(row.get(key), dict | list) for row in part["rows"])]
        cells = [[show(row.get(key)) for key in columns] for row in part["rows"]]
        if cells and columns:
            blocks.append(format_table(cells, columns))
    return "\n".join(blocks)


def show(value: object) -> str:
    if value is None:
        return ""
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def main() -> None:
    options = parse_arguments()
    if options.lines is not None:
        work(options)
        return
    record = Record(options.json, options.parts)
    record.write()
    watch(record, options, time.monotonic() + options.seconds)
    print(summary(record))
    if record.failures:
        raise SystemExit("\n".join(["", f"{len(record.failures)} did not succeed:", *record.failures]))


if __name__ == "__main__":
    main()
