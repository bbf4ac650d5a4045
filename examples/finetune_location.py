"""Fine-tune ESM-2 to predict where in the cell a protein is: ten locations, of which a protein may have several.

Without arguments the script runs offline, with the tiny model and the synthetic table that come with the library::

    python examples/finetune_location.py

With a real model and the real data::

    python examples/finetune_location.py --model facebook/esm2_t33_650M_UR50D --data deeploc

The script compares the model with two baselines on the same test proteins. The first predicts the commonest label for
every protein. The second is a logistic regression on residue frequencies, with thresholds tuned on the same validation
proteins.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict
from sklearn.linear_model import LogisticRegression
from sklearn.multioutput import MultiOutputClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers.utils import logging as transformers_logging

from esm_efficient import (
    RECIPES,
    EsmEfficientError,
    demo_model_path,
    finetune,
    format_table,
    load_deeploc,
    multi_label_metrics,
    stratified_sample,
    tune_thresholds,
    write_demo_table,
)
from esm_efficient.data.sequences import STANDARD_RESIDUES

SHOWN = ("f1_macro", "f1_micro", "jaccard", "subset_accuracy", "auroc")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub name of an ESM-2 model (default: the demo model)")
    parser.add_argument("--data", help='a table in the DeepLoc-2.0 format, or "deeploc" (default: the demo table)')
    parser.add_argument("--recipe", default="top", choices=RECIPES, help="training method (default: %(default)s)")
    parser.add_argument("--epochs", type=float, default=1, help="passes over the training proteins")
    parser.add_argument("--limit", type=int, help="train on this many proteins; validate and test on a third as many")
    parser.add_argument("--class-weights", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--focal-gamma", type=float, default=0.0, help="exponent of the focal loss")
    parser.add_argument(
        "--token-budget", type=int, help="tokens per micro-batch, instead of a fixed number of proteins"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("output"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file")
    return parser.parse_args()


def load_data(options: argparse.Namespace) -> DatasetDict:
    if options.data is None:
        source = write_demo_table(options.output / "demo_table.csv")
    else:
        source = None if options.data == "deeploc" else options.data
    data = load_deeploc(source, task="location", seed=options.seed)
    if options.limit is None:
        return data
    sizes = {"train": options.limit, "validation": max(1, options.limit // 3), "test": max(1, options.limit // 3)}
    return DatasetDict({name: stratified_sample(data[name], n, seed=options.seed) for name, n in sizes.items()})


def label_table(split: Dataset) -> np.ndarray:
    """The labels as an array of shape (proteins, locations)."""
    return np.array([list(row.values()) for row in split["label"]], dtype=float)


def composition(split: Dataset) -> np.ndarray:
    """The frequency of each standard residue and the logarithm of the number of residues, per protein."""
    rows = [[s.count(r) / len(s) for r in STANDARD_RESIDUES] + [np.log(len(s))] for s in split["sequence"]]
    return np.array(rows)


def baselines(data: DatasetDict) -> dict[str, dict[str, float]]:
    """Compute the test metrics of two predictors without a language model."""
    names = list(data["train"].features["label"])
    train, test = label_table(data["train"]), label_table(data["test"])
    commonest = np.full(test.shape, -1.0)
    commonest[:, train.sum(0).argmax()] = 1.0
    metrics = {"commonest label": multi_label_metrics(test, commonest, names)}

    # LogisticRegression needs positive and negative examples of a label.
    learnable = (train.min(0) == 0) & (train.max(0) == 1)
    model = MultiOutputClassifier(make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)))
    model.fit(composition(data["train"]), train[:, learnable])

    def logits(split: Dataset) -> np.ndarray:
        result = np.where(train.mean(0) > 0.5, 20.0, -20.0) * np.ones((len(split), 1))
        probabilities = np.stack([p[:, 1] for p in model.predict_proba(composition(split))], axis=1)
        result[:, learnable] = np.log(probabilities) - np.log1p(-probabilities)
        return result

    thresholds = tune_thresholds(label_table(data["validation"]), logits(data["validation"]), names)
    metrics["residue composition"] = multi_label_metrics(test, logits(data["test"]), names, thresholds=thresholds)
    return metrics


def main() -> None:
    options = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for library in ("httpx", "fsspec"):
        logging.getLogger(library).setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    data = load_data(options)
    rows = baselines(data)
    result = finetune(
        options.model or demo_model_path(),
        data,
        recipe=options.recipe,
        output_dir=options.output,
        class_weights="balanced" if options.class_weights else None,
        focal_gamma=options.focal_gamma,
        token_budget=options.token_budget,
        seed=options.seed,
        num_train_epochs=options.epochs,
    )
    rows[f"recipe {result.recipe}"] = dict(result.metrics)
    table = [(name, *(f"{metrics[key]:.3f}" for key in SHOWN)) for name, metrics in rows.items()]
    print(f"\n{len(data['train']):,} proteins to train on, {len(data['test']):,} to test on")
    print(format_table(table, ("", *SHOWN)) + "\n")
    per_label = [
        (name, f"{threshold:.2f}", *(f"{metrics[f'mcc_{name}']:.3f}" for metrics in rows.values()))
        for name, threshold in result.thresholds.items()
    ]
    print(format_table(per_label, ("MCC of", "threshold", *rows)))
    if options.json is not None:
        figures = result.to_dict() | {"baselines": {name: rows[name] for name in list(rows)[:-1]}}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except EsmEfficientError as error:
        raise SystemExit(f"error: {error}") from error
