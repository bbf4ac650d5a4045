"""Count what survives: killed runs, damaged inputs, a full disk, and the memory of long runs.

    python examples/benchmarks/reliability.py --json reliability.json

Runs are killed with SIGKILL in training, in a save and in an evaluation, on one and on two ranks. They resume from
their last checkpoint, and their weights are compared bit for bit with those of a run that was not killed. Tables and
request bodies are damaged at random: each must be read, or refused by an error of the library; anything else is lost.
The full disk is a small tmpfs where mounting is possible, else a limit of the size of files. The memory of long runs is
compared between their second quarter and their end. They keep no compiled kernels: on a CPU, oneDNN keeps those of the
last 1,024 shapes, and so the memory of a usual run grows by some tens of MB until that many were seen.

The script fails if a run differs, an input is lost, the last whole checkpoint does not stay, or memory grows.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reliability_runs import PROTEIN, fill_disk, predict_long, quiet, train_long, train_on_rank

MOMENTS = ("training", "save", "evaluation")
DISK_BYTES = 3_000_000
"""Room for three checkpoints of the demo's adapter, of about 0.9 MB each."""
GROWTH_BYTES = 15_000_000
"""The most that the memory of a long run may grow, of about 600 MB."""

ODD_CELLS = ("", "nan", "1e999", "-1", "\x00", "=cmd|'/C calc'!A0", "é" * 9, "a,b", '"', "MKX" * 4000, "[0, 1]", "true")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="runs to kill")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks of the killed runs")
    parser.add_argument("--tables", type=int, default=10_000, help="tables to damage")
    parser.add_argument("--bodies", type=int, default=2_000, help="request bodies to damage")
    parser.add_argument("--disks", type=int, default=1, help="disks to fill")
    parser.add_argument("--steps", type=int, default=2_000, help="optimizer steps of a long run; 0 for none")
    parser.add_argument("--predictions", type=int, default=20_000, help="sequences to predict from; 0 for none")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of the damages")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts to this file")
    return parser.parse_args()


def run(context: Any, target: Callable[..., None], argument_lists: list[tuple]) -> list[int]:
    """Run a function in one process per list of arguments; when one fails, the others are killed."""
    processes = [context.Process(target=target, args=arguments) for arguments in argument_lists]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        for process in processes:
            process.join(0.1)
        if any(process.exitcode not in (None, 0) for process in processes):
            for process in processes:
                process.kill()
    return [process.exitcode for process in processes]


