"""Compare padding in random batches and in batches of a token budget, over several epochs.

    python examples/benchmarks/batching.py --data deeploc --json batching.json

The second table column is the share of tokens that are not padding, in the worst epoch. The fourth column is the share
of batches that contain the same sequences as a batch of the epoch before.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path

import numpy as np

from esm_efficient import TokenBudgetBatchSampler, format_table, load_deeploc, write_demo_table


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help='a table in the DeepLoc-2.0 format, or "deeploc" (default: the demo table)')
    parser.add_argument("--budgets", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="tokens per batch")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per random batch")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    return parser.parse_args()


def fill(batches: list, tokens: np.ndarray) -> float:
    """Return the share of tokens that are not padding."""
    return float(tokens.sum() / sum(len(batch) * tokens[batch].max() for batch in batches))


def main() -> None:
    options = parse_arguments()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        source = options.data or write_demo_table(Path(folder) / "demo.csv")
        data = load_deeploc(None if source == "deeploc" else source)
    tokens = np.array([residues + 2 for split in data.values() for residues in split["residues"]])
    rng = np.random.default_rng(0)
    size = options.batch_size
    random = [
        fill(np.array_split(rng.permutation(len(tokens)), range(size, len(tokens), size)), tokens)
        for _ in range(options.epochs)
    ]
    rows = [(f"random {size}", f"{min(random):.3f}", f"{-(-len(tokens) // size):,}", "", "")]
    record = {"sequences": len(tokens), "random": random, "budgets": {}}
    for budget in options.budgets:
        sampler = TokenBudgetBatchSampler(tokens, budget)
        fills, repeats, before, seconds = [], [], set(), 0.0
        for epoch in range(options.epochs):
            sampler.set_epoch(epoch)
            began = time.perf_counter()
            batches = list(sampler)
            seconds += time.perf_counter() - began
            fills.append(fill(batches, tokens))
            together = {frozenset(batch) for batch in batches if len(batch) > 1}
            repeats.append(len(together & before) / max(len(together), 1))
            before = together
        repeated = max(repeats[1:], default=0.0)
        rows.append(
            (f"budget {budget:,}", f"{min(fills):.3f}", f"{len(sampler):,}", f"{repeated:.2f}", f"{seconds:.2f}")
        )
        record["budgets"][budget] = {"non_padding": fills, "batches": len(sampler), "repeated": repeated}
    print(f"{len(tokens):,} proteins")
    print(format_table(rows, ("batches", "non-padding", "number", "same as the epoch before", "seconds")))
    if options.json:
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
