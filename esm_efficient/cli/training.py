"""The commands that train and evaluate. Each imports torch only after its arguments are checked."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from esm_efficient.cli.commands import (
    AttentionOption,
    CacheOption,
    DeviceOption,
    EpochsOption,
    KeepLayersOption,
    LayersOption,
    MaxTokensOption,
    OptimizerOption,
    PaddingOption,
    PoolingOption,
    PrecisionOption,
    QuantizationOption,
    RecipeOption,
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
    BudgetOption,
    ClustersOption,
    DataArgument,
    KeepOption,
    LabelKindOption,
    LabelOption,
    LabelsOption,
    MaxResiduesOption,
    MinResiduesOption,
    OnErrorOption,
    OverlapOption,
    PartitionOption,
    SequenceOption,
    SplitOption,
    TrainedArguments,
    UnlabelledOption,
    check_overlap,
    data_options,
    reading_of,
)
from esm_efficient.cli.output import (
    JsonOption,
    ModelOption,
    PageOption,
    VerboseOption,
    as_typed,
    existing_file,
    is_first_rank,
    quiet,
    show,
    typed_parameters,
    without_codes,
    writable_folder,
)
from esm_efficient.cli.run_files import RUN_FILE, WRITTEN, config_writer, line_of, save_page
from esm_efficient.costs.devices import DEFAULT_DEVICE, get_device
from esm_efficient.errors import TrainingInterrupted
from esm_efficient.recipes import RECIPES, get_recipe
from esm_efficient.tasks import LARGEST_SEED, Pooling

Weights = Literal["balanced", "none"]
_ALL_RECIPES = list(RECIPES)
_SEEDS = [0]


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take the options of a file as defaults; those of the command line win."""
    if path is None:
        return None
    import yaml

    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"{path} cannot be read as YAML: {error}") from error
    known = {parameter.name for parameter in context.command.params}
    if not isinstance(options, dict) or (unknown := sorted(set(map(str, options)) - known)):
        wrong = ", ".join(unknown) if isinstance(options, dict) else "no options"
        raise typer.BadParameter(f"{path} has {wrong}: expected names of options, such as recipe or epochs")
    for parameter in context.command.params:
        value = options.get(parameter.name)
        if getattr(parameter, "multiple", False) and value is not None and not isinstance(value, list):
            options[parameter.name] = [value]
        if parameter.name == "layers" and isinstance(value, list):
            options["layers"] = ",".join(map(str, value))
    context.default_map = {**(context.default_map or {}), **options}
    return path


