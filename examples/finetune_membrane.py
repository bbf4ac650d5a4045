"""Fine-tune ESM-2 to tell membrane proteins from soluble ones, and check the saved model.

Without arguments the script runs offline in about a minute. It then trains the tiny model on the synthetic table that
come with the library, with the recipe ``top`` (LoRA on the top third of the layers, on cached states)::

    python examples/finetune_membrane.py

With a real model and the real data::

    python examples/finetune_membrane.py --model facebook/esm2_t33_650M_UR50D --data deeploc
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
import warnings
from pathlib import Path

import torch
from accelerate.utils import extract_model_from_parallel
from datasets import DatasetDict
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from esm_efficient import (
    RECIPES,
    EsmEfficientError,
    FinetuneResult,
    PooledEsmForSequenceClassification,
    demo_model_path,
    finetune,
    format_table,
    load_deeploc,
    stratified_sample,
    write_demo_table,
)
from esm_efficient.demo.proteins import KNOWN_PROTEINS


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub name of an ESM-2 model (default: the demo model)")
    parser.add_argument(
        "--data", help='a table in the DeepLoc-2.0 format, or "deeploc" to download it (default: the demo table)'
    )
    parser.add_argument("--recipe", default="top", choices=RECIPES, help="training method (default: %(default)s)")
    parser.add_argument("--epochs", type=float, help="passes over the training proteins (default: 1, demo: 3)")
    parser.add_argument("--limit", type=int, help="train on this many proteins and test on a third as many")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample, the head and the batch order")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for the result")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file")
    parser.add_argument("--micro-batch", type=int, help="proteins in one forward pass (default: the recipe's)")
    parser.add_argument("--accumulation", type=int, help="micro-batches per optimizer step (default: the recipe's)")
    parser.add_argument("--learning-rate", type=float, help="peak rate (default: the recipe's)")
    parser.add_argument("--encoder", choices=["lean", "plain"], help="encoder to use (default: the recipe's)")
    parser.add_argument(
        "--class-weights",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="weigh classes inversely to their frequency",
    )
    return parser.parse_args(arguments)


def load_data(options: argparse.Namespace) -> DatasetDict:
    if options.data is None:
        source = write_demo_table(options.output / "demo_table.csv")
    else:
        source = None if options.data == "deeploc" else options.data
    data = load_deeploc(source, test_partitions=(4,), validation_partitions=(), seed=options.seed)
    if options.limit is not None:
        sizes = {"train": options.limit, "test": max(1, options.limit // 3)}
        data = DatasetDict({k: stratified_sample(data[k], n, seed=options.seed) for k, n in sizes.items()})
    return data


@torch.no_grad()
def logits_of(model: torch.nn.Module, tokenizer, sequences: list[str]) -> torch.Tensor:
    """Compute logits of shape (sequences, labels), one sequence at a time."""
    model.eval()
    rows = [model(**tokenizer(s, return_tensors="pt").to(model.device)).logits.float().cpu() for s in sequences]
    return torch.cat(rows)


def reload_plainly(result: FinetuneResult) -> torch.nn.Module:
    """Load the saved result with transformers, and with peft if it is an adapter.

    Only a head that pools residues needs a class of this library.
    """
    if not (result.model_dir / "adapter_config.json").exists():
        pooled = hasattr(AutoConfig.from_pretrained(result.model_dir), "classifier_pooling")
        kind = PooledEsmForSequenceClassification if pooled else AutoModelForSequenceClassification
        return kind.from_pretrained(result.model_dir)
    config = AutoConfig.from_pretrained(result.model_dir / "base_config")
    model = AutoModelForSequenceClassification.from_pretrained(result.base_model, config=config, dtype=torch.float32)
    return PeftModel.from_pretrained(model, result.model_dir)


def round_alike(model: torch.nn.Module, trained: torch.nn.Module) -> torch.nn.Module:
    """Round each weight to its dtype during training, so that both models can be compared in float32."""
    dtypes = {name: parameter.dtype for name, parameter in trained.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes[name]).float()
    return model


def report(result: FinetuneResult, data: DatasetDict, difference: float | None) -> str:
    recipe, metrics = RECIPES[result.recipe], result.metrics
    compared = "not compared, because the trained model is divided among the ranks"
    if difference is not None:
        compared = f"largest difference between logits {difference:.1e}"
    share = 100 * result.trainable_parameters / result.total_parameters
    return format_table(
        [
            ("recipe", f"{recipe.name}: {recipe.description}"),
            ("proteins", f"{len(data['train']):,} to train on, {len(data['test']):,} to test on"),
            ("optimizer steps", f"{result.steps:,}"),
            ("trained", f"{result.trainable_parameters:,} of {result.total_parameters:,} parameters ({share:.2f} %)"),
            ("layers that trained", result.layers_in_words),
            ("residues/s", f"{result.residues_per_second:,.0f}"),
            ("training time", f"{result.seconds:.0f} s"),
            ("peak memory", result.peak_memory_in_words),
            ("accuracy", f"{metrics['accuracy']:.3f} (majority class: {metrics['majority_accuracy']:.3f})"),
            ("MCC", f"{metrics['mcc']:.3f} (majority class: 0)"),
            ("AUROC", f"{metrics['auroc']:.3f} (majority class: 0.5)"),
            ("reloaded from", f"{result.model_dir}; {compared}"),
        ],
        ("", "result"),
    )


def check_reloaded(result: FinetuneResult, data: DatasetDict) -> tuple[torch.nn.Module, torch.Tensor, float | None]:
    """Reload the saved model, and compare its logits with those of the trained one.

    Returns:
        The reloaded model, its logits for `KNOWN_PROTEINS`, and the largest difference between logits; None if the
        trained model is divided among the ranks, so that one rank cannot run it.
    """
    tokenizer = AutoTokenizer.from_pretrained(result.model_dir)
    sequences = [*data["test"][:8]["sequence"], *KNOWN_PROTEINS.values()]
    reloaded = reload_plainly(result)
    if any(hasattr(parameter, "to_local") for parameter in result.model.parameters()):
        return reloaded, logits_of(reloaded, tokenizer, [*KNOWN_PROTEINS.values()]), None
    round_alike(reloaded, result.model)
    # Without the autocast in which accelerate has wrapped the model of a half-precision run.
    trained = extract_model_from_parallel(result.model, keep_fp32_wrapper=False)
    expected = logits_of(trained.to("cpu").float(), tokenizer, sequences)
    logits = logits_of(reloaded, tokenizer, sequences)
    difference = float((expected - logits).abs().max())
    if not difference <= 1e-4:  # also if the difference is NaN
        raise SystemExit(
            f"the reloaded model differs from the trained one: its logits differ by up to {difference:.3g}, and at "
            "most 1e-4 was expected"
        )
    return reloaded, logits[-len(KNOWN_PROTEINS) :], difference


def main() -> None:
    started = time.perf_counter()
    options = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for library in ("httpx", "fsspec"):
        logging.getLogger(library).setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # peft causes them, not the user
    base = options.model or demo_model_path()
    changes = {"micro_batch": options.micro_batch, "accumulation": options.accumulation, "encoder": options.encoder}
    if options.learning_rate is not None:
        changes["learning_rate"] = options.learning_rate
    recipe = RECIPES[options.recipe].replace(**{name: value for name, value in changes.items() if value is not None})
    epochs = options.epochs if options.epochs is not None else 3 if options.data is None else 1

    data = load_data(options)
    result = finetune(
        base,
        data,
        recipe=recipe,
        output_dir=options.output,
        class_weights="balanced" if options.class_weights else None,
        seed=options.seed,
        num_train_epochs=epochs,
    )
    if int(os.environ.get("RANK", "0")) > 0:
        return  # one rank reports
    reloaded, logits, difference = check_reloaded(result, data)
    predictions = dict(zip(KNOWN_PROTEINS, logits.softmax(-1), strict=True))
    names = reloaded.config.id2label
    rows = [(name, names[int(p.argmax())], f"{float(p.max()):.2f}") for name, p in predictions.items()]
    print("\n" + report(result, data, difference) + "\n")
    print(format_table(rows, ("protein", "prediction", "probability")))
    if options.json is not None:
        figures = result.to_dict() | {
            "logit_difference": difference,
            "train_proteins": len(data["train"]),
            "test_proteins": len(data["test"]),
            "model": base if options.model else "demo",
            "known_proteins": {name: float(p[1]) for name, p in predictions.items()},
            "total_seconds": time.perf_counter() - started,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except EsmEfficientError as error:
        raise SystemExit(f"error: {error}") from error
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
