"""The commands on layers and on finished runs. Each imports torch only after its arguments are checked."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from esm_efficient.cli.commands import MaxTokensOption, app
from esm_efficient.cli.jobs import (
    AccessionOption,
    ClustersOption,
    DataArgument,
    HeaderOption,
    LabelKindOption,
    LabelOption,
    LabelsOption,
    MaxResiduesOption,
    MinResiduesOption,
    OnErrorOption,
    PartitionOption,
    SequenceOption,
    SplitOption,
    TestPartitionsOption,
    TestSizeOption,
    UnlabelledOption,
    ValidationSizeOption,
    data_options,
)
from esm_efficient.cli.output import (
    JsonOption,
    ModelOption,
    PageOption,
    VerboseOption,
    existing_file,
    quiet,
    show,
    writable_folder,
)
from esm_efficient.cli.run_files import save_page
from esm_efficient.errors import ConfigurationError
from esm_efficient.published import is_repository
from esm_efficient.tasks import LARGEST_SEED

RunArgument = Annotated[Path, typer.Argument(help="The folder that finetune wrote.", metavar="RUN")]


@app.command()
def probe(
    data: DataArgument,
    model: ModelOption = "35M",
    max_tokens: MaxTokensOption = 1024,
    token_budget: Annotated[int, typer.Option(min=16, help="The most tokens per batch.")] = 8192,
    max_labelled_residues: Annotated[
        int, typer.Option(min=2, help="With labels of residues: the most per split; more are drawn at random.")
    ] = 20_000,
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
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the split and of the draws.")] = 0,
    report: PageOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Score each layer with a linear probe, before any training.

    Example: esm-efficient probe proteins.csv --model 35M --report probe.html
    """
    existing_file(data)
    columns: dict[str, Any] = {"sequence": sequence, "accession": accession, "label": label, "label_kind": label_kind}
    columns |= {"labels": labels, "unlabelled": unlabelled, "header": header}
    sizes = {"test_size": test_size, "validation_size": validation_size, "test_partitions": test_partitions}
    bounds = {"min_residues": min_residues, "max_residues": max_residues}
    splits = {"split": split, "partition": partition, "clusters": clusters, "seed": seed}
    options = data_options(data, **columns, **bounds, **splits, **sizes, on_error=on_error)
    with quiet(verbose=verbose):
        from esm_efficient.training.given import command_words
        from esm_efficient.training.sweep import sweep_layers
        from esm_efficient.training.sweep_page import sweep_page

        result = sweep_layers(
            model,
            data,
            data_options=options,
            max_tokens=max_tokens,
            token_budget=token_budget,
            max_labelled_residues=max_labelled_residues,
            seed=seed,
        )
        words = command_words(data, options, model, max_tokens=max_tokens)
        if report is not None:
            command = shlex.join(["esm-efficient", "probe", *words])
            page = sweep_page(result, f"{Path(model).name} on {Path(data).name}", command=command)
            report.write_text(page, encoding="utf-8")
    show(result, as_json)
    if not as_json:
        show(f"\nNext, train: {shlex.join(['esm-efficient', 'finetune', *words])}", as_json)


@app.command()
def export(
    trained: RunArgument,
    folder: Annotated[Path, typer.Argument(callback=writable_folder, help="Folder to write to.", metavar="FOLDER")],
    base_model: Annotated[
        str | None, typer.Option(help="Hub name of the model that was fine-tuned; default: that of the run.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Name of the data for the card; default: the file of the run.")
    ] = None,
    description: Annotated[str, typer.Option(help="A paragraph for the card, in Markdown.")] = "",
    onnx: Annotated[bool, typer.Option("--onnx", help="Also write model.onnx, for onnxruntime.")] = False,
    push: Annotated[
        str | None,
        typer.Option("--push", metavar="OWNER/NAME", help="Upload it to this repository of the Hub."),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Let everybody read a new repository.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a trained model as a folder to deploy or to publish.

    The folder has the merged weights, the adapter, the tokenizer, the metrics and a model card.

    Example: esm-efficient export output membrane --push NAME/membrane
    """
    if push is not None and not is_repository(push):
        raise typer.BadParameter(f"{push!r}: expected the form owner/name", param_hint="--push")
    if public and push is None:
        raise typer.BadParameter("--public is of a repository: give --push OWNER/NAME too")
    if not trained.is_dir():
        raise typer.BadParameter(f"no folder at {trained}: expected the folder that finetune wrote")
    with quiet():
        from esm_efficient.training.export import export_model
        from esm_efficient.training.publishing import push_to_hub

        written = export_model(
            trained, folder, base_model=base_model, dataset=dataset, description=description, onnx=onnx
        )
        url = None if push is None else push_to_hub(written, push, private=not public)
    files = sorted(str(path.relative_to(written)) for path in written.rglob("*") if path.is_file())
    if as_json:
        show({"folder": written, "files": files, "repository": url}, as_json)
    else:
        show(f"{written}: {', '.join(files)}" + (f"\n{url}" if url else ""), as_json)


@app.command()
def report(run: RunArgument, as_json: JsonOption = False) -> None:
    """Write the report of a finished run again, and print its table.

    Example: esm-efficient report output
    """
    if not run.is_dir():
        raise typer.BadParameter(f"no folder at {run}: expected the folder that finetune wrote")
    with quiet():
        from esm_efficient.training.records import PREDICTIONS, load_result

        result = load_result(run)
        if result.evaluation is None:
            raise ConfigurationError(
                f"{run} has no {PREDICTIONS}, of which the report is made: its former report stays as it is"
            )
        save_page(result, result.result_path.parent)
    if not result.model_dir.is_dir():
        typer.echo(f"warning: the model of this run was in {result.model_dir}, which is not there any more", err=True)
    show(result, as_json)
