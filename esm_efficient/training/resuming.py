"""Resume a run from a whole checkpoint of the same run, or say why not."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list

from esm_efficient.data.schema import WEIGHT_COLUMN
from esm_efficient.errors import CheckpointError, ConfigurationError, EsmEfficientError, listing
from esm_efficient.training.checkpoints import (
    CheckpointCallback,
    find_faults,
    numbered_checkpoints,
    read_manifest,
)

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import nn
    from transformers import Trainer, TrainingArguments

    from esm_efficient.training.stopping import EarlyStopping

logger = logging.getLogger(__name__)

_OPTIONS = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "optim", "optim_args",
    "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "label_smoothing_factor", "seed", "data_seed",
    "train_sampling_strategy", "neftune_noise_alpha",
)  # fmt: skip
"""Options of `TrainingArguments` that make another run of a run."""

_ROWS, _ELEMENTS = 2_000, 1_024
"""The numbers of sequences, and of elements of a frozen parameter, that are compared. Of labels, all are."""


def start_run(trainer: Trainer, resume_from_checkpoint: str | Path | bool | None) -> str | None:
    """Return the checkpoint from which a Trainer's run resumes, and let its callback describe the run.

    A damaged checkpoint is replaced by the newest whole one before it, with a warning: the result is the same.

    Args:
        trainer: the Trainer, before it trains.
        resume_from_checkpoint: as `transformers.Trainer.train`; True for the newest whole checkpoint.

    Returns:
        The checkpoint's folder for `transformers.Trainer.train`; None to start from the beginning.

    Raises:
        CheckpointError: no checkpoint is whole.
        ConfigurationError: the checkpoint belongs to a run with other labels, sequences, weights or options.
    """
    callbacks = [c for c in trainer.callback_handler.callbacks if isinstance(c, CheckpointCallback)]
    decision: list[Any] = [None, None]
    # One rank decides for all: each would read all files.
    if trainer.accelerator.is_main_process:
        try:
            path = _choose(trainer, resume_from_checkpoint)
            manifest = (None if path is None else read_manifest(path)) or {}
            run = describe_run(trainer) if callbacks or manifest.get("run") else None
            if path is not None and run is not None and manifest.get("run"):
                _compare_runs(run, manifest["run"], path)
            for callback in callbacks:
                callback.run = run
            decision[0] = None if path is None else str(path)
        except (EsmEfficientError, OSError) as error:  # the other ranks wait for the decision
            decision[1] = error
    broadcast_object_list(decision)
    if decision[1] is not None:
        raise decision[1]
    return decision[0]


def refuse_finished(folder: Path, args: TrainingArguments, stopping: EarlyStopping) -> None:
    """Refuse to resume a run whose newest checkpoint is that of its last step, or one that early stopping ended.

    Args:
        folder: the folder of the checkpoints of a run that has written its result.
        args: the options of training.
        stopping: when the run ends early.

    Raises:
        ConfigurationError: as above.
    """
    newest = next(iter(numbered_checkpoints(folder)), None)
    if newest is None or find_faults(newest, needs_optimizer=False):
        return  # `start_run` says so, or finds another checkpoint
    state = json.loads((newest / "trainer_state.json").read_text(encoding="utf-8"))
    done, planned = state["global_step"], state["max_steps"]
    if stopping.has_ended(state):
        raise ConfigurationError(
            f"the run in {folder} is finished: early stopping ended it after step {done:,}. Train without "
            "resume_from_checkpoint=True to repeat it, or with a larger early_stopping= to go on"
        )
    if args.max_steps > 0:
        planned = max(args.max_steps, planned)
    elif args.num_train_epochs > state["num_train_epochs"]:
        return
    if done >= planned:
        raise ConfigurationError(
            f"the run in {folder} is finished ({done:,} of {planned:,} steps): nothing to resume. Train without "
            "resume_from_checkpoint=True to repeat it, or with more epochs to go on"
        )


def describe_run(trainer: Any) -> dict[str, Any]:
    """Return what a run's result depends on, ready for JSON: options, labels, sequences, weights.

    The labels, the first tokens and the frozen weights are hashed. The hash of a frozen parameter is of some of its
    elements in bfloat16, so that it is the same whatever the precision.
    """
    args = trainer.args
    options = {name: value for name, value in args.to_dict().items() if name in _OPTIONS}
    class_weights = getattr(trainer, "class_weights", None)
    run = {
        **options,
        "class_weights": None if class_weights is None else np.asarray(class_weights).tolist(),
        "focal_gamma": getattr(trainer, "_focal_gamma", None),
        "token_budget": getattr(trainer, "token_budget", None),
        "max_steps": args.max_steps,
        "num_train_epochs": args.num_train_epochs,
        "batch_size": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        **_describe_data(trainer.train_dataset),
        **_describe_model(trainer.model),
    }
    if args.load_best_model_at_end:
        run |= {"metric_for_best_model": args.metric_for_best_model, "greater_is_better": args.greater_is_better}
        if not isinstance(trainer.eval_dataset, Mapping):
            known = _describe_data(trainer.eval_dataset)
            run |= {f"{name}_of_validation": value for name, value in known.items() if name in ("rows", "the_labels")}
    if trainer.optimizer is not None:
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # out of accelerate's wrapper
        run["optimizer"] = f"{type(optimizer).__name__} with {optimizer.defaults}"
    written: dict[str, Any] = json.loads(json.dumps(run, default=str))
    return written


def _choose(trainer: Any, resume: str | Path | bool | None) -> Path | None:
    """Return the checkpoint to resume from, or the newest whole one before it."""
    if resume is None or resume is False:
        return None
    if resume is True:
        candidates = numbered_checkpoints(trainer.args.output_dir or ".")
        if not candidates:
            raise CheckpointError(
                f"No valid checkpoint found in output directory ({trainer.args.output_dir}): it has no folder "
                "checkpoint-<step>. Start without resume_from_checkpoint=True"
            )
    else:
        given = Path(resume)
        if not given.is_dir():
            raise CheckpointError(f"Can't find a valid checkpoint at {given}: there is no such folder")
        siblings = numbered_checkpoints(given.parent)
        resolved = [path.resolve() for path in siblings]
        candidates = [given, *(siblings[resolved.index(given.resolve()) + 1 :] if given.resolve() in resolved else [])]
    has_own_format = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled  # of the optimizer's state
    faults: list[str] = []
    for path in candidates:
        found = find_faults(path, needs_optimizer=not has_own_format)
        if not found:
            if faults:
                logger.warning("%s: training resumes from %s", "; ".join(faults), path)
            return path
        faults.append(f"{path} is incomplete or damaged ({listing(found)})")
    raise CheckpointError(
        f"{'; '.join(faults)}. No whole checkpoint is left to resume from: start without resume_from_checkpoint=True"
    )


def _compare_runs(now: dict[str, Any], then: dict[str, Any], path: Path) -> None:
    """Raise if a checkpoint is of another run; warn if the run's length or batch changes."""
    common = [name for name in now if name in then and now[name] != then[name]]
    lengths = [name for name in common if name in ("max_steps", "num_train_epochs")]
    # What differs first, and what follows from it last: balanced weights differ with the labels.
    common.sort(key=lambda name: (name == "class_weights", not _is_hash(now[name])))
    changes = [_describe_change(name, then[name], now[name]) for name in common]
    shorter = [name for name in lengths if 0 < now[name] < then[name]]
    if shorter or set(common) - {"batch_size", *lengths}:
        raise ConfigurationError(
            f"{path} belongs to another run: {'; '.join(changes)}. Give the same data and options to resume that run, "
            "or, to start a new one, another folder with output_dir= and no resume_from_checkpoint=True"
        )
    if changes:
        logger.warning("%s was written by a run of another length or batch: %s", path, "; ".join(changes))


