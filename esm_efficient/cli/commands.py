"""The commands. Each imports torch only after its arguments are checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from esm_efficient.costs.devices import DEFAULT_DEVICE, get_device
from esm_efficient.errors import ConfigurationError
from esm_efficient.estimation.step import Attention, Padding
from esm_efficient.recipes import RECIPES, Precision, get_recipe

app = typer.Typer(add_completion=False, rich_markup_mode=None, help="Predict or measure the costs of fine-tuning.")

_ALL = list(RECIPES)
_RECOMMENDED = ["base", "gc", "lora", "all"]
_PRESETS = ["all-linear"]
_SEEDS = [0]


def _check_recipes(names: str | list[str]) -> str | list[str]:
    try:
        for name in [names] if isinstance(names, str) else names:
            get_recipe(name)
    except ConfigurationError as error:
        raise typer.BadParameter(str(error)) from error
    return names


# The options that several commands have.
ModelOption = Annotated[str, typer.Option("--model", help="An ESM-2 size such as 650M, a model id or a folder.")]
DeviceOption = Annotated[str, typer.Option("--device", help="A GPU or an instance type.")]
TokensOption = Annotated[int, typer.Option("--tokens", min=1, help="Tokens per sequence, special tokens included.")]
PrecisionOption = Annotated[Precision, typer.Option("--precision", help="Number format of a training step.")]
OptimizerOption = Annotated[str, typer.Option("--optimizer", help="Optimizer of the estimate.")]
AttentionOption = Annotated[Attention, typer.Option("--attention", help="Attention implementation of transformers.")]
PaddingOption = Annotated[Padding | None, typer.Option("--padding", help="Layout of a batch; default: the recipe's.")]
JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write every figure to this file.")]

_NAMES = f"one of {', '.join(RECIPES)}"
RecipeOption = Annotated[str, typer.Option("--recipe", callback=_check_recipes, help=f"Training method: {_NAMES}.")]
RecipesOption = Annotated[
    list[str],
    typer.Option("--recipe", callback=_check_recipes, help=f"Training method to try, {_NAMES}; can be repeated."),
]


@app.command()
def estimate(
    model: ModelOption = "650M",
    device: DeviceOption = DEFAULT_DEVICE,
    recipe: RecipeOption = "all",
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences in one forward pass; default: the recipe's.")
    ] = None,
    accumulation: Annotated[
        int | None, typer.Option(min=1, help="Micro-batches per optimizer step; default: the recipe's.")
    ] = None,
    tokens: TokensOption = 512,
    preset: Annotated[
        str | None, typer.Option(help="Adapters: qkv, attention, mlp or all-linear; default: the recipe's.")
    ] = None,
    precision: PrecisionOption = "auto",
    optimizer: OptimizerOption = "adamw_fused",
    attention: AttentionOption = "sdpa",
    padding: PaddingOption = None,
    json_file: JsonOption = None,
) -> None:
    """Estimate peak memory and time of one training step."""
    target = get_device(device)
    from esm_efficient.estimation.estimate import estimate

    result = estimate(
        model,
        recipe=recipe,
        device=target,
        micro_batch=micro_batch,
        accumulation=accumulation,
        tokens=tokens,
        preset=preset,
        precision=precision,
        optimizer=optimizer,
        attention=attention,
        padding=padding,
    )
    _show(result, json_file)


@app.command()
def recommend(
    model: ModelOption = "650M",
    device: DeviceOption = DEFAULT_DEVICE,
    tokens: TokensOption = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per optimizer step.")] = 8,
    recipes: RecipesOption = _RECOMMENDED,
    presets: Annotated[list[str], typer.Option("--preset", help="Adapters to try; can be repeated.")] = _PRESETS,
    margin: Annotated[float, typer.Option(help="Share of the device's memory to leave free.")] = 0.1,
    precision: PrecisionOption = "auto",
    optimizer: OptimizerOption = "adamw_fused",
    attention: AttentionOption = "sdpa",
    padding: PaddingOption = None,
    json_file: JsonOption = None,
) -> None:
    """Recommend the recipe and the sizes that fit a device and give the shortest step."""
    target = get_device(device)
    from esm_efficient.estimation.recommend import recommend

    result = recommend(
        model,
        target,
        tokens,
        batch_size=batch_size,
        recipes=recipes,
        presets=presets,
        margin=margin,
        precision=precision,
        optimizer=optimizer,
        attention=attention,
        padding=padding,
    )
    _show(result, json_file)


@app.command()
def compare(
    model: ModelOption = "650M",
    device: DeviceOption = DEFAULT_DEVICE,
    tokens: TokensOption = 512,
    recipes: RecipesOption = _ALL,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of the first table.")] = 100,
    epochs: Annotated[float, typer.Option(help="Epochs of the second table.")] = 1.0,
    data: Annotated[
        str | None,
        typer.Option(help='Train on this table in the DeepLoc-2.0 format; "demo" for the synthetic table.'),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Train on this many proteins and test on a third as many.")
    ] = None,
    seeds: Annotated[list[int], typer.Option("--seed", help="Seed of a training run; can be repeated.")] = _SEEDS,
    output: Annotated[Path | None, typer.Option(help="Folder for the tables and the HTML page.")] = None,
    precision: PrecisionOption = "auto",
    optimizer: OptimizerOption = "adamw_fused",
    attention: AttentionOption = "sdpa",
    padding: PaddingOption = None,
    json_file: JsonOption = None,
) -> None:
    """Compare the recipes; with --data they are trained."""
    if data is None and limit is not None:
        raise typer.BadParameter("--limit needs --data: without a table nothing is trained")
    if data is not None and precision not in ("auto", "float32", "bf16"):
        raise typer.BadParameter(f"--precision {precision} is for estimates only: train in float32 or bf16")
    training_options: dict[str, Any] = {} if data is None or precision == "auto" else {"precision": precision}
    target = get_device(device)
    from transformers.utils import logging

    from esm_efficient.comparison import compare

    logging.set_verbosity_error()
    result = compare(
        model,
        None if data is None else _load(data, limit),
        recipes=recipes,
        steps=steps,
        epochs=epochs,
        seeds=seeds,
        device=target,
        tokens=tokens,
        estimate_options={
            "precision": precision,
            "optimizer": optimizer,
            "attention": attention,
            "padding": padding,
        },
        **training_options,
    )
    if output is not None:
        result.save(output)
    _show(result, json_file)


def _show(result: Any, json_file: Path | None) -> None:
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(result.to_dict(), indent=2) + "\n")
    typer.echo(str(result))


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
