"""The only place that asks which version of a library is installed, or uses a private name of one.

The libraries are transformers, accelerate, peft and datasets; torch's private names are in `esm_efficient._torch`. Each
docstring says what breaks without the function, and a test fails when a release drops what it uses.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import Tensor, nn
    from transformers import PreTrainedModel, Trainer, TrainingArguments


# --- training ---


def checkpointing_arguments(enabled: bool, *, use_reentrant: bool = False) -> dict[str, Any]:
    """Return the keyword arguments of ``TrainingArguments`` that switch gradient checkpointing on or off.

    transformers 5.23 renames ``gradient_checkpointing`` to ``activation_checkpointing``.
    """
    from transformers import TrainingArguments

    prefix = "activation" if "activation_checkpointing" in TrainingArguments.__dataclass_fields__ else "gradient"
    arguments: dict[str, Any] = {f"{prefix}_checkpointing": enabled}
    if enabled:
        arguments[f"{prefix}_checkpointing_kwargs"] = {"use_reentrant": use_reentrant}
    return arguments


def installed_names(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of ``TrainingArguments`` with checkpointing under the name that the installed transformers takes.

    If both names were given, transformers would ignore the older one without a message.
    """
    new, old = checkpointing_arguments(False).keys(), ("gradient_checkpointing", "activation_checkpointing")
    name = next(iter(new))
    renamed = {alias + suffix: name + suffix for alias in old for suffix in ("", "_kwargs")}
    return {renamed.get(key, key): value for key, value in options.items()}


def asks_for_checkpointing(args: TrainingArguments) -> bool:
    """Return whether training arguments switch gradient checkpointing on, under either name."""
    return bool(getattr(args, "activation_checkpointing", None) or getattr(args, "gradient_checkpointing", None))


def divides_loss(trainer: Trainer, num_items_in_batch: Any) -> bool:
    """Return whether a Trainer divides the loss of a micro-batch by the accumulation steps.

    Without it, a loss that is already divided by the weight of the accumulated batch would be divided once more.
    transformers 5.20 and later have an attribute for this.

    Args:
        trainer: the trainer.
        num_items_in_batch: the number of items of the accumulated batch, as `Trainer.get_batch_samples` returns it.
    """
    from transformers import Trainer

    declared = getattr(trainer, "loss_is_scaled_for_ga", None) if hasattr(Trainer, "loss_is_scaled_for_ga") else None
    if declared is not None:
        return not declared
    return trainer.compute_loss_func is None and not (
        trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
    )


def has_own_loss_function(model: nn.Module) -> bool:
    """Return whether the user gave a transformers model a ``loss_function``, or its class defines one.

    Without the private name of what the setter stores, the user's loss would be replaced by a weighted cross-entropy.
    """
    from transformers import PreTrainedModel

    defined: Any = getattr(type(model), "loss_function", None)
    return hasattr(model, "_loss_function") or defined not in (None, PreTrainedModel.loss_function)


def leave_division_to_trainer(accelerator: Accelerator) -> None:
    """Keep accelerate from dividing a loss by the accumulation steps.

    The Trainer divides the loss itself, or leaves it because it is normalised. transformers 5.3 nevertheless passes the
    number of steps to accelerate; without this function every accumulated gradient is too small by that factor.
    """
    accelerator.gradient_accumulation_steps = 1


