"""Several adapters of one base model that predict together, and the mean of what they predict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from esm_efficient.data.encoding import longest_input
from esm_efficient.errors import ConfigurationError, listing
from esm_efficient.inference import foreign
from esm_efficient.inference.loading import LOAD_ERRORS, SavedAdapter, build_adapted, load_tokenizer, read_adapter
from esm_efficient.tasks import Task, head_of_config, pooling_of, task_of_model

_NAME = "member{:03d}"


class Ensemble(NamedTuple):
    """Adapters on one base model.

    Attributes:
        model: a model of peft with all adapters; one at a time is active.
        tokenizer: the tokenizer of the member that reads the fewest tokens.
        members: the names of the adapters, in the order in which they were given.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    members: tuple[str, ...]


def load_ensemble(
    names_or_paths: Sequence[str | Path], *, revision: str | None, cache_dir: str | Path | None, task: Task | None
) -> Ensemble:
    """Load several adapters into one base model, which is in memory once; see `Predictor.load`.

    With several labels per sequence, the threshold of a label is the mean of the members' thresholds.

    Raises:
        ConfigurationError: a member is not an adapter, is there twice, or has another base model, task or head than the
            first; or as `load_model`.
    """
    if files := [str(name) for name in names_or_paths if Path(name).is_file()]:
        raise ConfigurationError(f"{listing(files)}: a file, where the folder of a model was expected")
    saved = [read_adapter(name, revision=revision, cache_dir=cache_dir, task=task) for name in names_or_paths]
    for member in saved:
        _check_alone(member)
    for index, member in enumerate(saved):
        _check_same(saved[0], member)
        if any(member.folder.resolve() == other.folder.resolve() for other in saved[:index]):
            raise ConfigurationError(f"{member.folder} is given twice: expected different members of an ensemble")
    members = tuple(map(_NAME.format, range(1, len(saved) + 1)))
    model = build_adapted(saved[0], name=members[0])
    for name, member in zip(members[1:], saved[1:], strict=True):
        try:
            # With a config that is there already, peft does not read the one in the folder.
            model.add_adapter(name, member.adapter)
            model.load_adapter(str(member.folder), name)
        except LOAD_ERRORS as error:
            raise ConfigurationError(
                f"the adapter {member.folder} cannot share its base model with {saved[0].folder}: {str(error)[:500]}"
            ) from error
    found = task_of_model(model)
    if found.kind == "multi_label_classification":
        tuned = np.mean([foreign.label_thresholds(member.config, found.names) for member in saved], axis=0)
        model.config.label_thresholds = dict(zip(found.names, tuned.tolist(), strict=True))
    return Ensemble(model, min(map(load_tokenizer, saved), key=longest_input), members)


def _check_alone(member: SavedAdapter) -> None:
    """Refuse an adapter that changes the weights of the base model, which other adapters read too."""
    kind = member.adapter.init_lora_weights
    if kind in foreign.KEPT_INITIALISATIONS or member.adapter.bias != "none":
        what = f"init_lora_weights={kind!r}" if member.adapter.bias == "none" else f"bias={member.adapter.bias!r}"
        raise ConfigurationError(
            f"the adapter {member.folder} has {what}, which changes weights of the base model: members of an ensemble "
            "must leave it as it is"
        )


def _check_same(first: SavedAdapter, member: SavedAdapter) -> None:
    """Refuse a member that does not fit the first.

    Raises:
        ConfigurationError: it has another base model, task, label names or head.
    """
    for what, describe in (("base model", _base_of), ("task", _task_of), ("head", _head_of)):
        one, other = describe(first), describe(member)
        if one != other:
            mine, its = _differing(one, other)
            raise ConfigurationError(
                f"the members of an ensemble must have the same {what}: {first.folder} has {mine}, and {member.folder} "
                f"has {its}"
            )


def _differing(one: Sequence[str], other: Sequence[str]) -> tuple[str, str]:
    """Return both descriptions, with as many of their parts as show the first one that differs."""
    first = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    shown = [[*parts[:1], *parts[max(1, first - 2) : first + 3]] for parts in (one, other)]
    return ", ".join(shown[0]), ", ".join(shown[1])


def _base_of(saved: SavedAdapter) -> list[str]:
    return [str(saved.base.resolve())]


def _task_of(saved: SavedAdapter) -> list[str]:
    """Return the kind of the task and the names of its labels, with their numbers."""
    config = saved.config
    names = [f"{index} {config.id2label[index]}" for index in range(config.num_labels)]
    return [str(config.problem_type or head_of_config(config)), *names]


def _head_of(saved: SavedAdapter) -> list[str]:
    """Return what the head reads, and the names of the weights that are trained as a whole."""
    whole = sorted(name for name in saved.shapes if ".lora_" not in name)
    return [f"pooling={pooling_of(saved.config)!r} on {saved.config.num_hidden_layers} layers", *whole]


def compute_members(model: Any, members: Sequence[str], compute: Callable[..., torch.Tensor], **inputs: Any) -> Any:
    """Return what each adapter computes from one batch, with the members as the last axis.

    Afterwards the adapter that was active is active again, and the same parameters train as before.

    Args:
        model: a model of peft with these adapters.
        members: their names; none for the model as it is, which is then the only member.
        compute: what is computed with the model.
        **inputs: its arguments.
    """
    if not members:
        return compute(**inputs).unsqueeze(-1)
    # peft makes the adapter that it activates trainable, and the others not.
    active, flags = model.active_adapter, {parameter: parameter.requires_grad for parameter in model.parameters()}
    found = []
    try:
        for name in members:
            model.set_adapter(name)
            found.append(compute(**inputs))
    finally:
        model.set_adapter(active)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
    return torch.stack(found, -1)


def joint_logits(logits: np.ndarray, kind: str) -> np.ndarray:
    """Return the logits of the mean of probabilities, or the mean of numbers.

    Args:
        logits: those of the members, of shape (members, ..., labels).
        kind: the kind of the task.

    Returns:
        float64 of shape (..., labels).

    Example:
        >>> found = joint_logits(np.log([[[0.2, 0.8]], [[0.6, 0.4]]]), "single_label_classification")
        >>> np.exp(found).round(6).tolist()
        [[0.4, 0.6]]
    """
    from scipy.special import log_expit, log_softmax, logsumexp

    if kind == "regression":
        return logits.mean(axis=0)
    if kind == "multi_label_classification":
        return logsumexp(log_expit(logits), axis=0) - logsumexp(log_expit(-logits), axis=0)
    return logsumexp(log_softmax(logits, axis=-1), axis=0) - np.log(len(logits))
