"""The command that compares the recipes. It imports torch only after its arguments are checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from esm_efficient.cli.commands import (
    AttentionOption,
    CacheOption,
    KeepLayersOption,
    LayersOption,
    OptimizerOption,
    PaddingOption,
    PoolingOption,
    PrecisionOption,
    RecipesOption,
    SequencesOption,
    TokensOption,
    app,
    change_recipes,
    check_depth,
    check_epochs,
    number_option,
)
from esm_efficient.cli.jobs import (
    AccessionOption,
    ClustersOption,
    HeaderOption,
    LabelKindOption,
    LabelOption,
    LabelsOption,
    MaxResiduesOption,
    MinResiduesOption,
    PartitionOption,
    SequenceOption,
    SplitOption,
    TestPartitionsOption,
    TestSizeOption,
    UnlabelledOption,
    ValidationSizeOption,
    data_options,
)
from esm_efficient.cli.output import JsonOption, ModelOption, existing_file, quiet, show, typed_line, writable_folder
from esm_efficient.costs.devices import get_device
from esm_efficient.recipes import RECIPES
from esm_efficient.tasks import LARGEST_SEED

_ALL_RECIPES = list(RECIPES)
_SEEDS = [0]


@app.command()
def compare(
    model: ModelOption = "650M",
    device: Annotated[
        str | None,
        typer.Option(help="As in estimate; default: A10G, or this machine with --data."),
    ] = None,
    tokens: TokensOption = 512,
    recipes: RecipesOption = _ALL_RECIPES,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of the first table.")] = 100,
    epochs: Annotated[float, number_option(help="Epochs of the second table.")] = 1.0,
    layers: LayersOption = None,
    cache: CacheOption = None,
    pooling: PoolingOption = None,
    keep_layers: KeepLayersOption = None,
    sequences: SequencesOption = None,
    data: Annotated[
        str | None,
        typer.Option(help='Train on this table, as finetune reads it; "demo" for the synthetic table.'),
    ] = None,
    sequence: SequenceOption = None,
    label: LabelOption = None,
    label_kind: LabelKindOption = None,
    labels: LabelsOption = None,
    unlabelled: UnlabelledOption = None,
    accession: AccessionOption = None,
    split: SplitOption = None,
    partition: PartitionOption = None,
    clusters: ClustersOption = None,
    test_size: TestSizeOption = None,
    validation_size: ValidationSizeOption = None,
    test_partitions: TestPartitionsOption = None,
    header: HeaderOption = None,
    min_residues: MinResiduesOption = None,
    max_residues: MaxResiduesOption = None,
    on_error: Annotated[
        Literal["raise", "skip"] | None, typer.Option("--on-error", help="Stop at a wrong row, or leave it out.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Train on this many proteins and test on a third as many.")
    ] = None,
    seeds: Annotated[
        list[int], typer.Option("--seed", min=0, max=LARGEST_SEED, help="Seed of a training run; can be repeated.")
    ] = _SEEDS,
    output: Annotated[
        Path | None, typer.Option(callback=writable_folder, help="Folder for the tables and the HTML page.")
    ] = None,
    precision: PrecisionOption = "auto",
    optimizer: OptimizerOption = "adamw_fused",
    attention: AttentionOption = "sdpa",
    padding: PaddingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare the recipes; with --data they are trained.

    Example: esm-efficient compare --model 8M --data deeploc --limit 300 --recipe lora --recipe frozen
    """
    read: dict[str, Any] = {"sequence": sequence, "label": label, "label_kind": label_kind, "unlabelled": unlabelled}
    read |= {"labels": labels, "accession": accession, "split": split, "partition": partition, "clusters": clusters}
    read |= {"test_size": test_size, "validation_size": validation_size, "test_partitions": test_partitions}
    read |= {"header": header, "min_residues": min_residues, "max_residues": max_residues, "on_error": on_error}
    trained: dict[str, Any] = {"limit": limit, "seed": None if seeds == _SEEDS else seeds} | read
    given = [name for name, value in trained.items() if value not in (None, [])]
    if data is None and given:
        raise typer.BadParameter(f"--{given[0].replace('_', '-')} needs --data: without a table nothing is trained")
    if data is not None and precision == "pure-bf16":
        raise typer.BadParameter(f"--precision {precision} is for estimates only: train in float32, bf16 or fp16")
    estimated: dict[str, Any] = {"--tokens": tokens != 512, "--padding": padding, "--attention": attention != "sdpa"}
    estimated |= {"--optimizer": optimizer != "adamw_fused", "--sequences": sequences}
    if data is not None and (alone := [option for option, changed in estimated.items() if changed]):
        raise typer.BadParameter(f"{alone[0]} is for estimates, and --data trains on its table, or on --limit of it")
    check_epochs(epochs)
    if data is not None:
        existing_file(data)
    changed = change_recipes(recipes, layers=layers, cache=cache, pooling=pooling, keep_layers=keep_layers)
    training_options: dict[str, Any] = {} if data is None or precision == "auto" else {"precision": precision}
    target = None if device is None else get_device(device)
    check_depth(model, layers, keep_layers)
    with quiet():
        from esm_efficient.comparison import compare
        from esm_efficient.training.given import splits_from

        splits = None if data is None else splits_from(data, **data_options(data, **read))
        result = compare(
            model,
            splits if splits is None or limit is None else _sampled(splits, limit),
            recipes=changed,
            steps=steps,
            epochs=epochs,
            seeds=seeds,
            device=target,
            each=None if output is None else lambda found: found.save(output, command=typed_line.get()),
            tokens=tokens,
            sequences=sequences,
            estimate_options={
                "precision": precision,
                "optimizer": optimizer,
                "attention": attention,
                "padding": padding,
            },
            **training_options,
        )
        if output is not None and splits is None:  # what was trained is saved already
            result.save(output, command=typed_line.get())
    show(result, as_json)


def _sampled(splits: Any, limit: int) -> Any:
    """Return this many training sequences, and a third as many of each other split."""
    from datasets import DatasetDict

    from esm_efficient.data import stratified_sample

    sizes = {name: limit if name == "train" else max(1, limit // 3) for name in splits}
    return DatasetDict({name: stratified_sample(splits[name], size) for name, size in sizes.items()})
