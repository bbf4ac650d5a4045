"""Measure homology leakage: score the same model on a random split and on a split by homology partition.

    python examples/leakage.py
    python examples/leakage.py --model facebook/esm2_t33_650M_UR50D --data deeploc

Both runs use the same numbers of training and test proteins, the same recipe and the same seed. In the random split a
test protein may have homologues among the training proteins. Proteins of different DeepLoc partitions share at most
30 % identity. A model that remembers homologues gains from them in the random split. The two splits test different
proteins, which may differ in difficulty too, so a difference of one run is no measure of that gain.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from pathlib import Path

from datasets import DatasetDict
from transformers.utils import logging as transformers_logging

from esm_efficient import (
    RECIPES,
    EsmEfficientError,
    demo_model_path,
    finetune,
    format_table,
    load_deeploc,
    stratified_sample,
    write_demo_table,
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub name of an ESM-2 model (default: the demo model)")
    parser.add_argument("--data", help='a table in the DeepLoc-2.0 format, or "deeploc" (default: the demo table)')
    parser.add_argument("--recipe", default="lora", choices=RECIPES)
    parser.add_argument("--limit", type=int, help="train on this many proteins and test on a third as many")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, default=Path("output"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    return parser.parse_args()


def load_splits(source: Path | str | None, limit: int | None, seed: int) -> dict[str, DatasetDict]:
    """Load both splits and sample the same number of proteins from each."""
    splits = {
        "partition": load_deeploc(source, validation_partitions=(), seed=seed),
        "random": load_deeploc(source, split="random", validation_size=0, seed=seed),
    }
    sizes = {name: min(len(data[name]) for data in splits.values()) for name in ("train", "test")}
    if limit is not None:
        sizes = {"train": min(limit, sizes["train"]), "test": min(max(1, limit // 3), sizes["test"])}
    return {
        kind: DatasetDict({name: stratified_sample(data[name], n, seed=seed) for name, n in sizes.items()})
        for kind, data in splits.items()
    }


def main() -> None:
    options = parse_arguments()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message="A random split")  # this script measures that leak
    if options.data is None:
        source: Path | str | None = write_demo_table(options.output / "demo_table.csv")
    else:
        source = None if options.data == "deeploc" else options.data
    runs: dict[str, list[dict[str, float]]] = {"partition": [], "random": []}
    for seed in options.seeds:
        for kind, data in load_splits(source, options.limit, seed).items():
            result = finetune(
                options.model or demo_model_path(),
                data,
                recipe=options.recipe,
                output_dir=options.output / f"{kind}-{seed}",
                seed=seed,
                num_train_epochs=options.epochs,
                early_stopping=None,
                probe=False,
                disable_tqdm=True,
            )
            runs[kind].append(dict(result.metrics))
    shown = ("accuracy", "mcc", "auroc")
    means = {kind: {key: sum(run[key] for run in same) / len(same) for key in shown} for kind, same in runs.items()}
    leakage = {key: means["random"][key] - means["partition"][key] for key in shown}
    rows = [(kind, *(f"{metrics[key]:.3f}" for key in shown)) for kind, metrics in means.items()]
    rows.append(("leakage", *(f"{leakage[key]:+.3f}" for key in shown)))
    print(
        f"{len(data['train']):,} proteins to train on, {len(data['test']):,} to test on, {len(options.seeds)} seed(s)"
    )
    print(format_table(rows, ("split", *shown)))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"runs": runs, "leakage": leakage}, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except EsmEfficientError as error:
        raise SystemExit(f"error: {error}") from error
