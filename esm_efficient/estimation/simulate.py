"""Take one optimizer step of training under fake tensors: every operation runs, no number is computed.

Fake tensors have shapes and dtypes only, so that a step of the largest model takes a second and no memory. The bytes in
use at each moment are counted from the operations, so nothing here depends on formulas of a model's sizes. The step is
cut into segments: one per encoder layer in the forward and in the backward pass, and the parts around the layers.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esm_efficient import _torch, compat
from esm_efficient.adapters.prepare import prepare_model
from esm_efficient.adapters.registry import ends_with, find_architecture
from esm_efficient.adapters.resolve import recipe_adapters
from esm_efficient.costs.allocations import AllocationTracker, model_tensors, tensors_in
from esm_efficient.encoder import apply_lean_encoder
from esm_efficient.encoder.attention import attend_by_length, use_attention
from esm_efficient.errors import ConfigurationError
from esm_efficient.estimation.kernels import Kernels, packed_attention
from esm_efficient.estimation.optimizers import OPTIMIZERS
from esm_efficient.estimation.segments import Recorder, Simulation
from esm_efficient.estimation.step import Attention, Padding, Step
from esm_efficient.recipes import Precision
from esm_efficient.tasks import Head, auto_class

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16, "pure-bf16": torch.bfloat16}
"""The dtype of autocast by precision; no autocast in float32."""


def simulate(config: PreTrainedConfig, step: Step, *, layers: int) -> Simulation:
    """Simulate one optimizer step of a model with its first encoder layers; return the segments in the order of time.

    The step is one in the middle of a run: the optimizer has its state, and under gradient accumulation the gradients
    of earlier micro-batches exist. One micro-batch is run, and its costs are multiplied by the number of micro-batches
    in `Step.recipe`.

    Raises:
        ConfigurationError: the options contradict each other or the device.
        TargetModuleError: the adapters do not fit the model.
    """
    _check(step)
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        model = _build(config, step, layers)
        stack.enter_context(_torch.fake_tensor_mode())
        _make_fake(model)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = _optimizer_in_mid_run(trainable, step)
        recorder = Recorder(step.device)
        tracker = recorder.tracker
        _assign_categories(tracker, model, trainable, optimizer)
        recorder.watch(model)

        stack.enter_context(compat.attention_masks(step.padding == "padded"))
        stack.enter_context(Kernels(step.device.backend))
        if step.device.backend != "cpu":
            stack.enter_context(use_attention(packed_attention if step.device.backend == "cuda" else attend_by_length))
        with tracker:
            _train(model, trainable, optimizer, step, recorder)
        times = {"forward": step.recipe.accumulation, "backward": step.recipe.accumulation, "optimizer": 1}
        return Simulation(
            tuple(replace(segment, cost=segment.cost * times[segment.phase]) for segment in recorder.segments),
            sum(p.numel() for p in trainable),
            sum(p.numel() for p in model.parameters()),
        )


def _check(step: Step) -> None:
    choices = {
        "precision": [name for name in get_args(Precision) if name != "auto"],
        "optimizer": OPTIMIZERS,
        "attention": get_args(Attention),
        "padding": get_args(Padding),
        "head": get_args(Head),
    }
    for name, known in choices.items():
        value = getattr(step, name)
        if value not in known:
            raise ConfigurationError(f"{name}={value!r}: expected one of {', '.join(known)}")
    if step.tokens < 1:
        raise ConfigurationError(f"tokens={step.tokens}: expected at least 1 token per sequence")
    if step.padding == "padding-free" and step.attention != "sdpa":
        raise ConfigurationError(
            f"attention={step.attention!r} needs padding='padded' or 'equal-length': the lean encoder computes "
            "attention itself"
        )
    dtype = {"float32": "float32", "fp16": "float16"}.get(step.precision, "bfloat16")
    supported = step.device.flops_per_second
    if supported and dtype not in supported:
        names = " or ".join(repr({"float16": "fp16"}.get(name, name)) for name in supported)
        raise ConfigurationError(
            f"precision={step.precision!r}: the device cannot multiply {dtype} matrices. Use precision={names}"
        )


def _build(config: PreTrainedConfig, step: Step, layers: int) -> nn.Module:
    """Return the model, prepared to train, on the meta device: modules cannot change the dtype of fake parameters."""
    changed = type(config).from_dict(config.to_dict() | {"num_labels": step.num_labels})
    recipe = step.recipe
    frozen_dtype = None if step.precision in ("float32", "pure-bf16") else _HALF[step.precision]
    with torch.device("meta"):
        model = auto_class(step.head).from_config(changed, attn_implementation=step.attention, dtype=torch.float32)
        # Only layers are deleted: the size of other parts, such as the contact head, may depend on their number.
        suffix = find_architecture(model).layers
        for path, module in model.named_modules():
            if ends_with(path, suffix):
                del cast(nn.ModuleList, module)[layers:]
        model = prepare_model(
            model,
            adapters=recipe_adapters(recipe, model, **dict(step.adapter_options)),
            head_only=recipe.trains == "head",
            layers=recipe.layers,
            gradient_checkpointing=recipe.gradient_checkpointing,
            dtype=frozen_dtype,
        )
        if step.padding == "padding-free":
            apply_lean_encoder(model)
    return (model.bfloat16() if step.precision == "pure-bf16" else model).train()


def _make_fake(model: nn.Module) -> None:
    """Replace a model's parameters and buffers by fake tensors on the CPU."""
    fake: dict[int, Tensor] = {}  # by the id of the tensor that is replaced, so that shared ones stay shared
    for module in model.modules():
        parameters = module.named_parameters(recurse=False, remove_duplicate=False)
        buffers = module.named_buffers(recurse=False, remove_duplicate=False)
        for name, old in [*parameters, *buffers]:
            if id(old) not in fake:
                new = torch.empty(old.shape, dtype=old.dtype)
                fake[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
            setattr(module, name, fake[id(old)])


def _optimizer_in_mid_run(trainable: list[nn.Parameter], step: Step) -> Any:
    """Return an optimizer that has its state; the gradients stay if the step accumulates them."""
    optimizer = OPTIMIZERS[step.optimizer](trainable)
    for parameter in trainable:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    if step.recipe.accumulation == 1:
        optimizer.zero_grad()
    return optimizer


def _assign_categories(
    tracker: AllocationTracker, model: nn.Module, trainable: list[nn.Parameter], optimizer: Any
) -> None:
    """Count weights, gradients and optimizer state under their own categories."""
    tracker.hold(model_tensors(model), "weights")
    tracker.hold((p.grad for p in trainable), "gradients")
    tracker.hold(tensors_in(optimizer.state), "optimizer")
    for parameter in trainable:
        parameter.register_post_accumulate_grad_hook(lambda p: tracker.hold([p.grad], "gradients"))


def _train(model: nn.Module, trainable: list[nn.Parameter], optimizer: Any, step: Step, recorder: Recorder) -> None:
    """Run one micro-batch and the optimizer's step, as Trainer does."""
    batch = _batch(step)
    recorder.begin("forward", "embeddings")
    dtype = _HALF.get(step.precision)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    loss = F.cross_entropy(logits.float().flatten(0, -2), batch["labels"].flatten())
    del logits
    recorder.begin("backward", "head")
    _torch.run_backward(loss)
    del loss
    recorder.begin("optimizer", "step")
    nn.utils.clip_grad_norm_(trainable, 1.0, foreach=step.device.backend == "cuda")
    optimizer.step()
    recorder.end()


def _batch(step: Step) -> dict[str, Tensor]:
    shape = step.recipe.micro_batch, step.tokens
    batch = {"input_ids": torch.zeros(shape, dtype=torch.int64)}
    if step.padding != "padding-free":  # a padding-free batch is simulated with sequences of equal length
        batch["attention_mask"] = torch.ones(shape, dtype=torch.int64)
    labels = shape[:1] if step.head == "sequence-classification" else shape
    return batch | {"labels": torch.zeros(labels, dtype=torch.int64)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence loggers and deprecation warnings: the simulated model is not the user's."""
    loggers = [logging.getLogger(name) for name in ("transformers.modeling_layers", "esm_efficient")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
