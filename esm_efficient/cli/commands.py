"""The commands. Each imports torch only after its arguments are checked."""

from __future__ import annotations

import functools
import math
import shlex
from collections.abc import Collection
from typing import Annotated, Any, Literal, get_args

import typer

from esm_efficient.cli.output import JsonOption, ModelOption, PageOption, quiet, show, typed_line
from esm_efficient.costs.devices import DEFAULT_DEVICE, GIB, get_device
from esm_efficient.errors import ConfigurationError, listing
from esm_efficient.estimation.step import Attention, Padding
from esm_efficient.recipes import RECIPES, Precision, Quantization, Recipe, check_layers, get_recipe, select_layers
from esm_efficient.tasks import Pooling

app = typer.Typer(
    rich_markup_mode=None,
    help="Fine-tune ESM-2 on a table of protein sequences, predict, and see what it costs. "
    "Example: esm-efficient finetune proteins.csv --model 35M",
)


@functools.cache
def command_group() -> Any:
    """Return all commands as typer makes them of their functions, once: it reads each signature."""
    return typer.main.get_command(app)


Preset = Literal["qkv", "attention", "mlp", "all-linear"]
"""The presets of `esm_efficient.adapters.registry`, which imports torch."""

_RECOMMENDED = ["base", "gc", "lora", "all", "top"]
_PRESETS = ["all-linear"]
_NOT_QUANTIZED: list[str] = []


def _check_recipes(names: str | list[str]) -> str | list[str]:
    try:
        for name in [names] if isinstance(names, str) else names:
            get_recipe(name)
    except ConfigurationError as error:
        raise typer.BadParameter(str(error)) from error
    return names


def _parse_layers(layers: str | None) -> Any:
    """Return a choice of layers; numbers as a tuple."""
    if layers is None:
        return None
    numbers = layers.split(",")
    try:
        return check_layers([int(n) for n in numbers] if all(n.strip().isdigit() for n in numbers) else layers)
    except ConfigurationError as error:
        raise typer.BadParameter(
            f"{layers!r}: expected all, a number of top layers such as top-2, a share such as top-1/3, or layer "
            "numbers from 0 such as 4,5"
        ) from error


def change_recipes(
    names: list[str], *, layers: Any, cache: bool | None, pooling: Pooling | None, keep_layers: int | None
) -> list[Recipe]:
    """Return recipes with the options that were given."""
    options = {"layers": layers, "cache": cache, "pooling": pooling, "keep_layers": keep_layers}
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    for recipe in map(get_recipe, names):
        if cache and recipe.trains == "full" and (layers or recipe.layers) == "all":
            raise typer.BadParameter(
                f"recipe {recipe.name} trains all parameters, so that nothing can be computed once: give --layers, "
                "such as --layers top-1/3",
                param_hint="--cache",
            )
    return [get_recipe(name).replace(**given) for name in names]


def parse_number(text: str | float) -> float:
    """Return the number that an option was given as; an error repeats a text that is none."""
    try:
        return float(text)
    except ValueError:
        with_point = str(text).replace(",", ".", 1)
    try:
        float(with_point)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: expected a number") from error
    raise typer.BadParameter(f"{text!r}: write {with_point}")


def check_epochs(epochs: float) -> None:
    """Refuse a number of epochs that no run has."""
    if not 0 < epochs < math.inf:  # false for NaN too
        raise typer.BadParameter(f"{epochs}: expected more than 0 and a finite number", param_hint="--epochs")


def _one_of(known: Collection[str]) -> Any:
    """Return a callback for an option that can be repeated, which typer does not check against a Literal everywhere."""

    def check(given: Any) -> list[str]:
        for name in given:
            if name not in known:
                raise typer.BadParameter(f"{name!r} is not one of {listing([repr(name) for name in known])}")
        return given

    return check


def _check_cache(cache: bool | None, quantization: str | list[str] | None) -> None:
    if cache and quantization:
        raise typer.BadParameter(
            "a base in 4 or 8 bits trains without a cache: leave out --cache or --quantization", param_hint="--cache"
        )


def _with_quantized(recipes: list[Recipe], kinds: list[str]) -> list[Recipe]:
    """Return recipes, and those with adapters again with a base in 4 or 8 bits."""
    adapted = [recipe for recipe in recipes if recipe.trains == "adapters"]
    if kinds and not adapted:
        raise typer.BadParameter("no recipe that is tried has adapters: add one, such as --recipe lora")
    return recipes + [recipe.replace(quantization=kind, cache=False) for kind in kinds for recipe in adapted]


