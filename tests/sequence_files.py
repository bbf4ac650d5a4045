"""Random tables of sequences with many kinds of labels, and files of them."""

from __future__ import annotations

import gzip
import lzma

import numpy as np
import pandas as pd

LETTERS = list("ACDEFGHIKLMNPQRSTVWY")


def frame(rows=40, *, seed=0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    sequences = ["".join(rng.choice(LETTERS, int(n))) for n in rng.integers(10, 30, rows)]
    return pd.DataFrame(
        {
            "id": [f"P{i}" for i in range(rows)],
            "sequence": sequences,
            "label": [("soluble", "membrane")[i % 3 == 0] for i in range(rows)],
            "stability": [f"{value:.3f}" for value in rng.normal(size=rows)],
            "structure": ["".join("HE"[r in "AILMFVWY"] for r in s) for s in sequences],
            "nucleus": [("0", "1", "")[i % 3] for i in range(rows)],
            "golgi": [("1.0", "0.0")[i % 2] for i in range(rows)],
            "fold": [i % 5 for i in range(rows)],
        }
    )


def rows_of(data) -> dict[str, dict]:
    return {row["accession"]: row for split in data.values() for row in split}


def write(table: pd.DataFrame, path):
    if path.name.endswith(".parquet"):
        table.to_parquet(path)
        return path
    if path.name.endswith(".jsonl"):
        table.to_json(path, orient="records", lines=True)
        return path
    text = table.to_csv(index=False, sep="\t" if ".tsv" in path.name else ",")
    packer = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
    path.write_bytes(packer(text.encode()))
    return path


def fasta(table: pd.DataFrame, path):
    path.write_text(
        "".join(
            f">{r.id} class={r.label} fold={r.fold}\n{r.sequence[:8]}\n{r.sequence[8:]}\n" for r in table.itertuples()
        )
    )
    return path


def put(table, column, value):
    table.loc[2, column] = value
    return table