def _describe_change(name: str, then: Any, now: Any) -> str:
    return f"{name.replace('_', ' ')} differ" if _is_hash(now) else f"{name} was {then} and is {now}"


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64


def _describe_data(dataset: Any) -> dict[str, Any]:
    """Return the number of rows, and hashes of the columns of a `datasets.Dataset`; nothing of a stream."""
    import datasets

    if dataset is None or not hasattr(dataset, "__len__"):
        return {}
    described: dict[str, Any] = {"rows": len(dataset)}
    if not isinstance(dataset, datasets.Dataset):
        return described  # reading its rows may change the state of the random generators
    table = dataset.with_format("arrow")
    some = table.select(range(0, len(table), max(1, len(table) // _ROWS)))
    for name, columns, rows in (
        ("the_labels", ("labels", "label"), table),
        ("the_weights_of_the_sequences", (WEIGHT_COLUMN,), table),
        ("the_sequences", ("input_ids", "sequence"), some),
    ):
        for column in [column for column in columns if column in table.column_names][:1]:
            digest = hashlib.sha256()
            for block in rows.select_columns(column).iter(10_000):
                _update(digest, block[column].combine_chunks())
            described[name] = digest.hexdigest()
    return described


def _update(digest: Any, array: pa.Array) -> None:
    """Hash the values of an Arrow array, whatever its offsets."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(array, pa.ChunkedArray):
        for chunk in array.chunks:
            _update(digest, chunk)
    elif pa.types.is_struct(array.type):
        for field in array.flatten():
            _update(digest, field)
    elif pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        _update(digest, pc.list_value_length(array))
        _update(digest, array.flatten())
    elif pa.types.is_integer(array.type) or pa.types.is_floating(array.type):
        digest.update(array.is_null().to_numpy(zero_copy_only=False).tobytes())
        digest.update(pc.fill_null(array, 0).to_numpy(zero_copy_only=False).tobytes())
    else:
        digest.update(repr(array.to_pylist()).encode())


def _describe_model(model: nn.Module) -> dict[str, Any]:
    """Return the adapters' options, and hashes of the trainable parameters' shapes and of the frozen weights."""
    trainable, frozen, frozen_names = hashlib.sha256(), hashlib.sha256(), 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            trainable.update(f"{name} {tuple(parameter.shape)}\n".encode())
        elif not (parameter.is_meta or hasattr(parameter, "device_mesh") or ".original_module." in name):
            # peft keeps the head as it was before training, and never computes with it.
            frozen_names += 1
            flat = parameter.detach().reshape(-1)
            some = flat[:: max(1, flat.numel() // _ELEMENTS)].to(torch.bfloat16).float().cpu()
            frozen.update(name.encode() + some.numpy().tobytes())
    described: dict[str, Any] = {"the_trainable_parameters": trainable.hexdigest()}
    if frozen_names:
        described["the_frozen_weights"] = frozen.hexdigest()
    configs = getattr(model, "peft_config", None)
    if isinstance(configs, Mapping):
        # The base model's path may change, and its weights are hashed.
        unused = {"base_model_name_or_path", "inference_mode", "revision", "auto_mapping", "peft_version"}
        described["adapters"] = {
            name: {
                key: sorted(map(str, value)) if isinstance(value, (set, list, tuple)) else value
                for key, value in config.to_dict().items()
                if key not in unused and value is not None
            }
            for name, config in configs.items()
        }
    return described