@app.command()
def finetune(
    data: DataArgument,
    model: ModelOption = "35M",
    recipe: RecipeOption = "top",
    output: Annotated[
        Path, typer.Option("--output", "-o", callback=writable_folder, help="Folder for the model and the report.")
    ] = Path("output"),
    epochs: EpochsOption = 3.0,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Sequences per optimizer step; default: the recipe's.")
    ] = None,
    micro_batch: Annotated[
        int | None,
        typer.Option(min=1, help="Sequences in one forward pass: fewer need less memory; default: the recipe's."),
    ] = None,
    learning_rate: Annotated[float | None, number_option(help="Peak learning rate; default: the recipe's.")] = None,
    layers: LayersOption = None,
    cache: CacheOption = None,
    pooling: PoolingOption = None,
    quantization: QuantizationOption = None,
    keep_layers: KeepLayersOption = None,
    max_tokens: MaxTokensOption = 1024,
    class_weights: Annotated[Weights, typer.Option(help="Weigh rare classes more (balanced), or not.")] = "balanced",
    sequence: SequenceOption = None,
    label: LabelOption = None,
    label_kind: LabelKindOption = None,
    labels: LabelsOption = None,
    unlabelled: UnlabelledOption = None,
    accession: AccessionOption = None,
    split: SplitOption = None,
    partition: PartitionOption = None,
    clusters: ClustersOption = None,
    min_residues: MinResiduesOption = None,
    max_residues: MaxResiduesOption = None,
    on_error: OnErrorOption = "raise",
    early_stopping: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Stop after this number of epochs without a better result on validation, and keep the best; 0: never. "
            "Default: 3 if there is a validation split.",
        ),
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Measure a linear probe on the frozen encoder too, to compare.")
    ] = True,
    precision: Annotated[
        Literal["auto", "float32", "bf16", "fp16"], typer.Option(help="Number format of training.")
    ] = "auto",
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the split, the head and the order of the batches.")
    ] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")] = False,
    config: Annotated[
        Path | None,
        typer.Option(callback=_read_config, is_eager=True, help=f"Options in YAML, such as a former {RUN_FILE}."),
    ] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Fine-tune ESM-2 on a table, and write a model and a report.

    Example: esm-efficient finetune proteins.csv --model 35M
    """
    check_epochs(epochs)
    if learning_rate is not None and not 0 < learning_rate < math.inf:
        raise typer.BadParameter(f"--learning-rate {learning_rate}: expected more than 0 and a finite number")
    changes: dict[str, Any] = {"layers": layers, "cache": cache, "pooling": pooling, "quantization": quantization}
    changes["keep_layers"] = keep_layers
    chosen = get_recipe(recipe).replace(**{name: value for name, value in changes.items() if value is not None})
    existing_file(data)
    options = {name: value for name, value in locals().items() if name in WRITTEN and value is not None}
    given = {"batch_size": batch_size, "micro_batch": micro_batch, "learning_rate": learning_rate, "epochs": epochs}
    sizes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    with quiet(verbose=verbose), _resumable(output):
        from esm_efficient.training.checkpoints import CheckpointCallback, explain_full_disk
        from esm_efficient.training.export import write_card
        from esm_efficient.training.finetune import finetune

        result = finetune(
            model,
            data,
            recipe=chosen,
            output_dir=output,
            class_weights=None if class_weights == "none" else class_weights,
            max_tokens=max_tokens,
            data_options=_data_options(data, options),
            precision=precision,
            seed=seed,
            resume_from_checkpoint=True if resume else None,
            early_stopping="auto" if early_stopping is None else early_stopping or None,
            probe=probe,
            report=False,  # it is written below, with the line that repeats the run
            announce=lambda plan: _begin(plan, output, pooling, resume=resume),
            callbacks=[CheckpointCallback(signals=(signal.SIGINT, signal.SIGTERM)), config_writer(output, options)],
            save_strategy="epoch",
            save_total_limit=1,
            **sizes,
        )
        if is_first_rank():
            with explain_full_disk(output):
                save_page(result, output)
                write_card(result)
    show(result, as_json)


def _begin(plan: Any, output: Path, pooling: Pooling | None, *, resume: bool) -> None:
    """Say what a run will do: the data can be read, and nothing is trained or written yet.

    Raises:
        ConfigurationError: the head cannot have the pooling that was typed, which may be the recipe's own.
    """
    from esm_efficient.heads import model_class
    from esm_efficient.training.records import RESULT

    if pooling is not None:
        model_class(plan.task.head, pooling)
    if not is_first_rank():
        return
    typer.echo(f"{without_codes(as_typed(str(plan), typed_parameters.get()))}\n", err=True)
    if (output / RESULT).is_file() and not resume:
        typer.echo(
            f"warning: {output} has the model of another run, which this run will replace. To keep it, stop with "
            "Ctrl-C and give another folder with --output",
            err=True,
        )


@contextmanager
def _resumable(output: Path) -> Iterator[None]:
    """Say how to go on if a signal ends a run."""
    try:
        yield
    except TrainingInterrupted as error:
        line = line_of(output.absolute() / RUN_FILE, output.absolute())
        raise TrainingInterrupted(f"{str(error).split(':')[0]}. It is saved. Go on with: {line} --resume") from error


def _data_options(data: str, options: dict[str, Any]) -> dict[str, Any]:
    from esm_efficient.training.given import COMMAND_OPTIONS

    return data_options(data, **{name: options[name] for name in COMMAND_OPTIONS if name in options})


@app.command()
def evaluate(
    models: TrainedArguments,
    data: Annotated[str, typer.Argument(help='A file of sequences and labels; "demo", "deeploc".', metavar="DATA")],
    keep: KeepOption = None,
    overlap: OverlapOption = None,
    token_budget: BudgetOption = 8192,
    sequence: SequenceOption = None,
    label: LabelOption = None,
    label_kind: LabelKindOption = None,
    labels: LabelsOption = None,
    unlabelled: UnlabelledOption = None,
    accession: AccessionOption = None,
    on_error: OnErrorOption = "raise",
    report: PageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a trained model on all sequences of another table.

    Several models are adapters of one base model; the mean of their predictions is measured. Of demo and deeploc, only
    the test split is used.

    Example: esm-efficient evaluate output/adapter other.csv --report evaluation.html
    """
    existing_file(data)
    check_overlap(keep, overlap)
    columns = {"sequence": sequence, "label": label, "label_kind": label_kind, "accession": accession}
    given = data_options(data, **columns, labels=labels, unlabelled=unlabelled, on_error=on_error)
    with quiet():
        from esm_efficient.training.evaluation import evaluate_in_full
        from esm_efficient.training.given import NAMED_TABLES, splits_from
        from esm_efficient.training.outcome import evaluation_page

        if data in NAMED_TABLES:
            splits = splits_from(data, **given)
        else:
            splits = splits_from({"test": data}, split=False, partition=False, **given)
        reading = reading_of(keep, overlap)
        result = evaluate_in_full(models, splits["test"], keep=reading, token_budget=token_budget, on_error=on_error)
        if report is not None:
            report.write_text(evaluation_page(result, models=models, dataset=data), encoding="utf-8")
    show(result, as_json)


@app.command()
def compare(
    model: ModelOption = "650M",
    device: DeviceOption = DEFAULT_DEVICE,
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
    split: SplitOption = None,
    partition: PartitionOption = None,
    clusters: ClustersOption = None,
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
    read |= {"labels": labels, "split": split, "partition": partition, "clusters": clusters}
    read |= {"min_residues": min_residues, "max_residues": max_residues, "on_error": on_error}
    given = [name for name, value in ({"limit": limit} | read).items() if value not in (None, [])]
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
    target = get_device(device)
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
        if output is not None:
            result.save(output)
    show(result, as_json)


def _sampled(splits: Any, limit: int) -> Any:
    """Return this many training sequences, and a third as many of each other split."""
    from datasets import DatasetDict

    from esm_efficient.data import stratified_sample

    sizes = {name: limit if name == "train" else max(1, limit // 3) for name in splits}
    return DatasetDict({name: stratified_sample(splits[name], size) for name, size in sizes.items()})
