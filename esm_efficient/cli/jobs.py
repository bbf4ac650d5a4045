"""The commands that read sequences. Each imports torch only after its arguments are checked."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from esm_efficient.cli.commands import AdapterLayersOption, Preset, app, number_option
from esm_efficient.cli.output import (
    JsonOption,
    ModelArgument,
    existing_file,
    known_trained_model,
    notes_of_data,
    quiet,
    show,
)
from esm_efficient.data.label_kinds import LabelKind
from esm_efficient.errors import ConfigurationError, EsmEfficientError
from esm_efficient.reporting.files import written_as
from esm_efficient.tasks import LARGEST_SEED

SourceArgument = Annotated[
    str,
    typer.Argument(
        help='A CSV, TSV, Excel, Parquet, JSON lines or FASTA file; "demo"; - for standard input.', metavar="FILE"
    ),
]
DataArgument = Annotated[
    str,
    typer.Argument(
        help='A CSV, TSV, Excel, Parquet, JSON lines or FASTA file; "demo" for a synthetic table, "deeploc" to '
        "download DeepLoc-2.0.",
        metavar="DATA",
    ),
]


def _known_models(names: Any) -> list[str]:  # with Python 3.10, typer cannot read list[str] here
    return [known_trained_model(name) for name in names]


TrainedArguments = Annotated[
    list[str],
    typer.Argument(
        callback=_known_models,
        help="A folder of finetune or export, or a Hub name; several adapters are an ensemble.",
        metavar="MODEL...",
    ),
]
KeepOption = Annotated[
    Literal["start", "end", "both", "windows"] | None,
    typer.Option("--keep", help="What to read of sequences that are too long: a part, or all in windows that overlap."),
]
OverlapOption = Annotated[
    int | None,
    typer.Option("--overlap", min=0, help="Residues that two windows share at least; default: a fourth of a window."),
]
BudgetOption = Annotated[
    int,
    typer.Option(
        "--token-budget", min=16, help="The most tokens per batch, or those of the longest sequence if it has more."
    ),
]
SequenceOption = Annotated[str | None, typer.Option("--sequence", metavar="COLUMN", help="Column of the sequences.")]
AccessionOption = Annotated[str | None, typer.Option("--accession", metavar="COLUMN", help="Column of the accessions.")]
LabelOption = Annotated[
    list[str] | None,
    typer.Option("--label", metavar="COLUMN", help="Column of the labels; repeat it for several columns of 0 and 1."),
]
LabelsOption = Annotated[
    Path | None,
    typer.Option(
        "--labels",
        exists=True,
        dir_okay=False,
        metavar="FILE",
        help="A table with the labels of DATA, or a FASTA file of labels of residues, joined by accession.",
    ),
]
UnlabelledOption = Annotated[
    str | None,
    typer.Option("--unlabelled", help='Letter of residues without a label, such as "-"; "" if each letter is a class.'),
]
LabelKindOption = Annotated[
    LabelKind | None, typer.Option("--label-kind", help="What the labels are, where their cells do not tell.")
]
MinResiduesOption = Annotated[int | None, typer.Option("--min-residues", min=1, help="Leave shorter sequences out.")]
MaxResiduesOption = Annotated[int | None, typer.Option("--max-residues", min=1, help="Leave longer sequences out.")]
OnErrorOption = Annotated[
    Literal["raise", "skip"], typer.Option("--on-error", help="Stop at a wrong row, or leave it out and count it.")
]
TestSizeOption = Annotated[
    float | None, number_option("--test-size", help="Share of the rows to test on, without partitions; default: 0.2.")
]
ValidationSizeOption = Annotated[
    float | None, number_option("--validation-size", help="Share of the rows to validate on, likewise; default: 0.1.")
]
TestPartitionsOption = Annotated[
    list[int] | None, typer.Option("--test-partition", help="Partition to test on; can be repeated.")
]
HeaderOption = Annotated[
    str | None,
    typer.Option("--header", metavar="REGEX", help="Expression for FASTA headers, whose named groups are columns."),
]


def _column_or_none(text: str | None) -> str | bool | None:
    return False if text in ("none", "False") else text  # a file of options may have false


def _clusters(text: str | None) -> Path | bool | None:
    found = _column_or_none(text)
    if isinstance(found, str) and not Path(found).is_file():
        raise typer.BadParameter(f"File {text!r} does not exist: expected clusters of MMseqs2 or CD-HIT, or none")
    return Path(found) if isinstance(found, str) else found


ClustersOption = Annotated[
    str | None,
    typer.Option(
        "--clusters",
        metavar="FILE",
        callback=_clusters,
        help="Clusters of MMseqs2 or CD-HIT, each in one split; none: do not run MMseqs2, which does it if installed.",
    ),
]
SplitOption = Annotated[
    str | None,
    typer.Option(
        "--split",
        metavar="COLUMN",
        callback=_column_or_none,
        help="Column of train, validation and test, if its name is unusual; none: the table has none.",
    ),
]
PartitionOption = Annotated[
    str | None,
    typer.Option(
        "--partition",
        metavar="COLUMN",
        callback=_column_or_none,
        help="Column of homology partitions or folds, by number; none: the table has none.",
    ),
]


def _shard(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d*/[1-9]\d*", text) or int(text.split("/")[0]) > int(text.split("/")[1]):
        raise typer.BadParameter(f"{text!r}: expected a part and the number of parts, such as 2/5")
    return text


ShardOption = Annotated[
    str, typer.Option("--shard", callback=_shard, help="Part of the sequences, such as 2/5 for the second of five.")
]


def _output(path: Path) -> Path:
    try:
        written_as(path)
    except ConfigurationError as error:
        raise typer.BadParameter(str(error)) from error
    return path


OutputOption = Annotated[
    Path, typer.Option("--output", "-o", callback=_output, help="File that ends with .csv, .jsonl or .parquet.")
]


PrecisionOption = Annotated[
    Literal["auto", "float32", "bf16", "fp16"],
    typer.Option("--precision", help="Number format; auto is float32 on a CPU, and what a GPU multiplies fastest."),
]


@app.command()
def predict(
    models: TrainedArguments,
    source: SourceArgument,
    output: OutputOption = Path("predictions.csv"),
    keep: KeepOption = None,
    overlap: OverlapOption = None,
    token_budget: BudgetOption = 8192,
    shard: ShardOption = "1/1",
    sequence: SequenceOption = None,
    accession: AccessionOption = None,
    precision: PrecisionOption = "auto",
    on_error: OnErrorOption = "raise",
    as_json: JsonOption = False,
) -> None:
    """Predict from a file of sequences, with one model or several.

    Several models are adapters of one base model; the prediction is the mean of theirs.

    Example: esm-efficient predict output/adapter proteome.fasta -o predictions.parquet
    """
    check_overlap(keep, overlap)
    existing_file(source, ("demo", "-"))
    with _file(source) as path, quiet():
        from esm_efficient.inference.predictions import predict_file

        result = predict_file(
            models,
            path,
            output,
            keep=reading_of(keep, overlap),
            token_budget=token_budget,
            shard=_numbers(shard),
            sequence=sequence,
            accession=accession,
            precision=precision,
            on_error=on_error,
        )
    show(result, as_json)


@app.command()
def embed(
    model: ModelArgument,
    source: SourceArgument,
    output: OutputOption = Path("embeddings.parquet"),
    layer: Annotated[
        int | None, typer.Option(min=0, help="Layer, from 0 for the token embeddings; default: the last.")
    ] = None,
    pooling: Annotated[
        Literal["mean", "first", "residues"], typer.Option(help="mean over residues, first token, or all residues.")
    ] = "mean",
    keep: KeepOption = None,
    overlap: OverlapOption = None,
    token_budget: BudgetOption = 8192,
    shard: ShardOption = "1/1",
    sequence: SequenceOption = None,
    accession: AccessionOption = None,
    precision: PrecisionOption = "auto",
    on_error: OnErrorOption = "raise",
    as_json: JsonOption = False,
) -> None:
    """Compute embeddings of a file of sequences.

    Example: esm-efficient embed 650M proteome.fasta --layer 20 -o embeddings.parquet
    """
    if pooling == "residues" and output.suffix == ".csv":
        raise typer.BadParameter("--pooling residues does not fit into CSV: give --output with .parquet or .jsonl")
    check_overlap(keep, overlap)
    existing_file(source, ("demo", "-"))
    with _file(source) as path, quiet():
        from esm_efficient.inference.embedder import embed_file
        from esm_efficient.published import hub_name

        result = embed_file(
            hub_name(model),
            path,
            output,
            layer=layer,
            pooling=pooling,
            keep=reading_of(keep, overlap),
            token_budget=token_budget,
            shard=_numbers(shard),
            sequence=sequence,
            accession=accession,
            precision=precision,
            on_error=on_error,
        )
    show(result, as_json)


@app.command()
def data(
    source: DataArgument,
    sequence: SequenceOption = None,
    accession: AccessionOption = None,
    label: LabelOption = None,
    label_kind: LabelKindOption = None,
    labels: LabelsOption = None,
    unlabelled: UnlabelledOption = None,
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
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the split.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Describe a table as finetune reads it: the first thing to do.

    It shows what each column was read as, what was left out, splits, labels, lengths, repeated sequences, and relatives
    of training sequences in the test set.

    Example: esm-efficient data proteins.csv --label binds
    """
    existing_file(source)
    columns: dict[str, Any] = {"sequence": sequence, "accession": accession, "label": label, "label_kind": label_kind}
    columns |= {"labels": labels, "unlabelled": unlabelled, "header": header}
    sizes = {"test_size": test_size, "validation_size": validation_size, "test_partitions": test_partitions}
    bounds = {"min_residues": min_residues, "max_residues": max_residues}
    splits = {"split": split, "partition": partition, "clusters": clusters, "seed": seed}
    options = data_options(source, **columns, **bounds, **splits, **sizes, on_error=on_error)
    with quiet(), notes_of_data() as notes:
        from esm_efficient.reporting.description import describe
        from esm_efficient.training.given import splits_from

        result = describe(splits_from(source, labelled=False, **options))
    show({**result.to_dict(), "notes": notes} if as_json else "\n".join([*notes, str(result)]), as_json)


