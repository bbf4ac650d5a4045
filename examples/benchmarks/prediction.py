"""Measure the embedding of proteins: its speed beside other packages, and its memory over a large file.

    python examples/benchmarks/prediction.py --model 8M --json prediction.json

All packages compute the states of the last layer of one ESM-2 model with random weights in float32 on the CPU, from the
same random proteins with DeepLoc's lengths, in alternating turns:

- ``esm_efficient``: `Embedder`, which reports the mean over the residues.
- ``transformers``: the tokenizer, ``EsmModel`` with sdpa attention, and the mean over the residues, in batches of 8 as
  the proteins come.
- ``sorted``: the same, in batches of similar length of at most as many tokens as `Embedder` uses.
- ``fair-esm``: its batch converter and model, in the batches that its script ``extract`` makes.
- ``esm-cpp``: its scheduler for packed batches, which computes the head of the masked language model too.

A package that is not installed, or cannot run here, is a row that says why. ``ratio`` is the median over the turns of
the residues per second of `Embedder` divided by those of the package; a slow package gets fewer proteins per turn. The
script fails if a package's states differ from those of transformers, or if a ratio is below 1.

Then a process predicts from a FASTA file of random proteins with the demo model (`predict_file`), once per size of
file, and a thread samples its memory. ``anonymous`` is memory that the process allocated beyond that in use before. The
script fails if the whole run of the largest file needs more than 1.1 times the memory of its first half: then memory
grows with the file. Linux only.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from loading import LETTERS, grown_memory
from measured_step import PERCENTILES
from other_encoders import build_other
from safetensors.torch import save_file
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from esm_efficient import Embedder, Predictor, demo_model_path, format_table, predict_file
from esm_efficient.estimation.inputs import resolve_config
from esm_efficient.reporting.tables import format_bytes

TOKEN_BUDGET = 8192
FAIR_TOKENS = 4096
"""The tokens per batch of fair-esm's script ``extract``, if nothing is said."""
GROWTH = 1.1
"""The goal for the memory of the largest file, as a multiple of that in the first half of its run."""
TOLERANCE = 1e-2
"""How far states may differ from those of transformers, as a share of the largest."""

