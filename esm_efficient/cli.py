"""The command line: each command calls one public function and prints what it returns."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from esm_efficient.costs.devices import DEFAULT_DEVICE
from esm_efficient.errors import ConfigurationError, EsmEfficientError
from esm_efficient.recipes import RECIPES, Precision


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 0, 1 for an error of the library's, 2 for arguments that make no sense.

    Args:
        arguments: without the program's name; None for those of the process.
    """
    options = _parser().parse_args(arguments)
    try:
        result, record = options.run(options)
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(record, indent=2) + "\n")
    except (EsmEfficientError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"{result}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m esm_efficient", description="What fine-tuning ESM-2 costs, predicted without a GPU."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("estimate", help="peak memory and time of one training step")
    _add_common(command)
    command.add_argument("--recipe", default="all", choices=RECIPES, help="training method (default: %(default)s)")
    command.add_argument("--micro-batch", type=int, help="sequences in one forward pass (default: the recipe's)")
    command.add_argument("--accumulation", type=int, help="micro-batches an optimizer step (default: the recipe's)")
    command.add_argument("--preset", help="adapters: qkv, attention, mlp or all-linear (default: the recipe's)")
    command.set_defaults(run=_estimate)

    command = commands.add_parser("recommend", help="the recipe and sizes that fit a device and finish soonest")
    _add_common(command)
    command.add_argument("--batch-size", type=int, default=8, help="sequences an optimizer step (default: %(default)s)")
    command.add_argument("--recipes", nargs="+", default=["base", "gc", "lora", "all"], choices=RECIPES)
    command.add_argument("--presets", nargs="+", default=["all-linear"], help="adapters to try")
    command.add_argument("--margin", type=float, default=0.1, help="share of memory kept free (default: %(default)s)")
    command.set_defaults(run=_recommend)

    command = commands.add_parser("compare", help="the recipes side by side; with --data they are trained")
    _add_common(command)
    command.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    command.add_argument("--steps", type=int, default=100, help="optimizer steps of the first table")
    command.add_argument("--epochs", type=float, default=1.0, help="epochs of the second table")
    command.add_argument("--data", help='train on this table in the DeepLoc-2.0 format; "demo" for the synthetic one')
    command.add_argument("--limit", type=int, help="train on this many proteins and test on a third as many")
    command.add_argument("--seeds", nargs="+", type=int, default=[0])
    command.add_argument("--output", type=Path, help="folder for tables and the HTML page")
    command.set_defaults(run=_compare)
    return parser


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", default="650M", help="an ESM-2 size such as 650M, a model id or a folder")
    command.add_argument("--device", default=DEFAULT_DEVICE, help="a GPU or an instance type (default: %(default)s)")
    command.add_argument("--tokens", type=int, default=512, help="tokens of a sequence (default: %(default)s)")
    command.add_argument("--precision", default="auto", choices=get_args(Precision), help="default: %(default)s")
    command.add_argument("--optimizer", default="adamw_fused", help="default: %(default)s")
    command.add_argument("--attention", default="sdpa", choices=["sdpa", "eager"])
    command.add_argument("--padding", choices=["padded", "equal-length", "padding-free"])
    command.add_argument("--json", type=Path, metavar="FILE", help="write every figure to this file")


def _common(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("precision", "optimizer", "attention", "padding")}


def _estimate(options: argparse.Namespace) -> tuple[object, dict[str, Any]]:
    # Looking for cycles among all that is imported takes a fifth of this command's time, and finds none.
    collects = gc.isenabled()
    gc.disable()
    try:
        from esm_efficient.estimation.estimate import estimate

        result = estimate(
            options.model,
            recipe=options.recipe,
            device=options.device,
            micro_batch=options.micro_batch,
            accumulation=options.accumulation,
            tokens=options.tokens,
            preset=options.preset,
            **_common(options),
        )
    finally:
        if collects:
            gc.enable()
    return result, result.to_dict()


def _recommend(options: argparse.Namespace) -> tuple[object, dict[str, Any]]:
    from esm_efficient.estimation.recommend import recommend

    result = recommend(
        options.model,
        options.device,
        options.tokens,
        batch_size=options.batch_size,
        recipes=options.recipes,
        presets=options.presets,
        margin=options.margin,
        **_common(options),
    )
    return result, result.to_dict()


def _compare(options: argparse.Namespace) -> tuple[object, dict[str, Any]]:
    from transformers.utils import logging

    from esm_efficient.comparison import compare

    logging.set_verbosity_error()

    dataset = None if options.data is None else _load(options.data, options.limit)
    trained: dict[str, Any] = {}
    if dataset is not None and options.precision != "auto":
        if options.precision not in ("float32", "bf16"):
            raise ConfigurationError(f"--precision {options.precision} is for estimates: train in float32 or bf16")
        trained["precision"] = options.precision
    if dataset is None and options.limit is not None:
        raise ConfigurationError("--limit goes with --data: without a table nothing is trained")
    result = compare(
        options.model,
        dataset,
        recipes=options.recipes,
        steps=options.steps,
        epochs=options.epochs,
        seeds=options.seeds,
        device=options.device,
        tokens=options.tokens,
        estimate_options=_common(options),
        **trained,
    )
    if options.output is not None:
        result.save(options.output)
    return result, result.to_dict()


def _load(source: str, limit: int | None) -> Any:
    import tempfile

    from datasets import DatasetDict

    from esm_efficient.data import load_deeploc, stratified_sample
    from esm_efficient.demo import write_demo_table

    with tempfile.TemporaryDirectory() as folder:
        path = write_demo_table(Path(folder) / "table.csv") if source == "demo" else source
        data = load_deeploc(path, test_partitions=(4,), validation_partitions=())
    if limit is None:
        return data
    sizes = {"train": limit, "test": max(1, limit // 3)}
    return DatasetDict({name: stratified_sample(data[name], size) for name, size in sizes.items()})
