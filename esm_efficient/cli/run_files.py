"""The file with the options of a run, and the line that repeats the run."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esm_efficient.cli.commands import command_group
from esm_efficient.cli.output import as_typed

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from esm_efficient.training.result import FinetuneResult

RUN_FILE = "run.yaml"
"""The file in the output folder with the options of a run."""

WRITTEN = (
    *("data", "model", "recipe", "epochs", "batch_size", "micro_batch", "learning_rate", "layers", "cache", "pooling"),
    *("quantization", "keep_layers", "max_tokens", "class_weights", "sequence", "label", "label_kind", "labels"),
    *("unlabelled", "accession", "split", "partition", "clusters", "min_residues", "max_residues", "on_error"),
    *("test_size", "validation_size", "test_partitions", "header", "rank", "profile", "report_to"),
    *("early_stopping", "probe", "precision", "seed"),
)
"""The options of a run that its file has."""


def config_writer(output: Path, options: dict[str, Any]) -> TrainerCallback:
    """Return a callback that writes the options when training begins; until then the folder has those of its model."""
    from transformers import TrainerCallback

    class ConfigWriter(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                output.mkdir(parents=True, exist_ok=True)
                _write_config(output / RUN_FILE, options)

    return ConfigWriter()


def repeating_line(run: Path) -> str | None:
    """Return the line that repeats a run, from any folder, into a new folder beside it.

    Args:
        run: the folder of the run.

    Returns:
        The line; None if the run was not started by a command, or its file of options was changed to name no data.
    """
    import yaml

    file = run.absolute() / RUN_FILE
    options = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
    if not isinstance(options, dict) or "data" not in options:
        return None
    return line_of(file, run.absolute().with_name(f"{run.absolute().name}-again"))


def save_page(result: FinetuneResult, run: Path) -> None:
    """Write the page of a run; if a command started it, with the line that repeats it and options as they are typed."""
    command = repeating_line(run)
    if command is not None:
        parameters = command_group().commands["finetune"].params
        result = dataclasses.replace(result, warnings=tuple(as_typed(text, parameters) for text in result.warnings))
    result.save_page(command=command)


def line_of(file: Path, output: Path) -> str:
    """Return the line that runs a file of options into an output folder."""
    import yaml

    data = yaml.safe_load(file.read_text(encoding="utf-8"))["data"]
    return shlex.join(["esm-efficient", "finetune", "--config", str(file), data, "-o", str(output)])


def _write_config(path: Path, options: dict[str, Any]) -> None:
    """Write options as YAML; paths are whole, so that the file can be used from any folder."""
    import yaml

    plain = {name: str(value.absolute()) if isinstance(value, Path) else value for name, value in options.items()}
    given = [name for name in ("data", "model", "clusters") if isinstance(plain.get(name), str)]
    places = {name: str(Path(plain[name]).absolute()) for name in given if Path(plain[name]).exists()}
    if isinstance(plain.get("layers"), tuple):
        plain["layers"] = ",".join(map(str, plain["layers"]))
    path.write_text(yaml.safe_dump(plain | places, sort_keys=False), encoding="utf-8")