Rows = list[np.ndarray]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="8M", help='a size of ESM-2, or "demo" for the embedded model')
    parser.add_argument("--proteins", type=int, default=128, help="proteins per turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="threads of each package")
    parser.add_argument("--sequences", type=int, nargs="+", default=[10_000, 100_000], help="proteins per file")
    parser.add_argument("--residues", type=int, default=300, help="mean residues per protein of a file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    parser.add_argument("--predict", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def make_model(name: str) -> Any:
    """Return a masked language model with random weights, in evaluation mode."""
    config = resolve_config(name)[1] if name != "demo" else None
    torch.manual_seed(0)
    if config is None:
        return AutoModelForMaskedLM.from_pretrained(demo_model_path()).eval()
    return AutoModelForMaskedLM.from_config(config, attn_implementation="sdpa").eval()


def draw_proteins(number: int) -> list[str]:
    """Return random proteins with DeepLoc's lengths."""
    rng = np.random.default_rng(0)
    lengths = np.interp(rng.random(number), np.linspace(0, 1, len(PERCENTILES)), PERCENTILES).astype(int)
    return [LETTERS[rng.integers(0, 20, length)].tobytes().decode() for length in lengths]


def in_batches(proteins: Sequence[str], tokens: int) -> Iterator[list[int]]:
    """Yield the indices of proteins, by length, in batches of at most so many tokens with padding."""
    batch: list[int] = []
    for index in sorted(range(len(proteins)), key=lambda i: len(proteins[i])):
        if batch and (len(batch) + 1) * (len(proteins[index]) + 2) > tokens:
            yield batch
            batch = []
        batch.append(index)
    yield batch


def plain(model: Any, tokenizer: Any, *, by_length: bool) -> Callable[[list[str]], Rows]:
    """Return transformers' way to embed."""

    def embed(proteins: list[str]) -> Rows:
        found: dict[int, np.ndarray] = {}
        as_given = (list(range(start, min(start + 8, len(proteins)))) for start in range(0, len(proteins), 8))
        for batch in in_batches(proteins, TOKEN_BUDGET) if by_length else as_given:
            inputs = tokenizer([proteins[i] for i in batch], padding=True, return_tensors="pt")
            states = model.esm(**inputs).last_hidden_state
            for index, row in zip(batch, states, strict=True):
                found[index] = row[1 : len(proteins[index]) + 1].mean(0).numpy()
        return [found[index] for index in range(len(proteins))]

    return embed


def ours(model: Any, tokenizer: Any) -> Callable[[list[str]], Rows]:
    """Return `Embedder`'s way."""
    embedder = Embedder(model, tokenizer, precision="float32")
    return lambda proteins: embedder.embed(proteins, token_budget=TOKEN_BUDGET)


def fair_esm(model: Any) -> Callable[[list[str]], Rows]:
    """Return the way of fair-esm."""
    import esm

    encoder = build_other("fair-esm", model.esm).eval()
    converter = esm.data.Alphabet.from_architecture("ESM-1b").get_batch_converter()

    def embed(proteins: list[str]) -> Rows:
        found: dict[int, np.ndarray] = {}
        data = esm.data.FastaBatchedDataset([str(i) for i in range(len(proteins))], proteins)
        for batch in data.get_batch_indices(FAIR_TOKENS, extra_toks_per_seq=1):
            _, texts, tokens = converter([data[i] for i in batch])
            states = encoder(tokens, None)
            for index, text, row in zip(batch, texts, states, strict=True):
                found[index] = row[1 : len(text) + 1].mean(0).numpy()
        return [found[index] for index in range(len(proteins))]

    return embed


def esm_cpp(model: Any, folder: Path) -> tuple[Callable[[list[str]], Any], Callable[[str], np.ndarray]]:
    """Return the way of esm-cpp, and one that gives the states of a protein to compare."""
    import esm_cpp

    config = model.config
    width = config.hidden_size // config.num_attention_heads
    weights = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    for layer in range(config.num_hidden_layers):  # older files of ESM-2 have these too
        name = f"esm.encoder.layer.{layer}.attention.self.rotary_embeddings.inv_freq"
        weights[name] = 1 / 10000 ** (torch.arange(0, width, 2).float() / width)
    save_file(weights, folder / "model.safetensors")
    built, tokenizer = esm_cpp.Model.load_from_safetensors(str(folder / "model.safetensors")), esm_cpp.Tokenizer()

    def tokens_of(protein: str) -> np.ndarray:
        return np.asarray(tokenizer.encode(protein, truncate=False), dtype=np.int32)

    def states_of(protein: str) -> np.ndarray:
        return np.asarray(built.forward_with_hidden_states(tokens_of(protein))[1][-1])[1:-1].mean(0)

    return lambda proteins: built.forward_scheduled([tokens_of(protein) for protein in proteins]), states_of


def difference(found: Rows, expected: Rows) -> float:
    """Return the largest difference as a share of the largest number."""
    return max(
        float(np.abs(one - other).max() / np.abs(other).max()) for one, other in zip(found, expected, strict=True)
    )


def seconds(embed: Callable[[list[str]], Any], proteins: list[str]) -> float:
    began = time.perf_counter()
    embed(proteins)
    return time.perf_counter() - began


@torch.inference_mode()
def measure_speed(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row per package."""
    proteins, tokenizer = draw_proteins(options.proteins), AutoTokenizer.from_pretrained(demo_model_path())
    model = make_model(options.model)
    expected = plain(model, tokenizer, by_length=True)(proteins[:8])
    makers: dict[str, Callable[[], Any]] = {
        "transformers": lambda: plain(model, tokenizer, by_length=False),
        "sorted": lambda: plain(model, tokenizer, by_length=True),
        "fair-esm": lambda: fair_esm(model),
        "esm-cpp": lambda: esm_cpp(model, Path(folder)),
    }
    embed = ours(make_model(options.model), tokenizer)
    differences = {"esm_efficient": difference(embed(proteins[:8]), expected)}
    own = len(proteins[0]) / min(seconds(embed, proteins[:1]) for _ in range(3))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, make in makers.items():
            try:
                other = make()
            except (ImportError, RuntimeError) as error:  # of esm-cpp on a CPU that it does not know
                rows.append({"package": name, "reason": f"{type(error).__name__}: {str(error).splitlines()[0]}"})
                continue
            states_of = None
            if isinstance(other, tuple):
                other, states_of = other
            found = other(proteins[:8]) if states_of is None else [states_of(protein) for protein in proteins[:8]]
            differences[name] = difference(found, expected)
            speed = len(proteins[0]) / min(seconds(other, proteins[:1]) for _ in range(3))
            fewer = proteins[: max(4, min(len(proteins), math.ceil(len(proteins) * speed / own)))]
            rates: dict[str, list[float]] = {"esm_efficient": [], name: []}
            for _ in range(options.turns):
                for way, run, given in (("esm_efficient", embed, proteins), (name, other, fewer)):
                    rates[way].append(sum(map(len, given)) / seconds(run, given))
            ratio = statistics.median(a / b for a, b in zip(rates["esm_efficient"], rates[name], strict=True))
            rows.append({"package": name, "residues_per_s": rates, "ratio": ratio, "proteins": len(fewer)})
    for row in rows:
        row |= {"difference": differences.get(row["package"])}
    own_rates = [rate for row in rows for rate in row.get("residues_per_s", {}).get("esm_efficient", ())]
    first = {"package": "esm_efficient", "residues_per_s": {"esm_efficient": own_rates}, "ratio": 1.0}
    return [first | {"difference": differences["esm_efficient"]}, *rows]


def predict(file: Path) -> None:
    """Predict from a file in this process; print rows, seconds and the most memory as JSON."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(demo_model_path())
    predictor = Predictor(model, AutoTokenizer.from_pretrained(demo_model_path()))
    small = file.with_name("small.fasta")
    write_fasta(small, 300, 300)
    predict_file(predictor, small, file.with_name("small.parquet"))  # loads the modules that are imported on first use
    with grown_memory() as grown:
        result = predict_file(predictor, file, file.with_name("out.parquet"))
    print(json.dumps({"rows": result.rows, "residues": result.residues, "seconds": result.seconds} | grown))


def write_fasta(path: Path, sequences: int, residues: int) -> None:
    rng = np.random.default_rng(0)
    with path.open("wb") as handle:
        for number in range(sequences):
            length = rng.integers(residues // 2, residues * 3 // 2)
            handle.write(b">P%d\n%s\n" % (number, LETTERS[rng.integers(0, 20, length)].tobytes()))


def measure_memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row per size of file."""
    rows = []
    for sequences in sorted(options.sequences):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "proteins.fasta"
            write_fasta(file, sequences, options.residues)
            command = [sys.executable, "-W", "ignore", __file__, "--predict", str(file)]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        rows.append({"sequences": sequences} | json.loads(done.stdout.strip().splitlines()[-1]))
    return rows


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    options = parse_arguments()
    transformers.logging.set_verbosity_error()
    if options.predict:
        predict(options.predict)
        return
    torch.set_num_threads(options.threads)
    os.environ["ESM_NUM_THREADS"] = str(options.threads)  # of esm-cpp
    speeds = measure_speed(options)
    table = [
        (row["package"], "-", "-", row["reason"])
        if "reason" in row
        else (
            row["package"],
            f"{statistics.median(row['residues_per_s'][row['package']]):,.0f}",
            f"{row['ratio']:.2f}",
            f"{row['difference']:.1e}",
        )
        for row in speeds
    ]
    print(format_table(table, ("package", "residues/s", "ratio", "difference")), flush=True)
    files = measure_memory(options)
    cells = [
        (
            f"{f['sequences']:,}",
            f"{f['seconds']:.1f}",
            f"{f['residues'] / f['seconds']:,.0f}",
            format_bytes(f["first_half"]),
            format_bytes(f["anonymous"]),
        )
        for f in files
    ]
    print("\n" + format_table(cells, ("sequences", "seconds", "residues/s", "first half", "anonymous")))
    if options.json:
        packages = ("torch", "transformers", "fair-esm", "esm-cpp")
        record = {"speed": speeds, "memory": files, "model": options.model, "threads": options.threads}
        record |= {"versions": {name: version_of(name) for name in packages}, "machine": platform.platform()}
        options.json.write_text(json.dumps(record, indent=2) + "\n")
    missed = [
        f"{row['package']}: states differ by {row['difference']:.1e}"
        for row in speeds
        if (row.get("difference") or 0) > TOLERANCE
    ]
    missed += [f"{row['package']} is faster: ratio {row['ratio']:.2f}" for row in speeds if row.get("ratio", 1) < 1]
    if (growth := files[-1]["anonymous"] / max(1, files[-1]["first_half"])) > GROWTH:
        missed.append(f"memory grew by a factor of {growth:.2f} after half of the largest file, goal {GROWTH}")
    if missed:
        raise SystemExit("missed: " + "; ".join(missed))


if __name__ == "__main__":
    main()