def tied_weights(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the weights that a checkpoint may lack because they are tied to another weight.

    Without them, resuming a model with tied weights would fail as if its checkpoint were incomplete.
    """
    return tuple(getattr(model, "_tied_weights_keys", None) or ())


def keep_column(trainer: Trainer, column: str) -> None:
    """Make a Trainer pass a dataset column to the batches although the model's forward does not take it.

    Without it, the Trainer drops the column as unused, and the weights of the sequences have no effect.
    """
    trainer._set_signature_columns_if_needed()
    columns: Any = trainer
    if column not in columns._signature_columns:
        columns._signature_columns = [*columns._signature_columns, column]


def without_unused_columns(trainer: Trainer, dataset: Any, collate: Any) -> tuple[Any, Any]:
    """Return a training dataset and a collator that drop the columns which the model's forward does not take.

    `Trainer.get_train_dataloader` does the same. Without it, a data loader of our own would collate strings and
    pass them to the model.
    """
    import datasets

    if isinstance(dataset, datasets.Dataset):
        return trainer._remove_unused_columns(dataset, description="training"), collate
    return dataset, trainer._get_collator_with_removed_columns(collate, description="training")


def check_loaded_weights(trainer: Trainer, check: Callable[[Sequence[str]], None]) -> None:
    """Call a function with the names of the weights that a checkpoint lacks, before a Trainer warns of them.

    Without it, training resumes from an incomplete checkpoint with no more than a warning.
    """
    warn = trainer._issue_warnings_after_load

    def check_and_warn(load_result: Any) -> None:
        check(load_result.missing_keys)
        warn(load_result)

    replaced: Any = trainer
    replaced._issue_warnings_after_load = check_and_warn


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

ATTENTION_MASKS_METHOD = "_create_attention_masks"
"""The method of ``EsmModel`` that makes attention masks.

Without replacing it, the lean encoder would still make a mask of rows x columns x columns, which it does not use.
"""


REPLACED_METHODS = ("forward", "__call__", "feed_forward_chunk", ATTENTION_MASKS_METHOD, "_update_cos_sin_tables")
"""Methods of transformers' ESM-2 modules that the lean encoder stands in for.

Without the private ones, a subclass that changes them would compute what transformers' own class does.
"""


class _NoCheckpointing:
    """Calls a layer directly, in place of the checkpointing function that it replaces."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def __call__(self, function: Any, *args: Any) -> Any:
        return function(*args)


def bypass_checkpointing(layers: Iterable[Any]) -> None:
    """Keep transformers from checkpointing layers that recompute themselves.

    Without it these layers would be computed a third time.
    """
    for layer in layers:
        function = getattr(layer, "_gradient_checkpointing_func", None)
        if function is not None and not isinstance(function, _NoCheckpointing):
            layer._gradient_checkpointing_func = _NoCheckpointing(function)


def restore_checkpointing(layers: Iterable[Any]) -> None:
    """Undo `bypass_checkpointing`; without it a plain forward pass would keep every activation."""
    for layer in layers:
        function = getattr(layer, "_gradient_checkpointing_func", None)
        if isinstance(function, _NoCheckpointing):
            layer._gradient_checkpointing_func = function.original


def lora_extension(layer: Any, adapter: str) -> str:
    """Name what an adapter of peft's ``lora.Linear`` adds to LoRA's original form; empty if it adds nothing.

    peft moves these options from ``use_dora`` to ``lora_variant``. Without this check DoRA would run as plain LoRA.
    """
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    if variant is not None:
        return type(variant).__name__
    if getattr(layer, "use_dora", {}).get(adapter):
        return "DoRA"
    if layer.fan_in_fan_out or getattr(layer, "lora_bias", {}).get(adapter):
        return "LoRA with a bias or transposed weights"
    return ""


def rotary_modules(esm: Any, attentions: Iterable[Any]) -> list[tuple[Any, type]]:
    """Return the modules that compute rotary angles, and the class that transformers has for them.

    transformers 5.23 has one in the model, not in each self-attention, and renames the class. Without it, a module of
    a user's own would be ignored.
    """
    from transformers.models.esm import modeling_esm

    cls = getattr(modeling_esm, "EsmRotaryEmbedding", None) or vars(modeling_esm)["RotaryEmbedding"]
    owners = [esm] if hasattr(esm, "rotary_embeddings") else attentions
    modules = [getattr(owner, "rotary_embeddings", None) for owner in owners]
    return [(module, cls) for module in modules if module is not None]


def rotary_table(
    esm: Any, position_ids: Tensor | None, states: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """Return cosine and sine of the rotary angles of an ``EsmModel``, or None if its positions are not rotary.

    transformers 5.23 computes them once per model, from position ids if they are given. Before 5.23, every layer
    computes its own, from column numbers.

    Args:
        esm: the model.
        position_ids: the position ids that the model was called with.
        states: hidden states of shape (rows, columns, width).
        dtype: dtype of the result.

    Returns:
        Two tensors of shape (1 or rows, columns, head width).
    """
    import torch

    columns = torch.arange(states.shape[1], device=states.device)[None]
    modules = (getattr(module, "rotary_embeddings", None) for module in esm.encoder.layer.modules())
    per_layer = next((rotary for rotary in modules if rotary is not None), None)
    if per_layer is not None:
        angles = columns[..., None].to(per_layer.inv_freq.dtype) * per_layer.inv_freq
        angles = torch.cat((angles, angles), -1)
        return angles.cos().to(dtype), angles.sin().to(dtype)
    shared = getattr(esm, "rotary_embeddings", None)
    if shared is None:
        return None
    return shared(states.new_empty(0, dtype=dtype), columns if position_ids is None else position_ids)


def forget_renaming(model: PreTrainedModel, target: str) -> None:
    """Drop the renamings to names that contain `target` from those that ``save_pretrained`` undoes.

    A model that was loaded with a ``key_mapping`` is saved with its reverse. Without this function, a model loaded with
    a pattern is saved under the text of that pattern, which nothing reads.
    """
    conversions: Any = getattr(model, "_weight_conversions", None) or []
    kept: Any = [entry for entry in conversions if not any(target in name for name in entry.target_patterns)]
    model._weight_conversions = kept


def rotates_per_layer() -> bool:
    """Return whether every attention layer has rotary frequencies of its own, as before transformers 5.23.

    Since 5.23 the model has them. Without it, weights of a later version would be loaded without their frequencies.
    """
    from transformers import EsmModel

    return not hasattr(EsmModel, "load_hook")


# --- adapters ---


def enable_checkpointing(model: PreTrainedModel, *, use_reentrant: bool = False) -> None:
    """Switch gradient checkpointing on for a transformers model (not for a wrapper of one)."""
    options = {"use_reentrant": use_reentrant}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def require_input_gradients(model: PreTrainedModel) -> None:
    """Make the embeddings' output require a gradient, once.

    Without it, reentrant checkpointing over frozen embeddings computes no gradient for any adapter. The private name
    is the hook that is registered already; a second one could not be removed again.
    """
    if getattr(model, "_require_grads_hook", None) is None:
        model.enable_input_require_grads()


# --- profiling ---

GUARDED_METHODS = ("_run_epoch", "_evaluate", "_finalize_training")
"""Methods of Trainer that ``train()`` calls after ``on_train_begin``. Without them, a callback would not see errors."""


def running_trainer() -> Trainer | None:
    """Return the Trainer that is calling a callback now, or None if there is none.

    transformers passes a callback no Trainer. Without it, a callback could not log figures, so that no tracker would
    get them. The Trainer is found on the call stack, as the innermost ``self`` that is one.
    """
    from transformers import Trainer

    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer):
            return owner
        frame = frame.f_back
    return None


def guard_training(trainer: Trainer, guard: Callable[[], AbstractContextManager[Any]]) -> Callable[[], None]:
    """Run everything that ``trainer.train()`` calls after ``on_train_begin`` in a context manager.

    transformers tells callbacks of no error. Without it, a run that fails would leave hooks on the model.

    Args:
        trainer: the Trainer in training.
        guard: makes the context manager; it is called once per call of a guarded method, also of nested ones.

    Returns:
        A function that takes the guards off.
    """
    owners: list[tuple[Any, str]] = [(trainer, name) for name in GUARDED_METHODS]
    owners.append((trainer.callback_handler, "on_epoch_begin"))
    # Several callbacks may guard one trainer: the methods are wrapped once, and run in all guards that are left.
    guards: list[Callable[[], AbstractContextManager[Any]]] = vars(trainer).setdefault("_training_guards", [])

    def guarded(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            with ExitStack() as stack:
                for enter in list(guards):
                    stack.enter_context(enter())
                return method(*args, **kwargs)

        return call

    def restore() -> None:
        if guard not in guards:
            return
        guards.remove(guard)
        if guards:
            return
        for (owner, name), own in vars(trainer).pop("_unguarded").items():
            if own is not None:
                setattr(owner, name, own)
            elif name in vars(owner):
                delattr(owner, name)

    if not guards:
        vars(trainer)["_unguarded"] = {(owner, name): vars(owner).get(name) for owner, name in owners}
        for owner, name in owners:
            setattr(owner, name, guarded(getattr(owner, name)))
    guards.append(guard)
    return restore
