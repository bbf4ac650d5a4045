"""Write tokenised splits to a folder or to S3, as the training job reads them.

    python examples/sagemaker/prepare_data.py --place s3://BUCKET/esm2-membrane
    python examples/sagemaker/prepare_data.py --place output --data table.csv --task location
    python examples/sagemaker/prepare_data.py --place output --data my.csv --label binds

The splits go to PLACE/dataset. ``--data deeploc`` downloads the DeepLoc-2.0 table from its authors, ``--data demo`` is
the synthetic table, and ``--data FILE`` is a table in DeepLoc's format; with ``--label``, it is one of your own, which
`load_sequences` reads.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from pathlib import Path

import fsspec
from aws import Place, claim, client, run
from datasets import DatasetDict
from transformers import AutoTokenizer

from esm_efficient import (
    demo_model_path,
    load_deeploc,
    load_sequences,
    stratified_sample,
    task_of,
    tokenize_dataset,
    write_demo_table,
)

KNOWN_TABLES = {"deeploc": "DeepLoc-2.0", "demo": "the demo's synthetic table"}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--place", required=True, help="s3://bucket/prefix for all of these scripts, or a folder")
    parser.add_argument("--data", default="deeploc", help='a table in the DeepLoc-2.0 format, "deeploc" or "demo"')
    parser.add_argument("--task", default="membrane", choices=["membrane", "location"])
    parser.add_argument("--tokenizer", help="tokenizer of the model to fine-tune (default: that of all ESM-2 sizes)")
    parser.add_argument("--label", help="column of the labels of a table of your own")
    parser.add_argument("--label-kind", choices=["class", "several", "residues", "positions", "number"])
    parser.add_argument("--sequence", help="column of its sequences")
    parser.add_argument("--clusters", help="clusters of MMseqs2 or CD-HIT, by which it is split")
    parser.add_argument("--min-residues", type=int, help="(default: 100, or none with --label)")
    parser.add_argument("--max-residues", type=int, help="(default: 512, or none with --label)")
    parser.add_argument(
        "--max-tokens", type=int, default=1024, help="most tokens per sequence, with the two special ones"
    )
    parser.add_argument("--split", default="partition", choices=["partition", "random"])
    parser.add_argument("--limit", type=int, help="train on this many proteins, validate and test on a third as many")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def load(options: argparse.Namespace) -> DatasetDict:
    bounds = {"min_residues": options.min_residues, "max_residues": options.max_residues}
    if options.label is not None:
        columns = {"label": options.label, "label_kind": options.label_kind, "sequence": options.sequence}
        return load_sequences(options.data, **columns, **bounds, clusters=options.clusters, seed=options.seed)
    with tempfile.TemporaryDirectory() as folder:
        demo = options.data == "demo"
        source = write_demo_table(Path(folder) / "demo.csv") if demo else options.data
        data = load_deeploc(
            None if source == "deeploc" else source,
            task=options.task,
            split=options.split,
            min_residues=100 if options.min_residues is None else options.min_residues,
            max_residues=512 if options.max_residues is None else options.max_residues,
            seed=options.seed,
        )
    return data


def sampled(data: DatasetDict, options: argparse.Namespace) -> DatasetDict:
    if options.limit is None:
        return data
    sizes = {name: options.limit if name == "train" else max(1, options.limit // 3) for name in data}
    return DatasetDict({name: stratified_sample(data[name], sizes[name], seed=options.seed) for name in data})


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    data = sampled(load(options), options)
    task = task_of(data["train"].features)
    # The demo model has the same tokenizer as every ESM-2.
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or demo_model_path())
    tokenized, _ = tokenize_dataset(data, tokenizer, max_tokens=options.max_tokens)
    if options.place.startswith("s3://"):
        claim(client("s3"), Place.parse(options.place))
    folder = f"{options.place.rstrip('/')}/dataset"
    tokenized.save_to_disk(folder)
    record = {
        "kind": task.kind,
        "names": task.names,
        "dataset": KNOWN_TABLES.get(options.data, Path(options.data).name),
        "sequences": {name: len(split) for name, split in tokenized.items()},
        "max_tokens": options.max_tokens,
        "longest_tokens": max(max(split["tokens"]) for split in tokenized.values()),
    }
    with fsspec.open(f"{folder}/task.json", "w") as handle:
        json.dump(record, handle, indent=2)
    print(f"written to {folder}")  # the report is logged


if __name__ == "__main__":
    run(main)
