"""Compare the residue encoder with EsmTokenizer: residues per second on the same proteins, in alternating turns.

    python examples/benchmarks/encoding.py --data deeploc --json encoding.json

Both encode whole proteins with special tokens. EsmTokenizer is slow, so it encodes a random sample of the table in each
turn; the encoder encodes the whole table. ``ratio`` is the median ratio of the two rates over the turns.
``dataset_ratio`` is the same for `tokenize_dataset`, which also makes masks, token counts and a report. The script
fails if the token ids of the sample differ.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import platform
import statistics
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import transformers
from transformers import AutoTokenizer

from esm_efficient import (
    ResidueEncoder,
    demo_model_path,
    format_table,
    load_deeploc,
    tokenize_dataset,
    write_demo_table,
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help='a table in the DeepLoc-2.0 format, or "deeploc" (default: the demo table)')
    parser.add_argument("--sample", type=int, default=300, help="proteins that EsmTokenizer encodes per turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        source = options.data or write_demo_table(Path(folder) / "demo.csv")
        data = load_deeploc(None if source == "deeploc" else source, min_residues=None, max_residues=None)
    sequences = list(itertools.chain.from_iterable(split["sequence"][:] for split in data.values()))
    residues = sum(map(len, sequences))
    longest = max(map(len, sequences))
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    encoder = ResidueEncoder(tokenizer)
    rng = np.random.default_rng(0)

    rates: dict[str, list[float]] = {"EsmTokenizer": [], "ResidueEncoder": [], "tokenize_dataset": []}
    encoder(sequences)  # the first call also loads code and memory pages
    for _ in range(options.turns):
        sample = [sequences[i] for i in rng.choice(len(sequences), min(options.sample, len(sequences)), replace=False)]
        began = time.perf_counter()
        expected = tokenizer(sample)["input_ids"]
        rates["EsmTokenizer"].append(sum(map(len, sample)) / (time.perf_counter() - began))
        began = time.perf_counter()
        encoder(sequences)
        rates["ResidueEncoder"].append(residues / (time.perf_counter() - began))
        datasets.disable_caching()
        began = time.perf_counter()
        tokenize_dataset(data, tokenizer, max_tokens=longest + 2)
        rates["tokenize_dataset"].append(residues / (time.perf_counter() - began))
        ids, offsets, _ = encoder(sample)
        if [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)] != expected:
            raise SystemExit("ResidueEncoder and EsmTokenizer gave different token ids for the same sequences")

    def ratio(name: str) -> float:
        return statistics.median(ours / theirs for ours, theirs in zip(rates[name], rates["EsmTokenizer"], strict=True))

    rows = [(name, f"{statistics.median(values):,.0f}", f"{ratio(name):,.0f}") for name, values in rates.items()]
    print(f"{len(sequences):,} proteins, {residues:,} residues, transformers {transformers.__version__}")
    print(format_table(rows, ("", "residues/s", "times EsmTokenizer")))
    if options.json:
        record = {
            "ratio": ratio("ResidueEncoder"),
            "dataset_ratio": ratio("tokenize_dataset"),
            "proteins": len(sequences),
            "residues": residues,
            "residues_per_s": rates,
            "versions": {
                "transformers": transformers.__version__,
                "numpy": np.__version__,
                "cpu": platform.processor(),
            },
        }
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