@app.command()
def targets(
    model: ModelArgument,
    preset: Annotated[Preset, typer.Option(help="Kinds of layers that get adapters.")] = "all-linear",
    layers: AdapterLayersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show which layers get adapters; no weights are loaded.

    Example: esm-efficient targets 650M --preset qkv --layers top-1/3
    """
    with quiet():
        from esm_efficient.estimation.targets import describe_targets

        result = describe_targets(model, preset=preset, layers=layers or "all")
    show(result, as_json)


def data_options(source: str, **options: Any) -> dict[str, Any]:
    """Return the options of `load_sequences` that were given; one label column is its name, and several are a list.

    Args:
        source: a file; or a named table, which has no wrong rows, so that ``on_error`` is left out.
        **options: the options; None or an empty list if an option was not given.
    """
    given = {name: value for name, value in options.items() if value is not None and value != []}
    for name in ("test_size", "validation_size"):
        if not 0 <= given.get(name, 0) < 1:
            hint = f"--{name.replace('_', '-')}"
            raise typer.BadParameter(f"{given[name]}: expected a share from 0 to below 1", param_hint=hint)
    if isinstance(given.get("label"), list) and len(given["label"]) == 1:
        given["label"] = given["label"][0]
    if source in ("demo", "deeploc"):
        given.pop("on_error", None)
    return given


def check_overlap(keep: str | None, overlap: int | None) -> None:
    """Refuse an overlap without windows.

    Raises:
        BadParameter: there are no windows.
    """
    if overlap is not None and keep != "windows":
        raise typer.BadParameter("--overlap is that of windows: give --keep windows too")


def reading_of(keep: Any, overlap: int | None) -> Any:
    """Return what to read of long sequences, as `Predictor.predict` takes it; this imports torch."""
    from esm_efficient.inference.windows import Windows

    return Windows(overlap) if keep == "windows" else keep


def _numbers(shard: str) -> tuple[int, int]:
    part, parts = shard.split("/")
    return int(part), int(parts)


@contextmanager
def _file(source: str) -> Iterator[str | Path]:
    """Give the path of a source; standard input is written to a file first, because it is read twice."""
    if source not in ("demo", "-"):
        yield source
        return
    with tempfile.TemporaryDirectory() as folder:
        if source == "demo":
            from esm_efficient.demo import write_demo_table

            yield write_demo_table(Path(folder) / "demo.csv")
            return
        path = Path(folder) / "standard input"
        with path.open("wb") as handle:
            shutil.copyfileobj(sys.stdin.buffer, handle)
        try:
            yield path
        except EsmEfficientError as error:
            raise type(error)(str(error).replace(f"{folder}{os.sep}", "")) from error
