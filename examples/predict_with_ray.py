"""Predict from a proteome with Ray Data, on one machine or on a cluster.

    pip install ".[ray]"
    python examples/predict_with_ray.py MODEL proteome.fasta predictions
    python examples/predict_with_ray.py MODEL proteome.parquet /shared/predictions --address auto

The driver checks every row and divides the file into blocks. Each GPU has an actor that holds one `Predictor`, or each
group of `--cpus` CPU cores if there is no GPU. Ray gives the actors one block after another, and an actor predicts its
block in batches of similar length, without padding. All machines need the library, and they need a shared file system
for the output and for a model in a folder.

The output is a folder of Parquet files `block-000000.parquet`, ..., in the order of the input; pandas and pyarrow read
the folder as one table. Its columns are those of `predict_file`. A file has its name only when it is whole, and it
records what it was computed from. So a run that was stopped, or an actor that was lost, costs only unfinished blocks:
start the command again, and it computes the blocks that are missing. A folder with predictions from other sequences, or
with other options or weights, is an error; `--replace` deletes these and computes them again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers.utils import logging as transformers_logging

from esm_efficient import ConfigurationError, EsmEfficientError, Predictor
from esm_efficient.inference.identity import identity_of
from esm_efficient.inference.inputs import CheckedSequences
from esm_efficient.inference.predictions import columns_of
from esm_efficient.inference.rows import check_rows, read_sequences
from esm_efficient.tasks import SPECIAL_TOKENS

SEQUENCES, MODEL, PRECISION = b"esm_efficient.sequences", b"esm_efficient.model", b"esm_efficient.precision"
"""The entries of a Parquet file's metadata that say what the file was computed from."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="what Predictor.load loads: a folder that all machines see, or a Hub name")
    parser.add_argument("source", type=Path, help="a FASTA, CSV, TSV, Parquet or JSON lines file, plain, gzip or xz")
    parser.add_argument("output", type=Path, help="a folder that all machines see")
    parser.add_argument("--address", help='of a cluster, or "auto" (default: RAY_ADDRESS, or Ray on this machine)')
    parser.add_argument("--actors", type=int, help="predictors (default: as many as GPUs, or as CPU cores / --cpus)")
    parser.add_argument("--cpus", type=int, default=1, help="CPU cores and threads of an actor")
    parser.add_argument("--block-rows", type=int, default=2048, help="sequences per file")
    parser.add_argument("--token-budget", type=int, default=8192, help="the most tokens per batch")
    parser.add_argument("--max-tokens", type=int, help="the most tokens per sequence (default: as in training)")
    parser.add_argument("--keep", choices=("start", "end", "both"), help="part to read of sequences that are too long")
    parser.add_argument("--replace", action="store_true", help="delete predictions of another run in the output")
    parser.add_argument("--sequence", help="column of the sequences")
    parser.add_argument("--accession", help="column of the accessions")
    return parser.parse_args()


def write_blocks(options: argparse.Namespace, folder: Path) -> list[Path]:
    """Check every row of the source, and write the rows as Parquet files with a bounded number of rows."""
    columns = {"sequence": options.sequence, "accession": options.accession}
    longest = options.max_tokens - SPECIAL_TOKENS if options.keep is None else None
    rows = check_rows(options.source, longest=longest, **columns).usable
    reader = read_sequences(options.source, **columns)
    paths = []
    for number, start in enumerate(range(0, rows, options.block_rows)):
        block = [next(reader) for _ in range(start, min(start + options.block_rows, rows))]
        table = pa.table({"accession": [r.accession for r in block], "sequence": [r.sequence for r in block]})
        paths.append(folder / f"block-{number:06d}.parquet")
        pq.write_table(table, paths[-1])
    return paths


def model_facts(predictor: Predictor, keep: Any) -> str:
    """Return a hash of what decides predictions, besides the precision, which is that of an actor's device."""
    return identity_of(predictor.model, predictor.model.config, predictor.max_tokens, keep)


def facts_of(block: pa.Table, identity: str) -> dict[bytes, bytes]:
    """Return the metadata of the predictions from a block of rows by a model."""
    rows = repr(block.to_pydict()).encode()
    return {SEQUENCES: hashlib.sha256(rows).hexdigest().encode(), MODEL: identity.encode()}


def has_facts(file: Path, facts: dict[bytes, bytes]) -> bool:
    """Return whether a file of predictions exists and was computed from these sequences by this model."""
    return file.is_file() and facts.items() <= (pq.read_schema(file).metadata or {}).items()