def count_kills(context: Any, folder: Path, options: argparse.Namespace) -> dict[str, int]:
    """Kill runs, resume them, and compare their weights with those of a whole run."""
    rng = random.Random(options.seed)
    counts = dict.fromkeys(("tried", "killed", "resumed", "identical"), 0)
    whole = {}
    for number in range(options.kills):
        ranks, moment = options.ranks[number // len(MOMENTS) % len(options.ranks)], MOMENTS[number % len(MOMENTS)]

        def start(name: str, kill: tuple | None = None, ranks: int = ranks) -> tuple[list[int], Path]:
            port, output = free_port(), folder / name
            arguments = [(rank, ranks, port, str(output), kill) for rank in range(ranks)]
            return run(context, train_on_rank, arguments), output / "adapter" / "adapter_model.safetensors"

        if ranks not in whole:
            codes, weights = start(f"whole-{ranks}")
            if any(codes):
                raise SystemExit(f"a run that was not killed failed on {ranks} rank(s): {codes}")
            whole[ranks] = weights.read_bytes()
        counts["tried"] += 1
        codes, weights = start(f"run-{number}", (moment, rng.randrange(1, 7), rng.uniform(0, 0.05)))
        counts["killed"] += -signal.SIGKILL in codes and not weights.exists()
        codes, weights = start(f"run-{number}")
        counts["resumed"] += not any(codes)
        counts["identical"] += not any(codes) and weights.read_bytes() == whole[ranks]
    return counts


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def damaged_table(rng: random.Random) -> tuple[str, bytes]:
    """Return the name and the content of a small table, damaged in up to three places."""
    name = rng.choice(("t.csv", "t.tsv", "t.jsonl", "t.fasta"))
    rows = [[f"P{i}", PROTEIN[: rng.randrange(5, 60)], rng.choice("ab")] for i in range(rng.choice((0, 3, 40, 60)))]
    header = ["id", "sequence", "label"]
    for _ in range(rng.randrange(3)):
        row = rng.choice([header, *rows])
        row[rng.randrange(len(row))] = rng.choice(ODD_CELLS)
    if rows and rng.random() < 0.1:
        rng.choice(rows).pop()
    if name.endswith("jsonl"):
        text = "".join(json.dumps(dict(zip(header, row, strict=False))) + "\n" for row in rows)
    elif name.endswith("fasta"):
        text = "".join(f">{row[0]} label={row[-1]}\n{row[1]}\n" for row in rows)
    else:
        text = "\n".join(("\t" if name.endswith("tsv") else ",").join(row) for row in [header, *rows])
    return name, damaged(text.encode("utf-8", "surrogatepass"), rng)


def damaged_body(rng: random.Random) -> tuple[str, bytes]:
    """Return the content type and the content of a request, damaged at random."""
    items: list[Any] = [rng.choice((PROTEIN, {"sequence": PROTEIN, "name": "P1"}, *ODD_CELLS, None, 7, {}, [[]]))]
    items *= rng.randrange(4)
    kind = rng.choice(("application/json", "text/csv", "text/x-fasta", "application/x-npy", "text/csv; charset=utf-8"))
    text = json.dumps(rng.choice(({"inputs": items}, {"inputs": PROTEIN}, items, {})))
    if "json" not in kind:
        text = "sequence\n" + "\n".join(map(str, items)) if "csv" in kind else f">P1\n{PROTEIN}\n" * len(items)
    return kind, damaged(text.encode(), rng)


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Return some bytes cut off, inserted, repeated or replaced; half of the time none."""
    if rng.random() < 0.5 or not content:
        return content
    place, length = rng.randrange(len(content)), rng.randrange(1, 40)
    inserted = rng.choice((rng.randbytes(length), b"\xff\xfe", b'"', b"\r\n", b"\x00", content[place : place + length]))
    return rng.choice(
        (
            content[:place],
            content[:place] + inserted + content[place:],
            content[:place] + inserted + content[place + length :],
        )
    )


def count_inputs(
    make: Callable[[random.Random], tuple[str, bytes]], read: Callable[[str, bytes], None], number: int, seed: int
) -> dict[str, Any]:
    """Read damaged inputs, and count those that are read, refused by our own errors, or lost."""
    from esm_efficient import EsmEfficientError

    counts: dict[str, Any] = {"tried": number, "read": 0, "refused": 0, "lost": 0, "examples": []}
    for index in range(number):
        kind, content = make(random.Random(f"{seed}-{index}"))
        try:
            read(kind, content)
            counts["read"] += 1
        except EsmEfficientError:
            counts["refused"] += 1
        except Exception as error:  # what is counted: a damaged input that ends in an error of another library
            counts["lost"] += 1
            counts["examples"] = [*counts["examples"], f"{kind} {index}: {type(error).__name__}: {error}"[:300]][:5]
    return counts


def count_damaged(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    from esm_efficient import load_sequences, read_request

    def read_table(name: str, content: bytes) -> None:
        (folder / name).write_bytes(content)
        header = {"header": r"label=(?P<label>\S+)"} if name.endswith("fasta") else {}
        load_sequences(folder / name, label="label", **header)

    quiet()
    return {
        "tables": count_inputs(damaged_table, read_table, options.tables, options.seed),
        "bodies": count_inputs(
            damaged_body, lambda kind, body: read_request(body, kind) and None, options.bodies, options.seed
        ),
    }


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mount a small tmpfs on a folder, if that is possible."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def count_full_disks(context: Any, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Fill disks, and count those after which the last whole checkpoint stays and the error names it."""
    from esm_efficient import last_checkpoint

    counts: dict[str, Any] = {"tried": options.disks, "named": 0, "kept": 0, "how": ""}
    for number in range(options.disks):
        disk = folder / f"disk-{number}"
        with small_disk(disk) as mounted:
            counts["how"] = "tmpfs" if mounted else "limit of the size of a file"
            (disk / "demo.csv").write_bytes((folder / "demo.csv").read_bytes())
            answers = context.SimpleQueue()
            run(context, fill_disk, [(str(disk / "run"), None if mounted else 50_000, answers)])
            name, message = answers.get() if not answers.empty() else ("killed", "")
            good = last_checkpoint(disk / "run")
            counts["kept"] += good is not None
            counts["named"] += name == "CheckpointError" and str(good) in message
            counts["message"] = f"{name}: {message}".replace(str(disk), "DISK")
    return counts


def measure_memory(context: Any, target: Callable[..., None], folder: Path, number: int) -> dict[str, int]:
    """Run something long, and return its memory after each quarter."""
    answers = context.SimpleQueue()
    [code] = run(context, target, [(str(folder / target.__name__), number, answers)])
    quarters = []
    while not answers.empty():
        quarters.append(answers.get())
    if code or len(quarters) != 4:
        raise SystemExit(f"{target.__name__} ended with code {code} after {len(quarters)} of 4 quarters")
    return {"number": number, "bytes": quarters, "growth_bytes": quarters[3] - quarters[1]}


def describe(record: dict[str, Any]) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the rows of a table, and what is wrong."""
    rows, wrong = [], []
    kills, disk = record["kills"], record["full_disk"]
    rows.append(("runs", f"{kills['killed']} killed, {kills['resumed']} resumed, {kills['identical']} identical"))
    if kills["identical"] < kills["tried"]:
        wrong.append(f"{kills['tried'] - kills['identical']} run(s) did not end with the same weights")
    for name in ("tables", "bodies"):
        counts = record[name]
        rows.append((name, f"{counts['tried']:,} tried, {counts['refused']:,} refused, {counts['lost']:,} lost"))
        wrong += [f"lost: {example}" for example in counts["examples"]]
    rows.append((f"full disk ({disk['how']})", f"{disk['tried']} tried, {disk['kept']} kept, {disk['named']} named"))
    if min(disk["kept"], disk["named"]) < disk["tried"]:
        wrong.append(f"a full disk was not named, or took the last checkpoint with it: {disk.get('message')}")
    for name, counts in record["memory"].items():
        growth = counts["growth_bytes"]
        rows.append((f"memory of {counts['number']:,} {name}", f"{growth / 1e6:+.1f} MB after the second quarter"))
        if growth > GROWTH_BYTES:
            wrong.append(f"the memory of {name} grows: {counts['bytes']}")
    return rows, wrong


def main() -> None:
    options = parse_arguments()
    from esm_efficient import format_table, write_demo_table

    # A server that has loaded torch once starts each run quickly.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["esm_efficient.training.finetune", "reliability_runs"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_demo_table(folder / "demo.csv", proteins=300)
        record = {
            "kills": count_kills(context, folder, options),
            **count_damaged(folder, options),
            "full_disk": count_full_disks(context, folder, options),
            "memory": {
                name: measure_memory(context, target, folder, number)
                for name, target, number in (
                    ("optimizer steps", train_long, options.steps),
                    ("predictions", predict_long, options.predictions),
                )
                if number
            },
        }
    rows, wrong = describe(record)
    print(format_table(rows, ("what", "count")))
    if options.json:
        options.json.write_text(json.dumps(record | {"wrong": wrong}, indent=2) + "\n")
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
