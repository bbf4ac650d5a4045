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
from esm_efficient.encoder.plan import plan_as
from esm_efficient.errors import ConfigurationError
from esm_efficient.estimation.kernels import Kernels, packed_attention
from esm_efficient.estimation.optimizers import OPTIMIZERS
from esm_efficient.estimation.quantized import QuantizedLinear, quantize
from esm_efficient.estimation.segments import Recorder, Simulation
from esm_efficient.estimation.step import Attention, Padding, Step, thawed
from esm_efficient.heads import model_class
from esm_efficient.recipes import Precision
from esm_efficient.tasks import SPECIAL_TOKENS, Head, set_pooling
from esm_efficient.trunk.split import split_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


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
        model, skipped = _build(config, step, layers)
        stack.enter_context(_torch.fake_tensor_mode())
        _make_fake(model)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = _optimizer_in_mid_run(trainable, step)
        recorder = Recorder(step.device)
        _assign_categories(recorder.tracker, model, trainable, optimizer)
        recorder.watch(model)
        _use_kernels(stack, step)
        with recorder.tracker:
            _train(model, trainable, optimizer, step, recorder)
        times = {"forward": step.recipe.accumulation, "backward": step.recipe.accumulation, "optimizer": 1}
        return Simulation(
            tuple(replace(segment, cost=segment.cost * times[segment.phase]) for segment in recorder.segments),
            sum(p.numel() for p in trainable),
            _count(model) + skipped,
        )


def simulate_trunk(config: PreTrainedConfig, step: Step, *, layers: int, whole: bool) -> Simulation:
    """Simulate one forward pass of a trunk, as `cache_states` computes states.

    The batch has `micro_batch` sequences of `Step.recipe`, and `Step.tokens` tokens in each.

    Args:
        config: the model's config.
        step: batch, precision and device.
        layers: layers of the trunk.
        whole: whether no layer is above the trunk, which then has the last layer norm.
    """
    _check(step)
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        with torch.device("meta"):
            above = 0 if whole else 1
            trunk, _ = split_model(_make_model(config, step, layers + above), above)
            trunk.to(step.frozen_dtype)
        stack.enter_context(_torch.fake_tensor_mode())
        _make_fake(trunk)
        recorder = Recorder(step.device)
        recorder.tracker.hold(model_tensors(trunk), "weights")
        recorder.watch(trunk.esm)
        _use_kernels(stack, step)
        with recorder.tracker, _autocast(step):
            ids = torch.zeros((step.recipe.micro_batch, step.tokens), dtype=torch.int64)
            mask = None if step.padding == "padding-free" else torch.ones_like(ids)
            recorder.begin("forward", "embeddings")
            trunk(ids, mask).to(step.frozen_dtype)
            recorder.end()
        return Simulation(tuple(recorder.segments), 0, _count(trunk))


def _count(model: nn.Module) -> int:
    """Count parameters; a quantised weight counts as what it stands for."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    hidden = sum(layer.shape.numel() - layer.weight.numel() for layer in layers)
    return hidden + sum(parameter.numel() for parameter in model.parameters())


def _use_kernels(stack: ExitStack, step: Step) -> None:
    """Run the kernels of the step's device."""
    backend = step.device.backend
    stack.enter_context(compat.attention_masks(step.padding == "padded"))
    stack.enter_context(Kernels(backend))
    stack.enter_context(plan_as(backend))
    if backend != "cpu":
        stack.enter_context(use_attention(packed_attention if backend == "cuda" else attend_by_length))


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
    if step.num_labels < 1:
        raise ConfigurationError(f"num_labels={step.num_labels}: expected at least 1 label")
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


def _make_model(config: PreTrainedConfig, step: Step, layers: int) -> Any:
    """Return the model with its lowest layers."""
    changed = type(config).from_dict(config.to_dict() | {"num_labels": step.num_labels})
    set_pooling(changed, step.recipe.pooling)
    kind = model_class(step.head, step.recipe.pooling)
    model = kind.from_config(changed, attn_implementation=step.attention, dtype=torch.float32)
    # Only layers are deleted: the size of other parts, such as the contact head, may depend on their number.
    suffix = find_architecture(model).layers
    for path, module in model.named_modules():
        if ends_with(path, suffix):
            del cast(nn.ModuleList, module)[layers:]
    return model


def _build(config: PreTrainedConfig, step: Step, layers: int) -> tuple[nn.Module, int]:
    """Return the model, prepared to train, and the parameters that it lacks because their results are cached.

    The model is on the meta device: modules cannot change the dtype of fake parameters.
    """
    recipe, skipped = step.recipe, 0
    with torch.device("meta"):
        model = _make_model(config, step, layers)
        if recipe.cache:
            whole = _count(model)
            _, model = split_model(model, layers - min(recipe.trained_layers(layers), default=layers))
            skipped = whole - _count(model)
        if recipe.quantization:
            quantize(model, recipe.quantization, step.frozen_dtype)
        model = prepare_model(
            model,
            adapters=recipe_adapters(recipe, model, **thawed(step.adapter_options)),
            head_only=recipe.trains == "head",
            layers=recipe.layers,
            gradient_checkpointing=recipe.gradient_checkpointing,
            dtype=None if step.precision == "pure-bf16" else step.frozen_dtype,
        )
        if step.padding == "padding-free":
            apply_lean_encoder(model, fused=step.fused)
    return (model.bfloat16() if step.precision == "pure-bf16" else model).train(), skipped


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
    batch = _batch(step, model)
    recorder.begin("forward", "embeddings")
    with _autocast(step):
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


def _autocast(step: Step) -> torch.autocast:
    half = step.precision != "float32"
    return torch.autocast("cpu", step.frozen_dtype if half else None, enabled=half)


def _batch(step: Step, model: Any) -> dict[str, Tensor]:
    shape = step.recipe.micro_batch, step.tokens
    labels = torch.zeros(shape[:1] if step.head == "sequence-classification" else shape, dtype=torch.int64)
    mask = {"attention_mask": torch.ones(shape, dtype=torch.int64)}
    if step.padding == "padding-free":  # it is simulated with sequences of equal length
        mask = {}
    if not step.recipe.cache:
        return {"input_ids": torch.zeros(shape, dtype=torch.int64), **mask, "labels": labels}
    pooling = step.cached_states(model.config)
    if pooling != "tokens":
        # The mean stands between two special tokens, as if the protein had one residue (`StatesCollator`).
        shape = shape[0], 1 if pooling == "first" else SPECIAL_TOKENS + 1
        mask = {} if pooling == "first" or not mask else {"attention_mask": torch.ones(shape, dtype=torch.int64)}
    states = torch.zeros(*shape, model.config.hidden_size, dtype=step.frozen_dtype)
    return {"inputs_embeds": states, **mask, "labels": labels}


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