def remove_others(output: Path, paths: list[Path], identity: str, *, replace: bool) -> None:
    """Remove predictions from other sequences and by other models, so that none are mixed, and files of lost actors.

    Raises:
        ConfigurationError: there are such predictions, and they are not to be replaced.
    """
    for left_over in output.glob("_block-*"):
        left_over.unlink()
    blocks = {path.name: path for path in paths}
    others = [
        file
        for file in sorted(output.glob("block-*.parquet"))
        if file.name not in blocks or not has_facts(file, facts_of(pq.read_table(blocks[file.name]), identity))
    ]
    if others and not replace:
        raise ConfigurationError(
            f"{output} has predictions of another run, from other sequences or with other options or weights: "
            f"{others[0].name} to {others[-1].name}. Give another folder, or --replace to delete them"
        )
    for file in others:
        file.unlink()


class PredictBlocks:
    """An actor that holds one model, and writes a file of predictions for each block."""

    def __init__(self, model: str, output: Path, keep: Any, token_budget: int, max_tokens: int) -> None:
        transformers_logging.set_verbosity_error()
        self.predictor = Predictor.load(model, max_tokens=max_tokens)
        self.output, self.keep, self.token_budget = output, keep, token_budget
        self.identity = model_facts(self.predictor, keep)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        done = [self.predict(Path(path)) for path in batch["block"]]
        return {"rows": [rows for rows, _ in done], "computed": [computed for _, computed in done]}

    def predict(self, block: Path) -> tuple[int, bool]:
        """Predict from a block; return the number of its rows, and whether they were computed."""
        table = pq.read_table(block)
        rows = table.to_pydict()
        facts = facts_of(table, self.identity) | {PRECISION: str(self.predictor.half).encode()}
        file = self.output / block.name
        if has_facts(file, facts):
            return table.num_rows, False
        # Checked by write_blocks, all rows together.
        sequences = CheckedSequences(rows["sequence"], rows["accession"])
        found = self.predictor.predict(sequences, keep=self.keep, token_budget=self.token_budget)
        result = pa.table({"accession": table["accession"], **columns_of(found, self.predictor.task)})
        partial = file.with_name(f"_{file.name}.{os.getpid()}")
        pq.write_table(result.replace_schema_metadata(facts), partial)
        os.replace(partial, file)
        return table.num_rows, True


def main() -> None:
    options = parse_arguments()
    import ray

    started = time.perf_counter()
    output = options.output.absolute()
    # Actors run in other folders. The model is also loaded here, so that an error is found at once.
    model = str(Path(options.model).absolute()) if Path(options.model).exists() else options.model
    transformers_logging.set_verbosity_error()
    predictor = Predictor.load(model, device="cpu", max_tokens=options.max_tokens)
    options.max_tokens = predictor.max_tokens
    blocks = output / "_input"  # readers of the folder leave out names that begin with _
    if any(not file.match("block-*.parquet") for file in blocks.glob("*")):
        raise ConfigurationError(f"{blocks} has other files in it: move them, or give another output folder")
    shutil.rmtree(blocks, ignore_errors=True)
    blocks.mkdir(parents=True)
    paths = write_blocks(options, blocks)
    remove_others(output, paths, model_facts(predictor, options.keep), replace=options.replace)
    del predictor
    ray.init(address=options.address)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    actors = options.actors or gpus or max(1, int(ray.cluster_resources()["CPU"]) // options.cpus)
    done = (
        ray.data.from_items([{"block": str(path)} for path in paths], override_num_blocks=len(paths))
        .map_batches(
            PredictBlocks,
            fn_constructor_args=(model, output, options.keep, options.token_budget, options.max_tokens),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(actors, len(paths))),
            num_cpus=options.cpus,
            num_gpus=1 if gpus else 0,
        )
        .take_all()
    )
    ray.shutdown()
    for left_over in output.glob("_block-*"):  # of an actor that was lost
        left_over.unlink()
    shutil.rmtree(blocks)
    rows, reused = sum(row["rows"] for row in done), sum(row["rows"] for row in done if not row["computed"])
    seconds = time.perf_counter() - started
    print(f"{output}: {rows:,} rows in {len(paths)} files, {seconds:.1f} s; {reused:,} rows were there already")


if __name__ == "__main__":
    try:
        main()
    except EsmEfficientError as error:
        sys.exit(f"error: {error}")