def check_depth(model: str, layers: Any, kept: int | None = None) -> None:
    """Refuse layers that the model does not have, or that are not among the lowest ones that are kept."""
    if layers is None and kept is None:
        return
    from esm_efficient.estimation.inputs import resolve_config

    config: Any = resolve_config(model)[1]
    count = config.num_hidden_layers
    if kept is not None and kept > count:
        raise typer.BadParameter(f"{kept}: {model} has {count} layers", param_hint="--keep-layers")
    try:
        select_layers("all" if layers is None else layers, kept or count)
    except ConfigurationError as error:
        raise typer.BadParameter(
            f"{layers!r}: {model} has {count} layers, from 0 on{f', and keeps {kept} of them' if kept else ''}",
            param_hint="--layers",
        ) from error


# The options that several commands have.
number_option = functools.partial(typer.Option, parser=parse_number, metavar="FLOAT")
EpochsOption = Annotated[float, number_option("--epochs", help="Passes over the training sequences.")]
DeviceOption = Annotated[
    str, typer.Option("--device", help="A GPU, an instance type, or the memory of a GPU such as 12GB.")
]
TokensOption = Annotated[int, typer.Option("--tokens", min=1, help="Tokens per sequence, special tokens included.")]
PrecisionOption = Annotated[Precision, typer.Option("--precision", help="Number format of a training step.")]
OptimizerOption = Annotated[
    Literal["adamw_fused", "adamw_foreach", "adamw", "adamw_8bit"],
    typer.Option("--optimizer", help="Optimizer of the estimate."),
]
AttentionOption = Annotated[Attention, typer.Option("--attention", help="Attention implementation of transformers.")]
PaddingOption = Annotated[Padding | None, typer.Option("--padding", help="Layout of a batch; default: the recipe's.")]
_LAYERS = "all, top-2, top-1/3, or numbers such as 4,5; default:"
_layers_option = functools.partial(typer.Option, "--layers", callback=_parse_layers)
LayersOption = Annotated[str | None, _layers_option(help=f"Encoder layers that train: {_LAYERS} the recipe's.")]
AdapterLayersOption = Annotated[str | None, _layers_option(help=f"Encoder layers that get adapters: {_LAYERS} all.")]
MaxTokensOption = Annotated[
    int,
    typer.Option("--max-tokens", min=3, help="The most tokens per sequence; of a longer sequence, the start is read."),
]
CacheOption = Annotated[
    bool | None, typer.Option("--cache/--no-cache", help="Cache the frozen layers' states; default: the recipe's.")
]
PoolingOption = Annotated[Pooling | None, typer.Option("--pooling", help="What the head reads; default: the recipe's.")]
QuantizationOption = Annotated[
    Quantization | None,
    typer.Option("--quantization", help="Hold the frozen linear layers in 4 or 8 bits; default: the run's precision."),
]
KeepLayersOption = Annotated[
    int | None,
    typer.Option(
        "--keep-layers",
        min=1,
        help="Keep only this number of the lowest encoder layers: cheaper, and maybe less accurate; default: all.",
    ),
]
SequencesOption = Annotated[
    int | None, typer.Option("--sequences", min=1, help="Training sequences of an epoch; default: 15,876.")
]

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
    recipe: RecipeOption = "top",
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences in one forward pass; default: the recipe's.")
    ] = None,
    accumulation: Annotated[
        int | None, typer.Option(min=1, help="Micro-batches per optimizer step; default: the recipe's.")
    ] = None,
    tokens: TokensOption = 512,
    preset: Annotated[
        Preset | None, typer.Option(help="Kinds of layers that get adapters; default: the recipe's.")
    ] = None,
    layers: LayersOption = None,
    cache: CacheOption = None,
    pooling: PoolingOption = None,
    quantization: QuantizationOption = None,
    keep_layers: KeepLayersOption = None,
    sequences: SequencesOption = None,
    precision: PrecisionOption = "auto",
    optimizer: OptimizerOption = "adamw_fused",
    attention: AttentionOption = "sdpa",
    padding: PaddingOption = None,
    report: PageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Estimate the peak memory and the time of a training step.

    If the frozen layers' states are cached, it estimates the cache too. It needs no GPU and no network.

    Example: esm-efficient estimate --model 650M --device A10G --recipe lora --tokens 512
    """
    _check_cache(cache, quantization)
    [changed] = change_recipes([recipe], layers=layers, cache=cache, pooling=pooling, keep_layers=keep_layers)
    changed = changed.replace(quantization=quantization) if quantization else changed
    target = get_device(device)
    check_depth(model, layers, keep_layers)
    with quiet():
        from esm_efficient.comparison import estimate_page
        from esm_efficient.estimation.estimate import estimate

        result = estimate(
            model,
            recipe=changed,
            device=target,
            micro_batch=micro_batch,
            accumulation=accumulation,
            tokens=tokens,
            preset=preset,
            precision=precision,
            optimizer=optimizer,
            attention=attention,
            padding=padding,
            sequences=sequences,
        )
        if report is not None:
            report.write_text(estimate_page(result, command=typed_line.get()), encoding="utf-8")
    show(result, as_json)


@app.command()
def recommend(
    model: ModelOption = "650M",
    device: DeviceOption = DEFAULT_DEVICE,
    tokens: TokensOption = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per optimizer step.")] = 8,
    recipes: RecipesOption = _RECOMMENDED,
    presets: Annotated[
        list[str],
        typer.Option(
            "--preset",
            callback=_one_of(get_args(Preset)),
            help="Adapters to try: qkv, attention, mlp or all-linear; can be repeated.",
        ),
    ] = _PRESETS,
    layers: LayersOption = None,
    cache: Annotated[
        bool | None,
        typer.Option("--cache/--no-cache", help="Try only settings with, or without, a cache; default: both."),
    ] = None,
    pooling: PoolingOption = None,
    keep_layers: KeepLayersOption = None,
    quantization: Annotated[
        list[str],
        typer.Option(
            "--quantization",
            callback=_one_of(get_args(Quantization)),
            help="Also try adapters on a base in 4bit or 8bit; can be repeated.",
        ),
    ] = _NOT_QUANTIZED,
    epochs: EpochsOption = 3.0,
    sequences: SequencesOption = None,
    disk: Annotated[float | None, number_option(help="GiB on the disk for a cache.")] = None,
    margin: Annotated[float, number_option(help="Share of the device's memory to leave free.")] = 0.1,
    precision: PrecisionOption = "auto",
    optimizer: OptimizerOption = "adamw_fused",
    attention: AttentionOption = "sdpa",
    padding: PaddingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Recommend the setting that fits a device and trains fastest.

    Example: esm-efficient recommend --model 650M --device T4 --tokens 1024
    """
    check_epochs(epochs)
    if not 0 <= margin < 1:
        raise typer.BadParameter(f"{margin}: expected a share from 0 to below 1", param_hint="--margin")
    if disk is not None and not 0 <= disk < math.inf:
        raise typer.BadParameter(f"{disk}: expected a finite number of GiB, at least 0", param_hint="--disk")
    _check_cache(cache, quantization)
    changed = change_recipes(recipes, layers=layers, cache=None, pooling=pooling, keep_layers=keep_layers)
    changed = _with_quantized(changed, quantization)
    target = get_device(device)
    check_depth(model, layers, keep_layers)
    with quiet():
        from esm_efficient.estimation.recommend import recommend
        from esm_efficient.tasks import MAX_TOKENS

        result = recommend(
            model,
            target,
            tokens,
            batch_size=batch_size,
            recipes=changed,
            presets=presets,
            margin=margin,
            epochs=epochs,
            sequences=sequences,
            cache=cache,
            disk=None if disk is None else round(disk * GIB),
            precision=precision,
            optimizer=optimizer,
            attention=attention,
            padding=padding,
        )
    show(result, as_json)
    is_usual = optimizer == "adamw_fused" and attention == "sdpa" and padding is None
    line = _training_line(model, result.recipe, epochs, precision) if is_usual else ""
    if line and tokens > MAX_TOKENS:
        line += f" --max-tokens {tokens}"
    if line and not as_json:
        show(f"\nTrain with it: {line}", as_json)


def _training_line(model: str, recipe: Recipe, epochs: float, precision: str) -> str:
    """Return the line that trains with a setting; empty if `finetune` has no option for a part of it."""
    usual = get_recipe(recipe.name)
    if recipe.preset != usual.preset or precision == "pure-bf16":
        return ""
    words = ["esm-efficient", "finetune", "DATA", "--model", model, "--recipe", recipe.name, "--epochs", f"{epochs:g}"]
    words += ["--batch-size", str(recipe.batch_size), "--micro-batch", str(recipe.micro_batch)]
    if recipe.layers != usual.layers:
        words += ["--layers", recipe.layers if isinstance(recipe.layers, str) else ",".join(map(str, recipe.layers))]
    if recipe.cache != usual.cache:
        words.append("--cache" if recipe.cache else "--no-cache")
    if recipe.pooling != usual.pooling:
        words += ["--pooling", recipe.pooling]
    if recipe.keep_layers:
        words += ["--keep-layers", str(recipe.keep_layers)]
    if recipe.quantization:
        words += ["--quantization", recipe.quantization]
    return shlex.join(words if precision == "auto" else [*words, "--precision", precision])
