"""The commands that train and evaluate. Each imports torch only after its arguments are checked."""

from __future__ import annotations

import math
import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from esm_efficient.cli.commands import (
    CacheOption,
    EpochsOption,
    KeepLayersOption,
    LayersOption,
    MaxTokensOption,
    PoolingOption,
    QuantizationOption,
    RecipeOption,
    app,
    check_depth,
    check_epochs,
    number_option,
)
from esm_efficient.cli.jobs import (
    AccessionOption,
    BudgetOption,
    ClustersOption,
    DataArgument,
    HeaderOption,
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
    TestPartitionsOption,
    TestSizeOption,
    TrainedArguments,
    UnlabelledOption,
    ValidationSizeOption,
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
    typed_line,
    typed_parameters,
    without_codes,
    writable_folder,
)
from esm_efficient.cli.run_files import RUN_FILE, WRITTEN, config_writer, line_of, save_page
from esm_efficient.data.loading import COMMAND_OPTIONS
from esm_efficient.errors import TrainingInterrupted, nearest
from esm_efficient.recipes import get_recipe
from esm_efficient.tasks import LARGEST_SEED, Pooling

Weights = Literal["balanced", "none"]


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take the options of a file as defaults; those of the command line win."""
    if path is None:
        return None
    import yaml

    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"{path} cannot be read as YAML: {error}") from error
    expected = "names of options, such as recipe or epochs"
    if not isinstance(options, dict):
        raise typer.BadParameter(f"{path} has no options: expected {expected}")
    options = {str(name).replace("-", "_"): value for name, value in options.items()}  # as they are typed
    known = {parameter.name for parameter in context.command.params if parameter.name}
    if unknown := sorted(set(options) - known):
        raise typer.BadParameter(f"{path} has {', '.join(unknown)}{nearest(unknown[0], known, expected)}")
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
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of the LoRA adapters; default: the recipe's.")] = None,
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
    test_size: TestSizeOption = None,
    validation_size: ValidationSizeOption = None,
    test_partitions: TestPartitionsOption = None,
    header: HeaderOption = None,
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
    profile: Annotated[
        bool, typer.Option("--profile", help="Measure memory over a step, and time by phase, for the report.")
    ] = False,
    report_to: Annotated[
        list[str] | None,
        typer.Option("--report-to", help="Tracker of transformers, such as tensorboard or wandb; can be repeated."),
    ] = None,
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
    if rank is not None and chosen.trains != "adapters":
        raise typer.BadParameter(f"recipe {recipe} has no adapters", param_hint="--rank")
    existing_file(data)
    options = {name: value for name, value in locals().items() if name in WRITTEN and value is not None}
    reading = _data_options(data, options)
    check_depth(model, layers, keep_layers)
    given: dict[str, Any] = {"batch_size": batch_size, "micro_batch": micro_batch, "learning_rate": learning_rate}
    given |= {"epochs": epochs, "report_to": report_to or None}
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
            data_options=reading,
            adapter_options=None if rank is None else {"r": rank},
            profile=profile,
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
    if not as_json:
        predict = shlex.join(["esm-efficient", "predict", str(result.model_dir), "FILE"])
        export = shlex.join(["esm-efficient", "export", str(output), "FOLDER"])
        show(f"\nNext, predict: {predict}\nFor transformers' pipeline, ONNX or the Hub: {export}", as_json)


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
    min_residues: MinResiduesOption = None,
    max_residues: MaxResiduesOption = None,
    on_error: OnErrorOption = "raise",
    report: PageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a trained model on all sequences of another table.

    Several models are adapters of one base model; the mean of their predictions is measured. Labels are read as those
    of the model. Of demo and deeploc, only the test split is used.

    Example: esm-efficient evaluate output/adapter other.csv --report evaluation.html
    """
    existing_file(data)
    check_overlap(keep, overlap)
    columns = {"sequence": sequence, "label": label, "label_kind": label_kind, "accession": accession}
    bounds = {"min_residues": min_residues, "max_residues": max_residues}
    given = data_options(data, **columns, **bounds, labels=labels, unlabelled=unlabelled)
    with quiet():
        from esm_efficient.training.evaluation import evaluate_in_full
        from esm_efficient.training.outcome import WarningList, evaluation_page

        with WarningList() as warned:
            result = evaluate_in_full(
                models,
                data,
                data_options=given,
                keep=reading_of(keep, overlap),
                token_budget=token_budget,
                on_error=on_error,
            )
        if report is not None:
            said = [as_typed(text, typed_parameters.get()) for text in warned.messages]
            page = evaluation_page(result, models=models, dataset=data, command=typed_line.get(), warnings=said)
            report.write_text(page, encoding="utf-8")
    show(result, as_json)
