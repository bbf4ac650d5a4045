"""The only place that asks which version of a library is installed, or uses a private name of one.

The libraries are transformers, accelerate, peft and datasets; torch's private names are in `esm_efficient._torch`. Each
docstring says what breaks without the function, and a test fails when a release drops what it uses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import Tensor, nn
    from transformers import PreTrainedModel, Trainer, TrainingArguments


# --- training ---


def checkpointing_arguments(enabled: bool, *, use_reentrant: bool = False) -> dict[str, Any]:
    """Keyword arguments of ``TrainingArguments`` that switch gradient checkpointing on or off.

    transformers 5.23 renames ``gradient_checkpointing`` to ``activation_checkpointing``.
    """
    from transformers import TrainingArguments

    prefix = "activation" if "activation_checkpointing" in TrainingArguments.__dataclass_fields__ else "gradient"
    arguments: dict[str, Any] = {f"{prefix}_checkpointing": enabled}
    if enabled:
        arguments[f"{prefix}_checkpointing_kwargs"] = {"use_reentrant": use_reentrant}
    return arguments


def installed_names(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of ``TrainingArguments`` with checkpointing under the name that the installed transformers takes.

    Under both names at once the older one would be dropped without a word.
    """
    new, old = checkpointing_arguments(False).keys(), ("gradient_checkpointing", "activation_checkpointing")
    name = next(iter(new))
    renamed = {alias + suffix: name + suffix for alias in old for suffix in ("", "_kwargs")}
    return {renamed.get(key, key): value for key, value in options.items()}


def asks_for_checkpointing(args: TrainingArguments) -> bool:
    """Whether training arguments switch gradient checkpointing on, under either name."""
    return bool(getattr(args, "activation_checkpointing", None) or getattr(args, "gradient_checkpointing", None))


def enable_checkpointing(model: PreTrainedModel, *, use_reentrant: bool = False) -> None:
    """Switch gradient checkpointing on for a transformers model (not a wrapper of one)."""
    options = {"use_reentrant": use_reentrant}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def declare_loss_normalised(trainer: Trainer) -> None:
    """Tell a Trainer that its loss is already divided by the whole accumulated batch.

    From transformers 5.20 there is an attribute for it. Before, the Trainer divides by the accumulation steps unless
    the model is said to accept loss arguments.
    """
    from transformers import Trainer

    if hasattr(Trainer, "loss_is_scaled_for_ga"):
        trainer.loss_is_scaled_for_ga = True
    else:
        trainer.model_accepts_loss_kwargs = True


def leave_division_to_trainer(accelerator: Accelerator) -> None:
    """Keep accelerate from dividing a loss by the accumulation steps.

    Trainer does that itself, or does not because its loss is normalised. transformers 5.3 nevertheless tells
    accelerate the number of steps, so that under accumulation every gradient is too small by that factor.
    """
    accelerator.gradient_accumulation_steps = 1


def save_under_own_names(model: PreTrainedModel) -> None:
    """Make ``save_pretrained`` write a model's weights under the names that its modules have.

    transformers 5 writes the weights of an ESM model that was built from a config, or loaded from a file with such
    names, as LayerNorm's legacy ``gamma`` and ``beta``. ``from_pretrained`` reads them; resuming a Trainer does not,
    and goes on with the LayerNorms that the model had, with no more than a warning.
    """
    conversions: Any = []
    model._weight_conversions = conversions


def tied_weights(model: nn.Module) -> tuple[str, ...]:
    """Names of the weights that a checkpoint may leave out because they are another weight too."""
    return tuple(getattr(model, "_tied_weights_keys", None) or ())


# --- estimation ---


@contextmanager
def attention_masks(padded: bool) -> Iterator[None]:
    """Decide for a ``with`` block whether transformers makes an attention mask.

    transformers leaves the mask out of a batch without padding, and looks at the tokens to find that out. Fake tensors
    have no values, so without this function a simulated step would fail there.

    Args:
        padded: whether the batch has padding, and therefore a mask.
    """
    from transformers import masking_utils

    name = "_ignore_bidirectional_mask_sdpa"
    original = getattr(masking_utils, name)
    setattr(masking_utils, name, lambda *args, **kwargs: not padded)
    try:
        yield
    finally:
        setattr(masking_utils, name, original)


def attention_implementation(config: Any) -> str:
    """Return the attention implementation that a model's config names, ``"sdpa"`` if it names none.

    transformers has a public setter only. Without the private name, the advice after an out-of-memory error would be
    for sdpa even if the model runs eager attention.
    """
    return getattr(config, "_attn_implementation", None) or "sdpa"


def is_checkpointing(model: Any) -> bool:
    """Return whether gradient checkpointing is on in a transformers model (not a wrapper of one).

    transformers 5.23 renames ``is_gradient_checkpointing`` to ``is_activation_checkpointing``; the old name warns.
    """
    new = getattr(model, "is_activation_checkpointing", None)
    return bool(getattr(model, "is_gradient_checkpointing", False) if new is None else new)


# --- encoder ---


def rotary_table(
    esm: Any, position_ids: Tensor | None, states: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """Cosine and sine of the angles of an ``EsmModel``'s positions, or None if its positions are not rotary.

    transformers 5.23 computes them once for the model, by position ids if they are given; before, every layer computes
    its own, by column.

    Args:
        esm: the model.
        position_ids: what it was called with.
        states: hidden states of shape (rows, columns, width).
        dtype: wanted.

    Returns:
        Two tensors of shape (1 or rows, columns, head width).
    """
    import torch

    columns = torch.arange(states.shape[1], device=states.device)[None]
    own = getattr(esm.encoder.layer[0].attention.self, "rotary_embeddings", None)
    if own is not None:
        angles = columns[..., None].to(own.inv_freq.dtype) * own.inv_freq
        angles = torch.cat((angles, angles), -1)
        return angles.cos().to(dtype), angles.sin().to(dtype)
    shared = getattr(esm, "rotary_embeddings", None)
    if shared is None:
        return None
    return shared(states.new_empty(0, dtype=dtype), columns if position_ids is None else position_ids)


def reads_first_token(model: nn.Module) -> bool:
    """Whether a model is a sequence classifier whose head reads the first token and nothing else."""
    from transformers import EsmForSequenceClassification
    from transformers.models.esm.modeling_esm import EsmClassificationHead

    if not isinstance(model, EsmForSequenceClassification):
        return False
    head = getattr(model.classifier, "modules_to_save", None)
    heads = [model.classifier] if head is None else list(head.values())
    if any("forward" in module.__dict__ for module in (model, *heads)):
        return False
    known = EsmForSequenceClassification.forward, EsmClassificationHead.forward
    return type(model).forward is known[0] and all(type(h).forward is known[1] for h in heads)


def has_flex_attention() -> bool:
    """Whether torch's flex attention can be trained with under torch.compile; that of torch 2.6 cannot."""
    import torch

    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (2, 7)


# --- adapters ---


# --- profiling ---


# --- data and inference ---
