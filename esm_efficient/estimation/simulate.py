"""One optimizer step of training under fake tensors: every operation runs, no number is computed.

Fake tensors carry shapes and dtypes only, so that a step of the largest model takes a second and no memory. What a
step holds at each moment is counted from its operations, so nothing here knows a model's sizes. The step is cut into
segments: one for each encoder layer in the forward and in the backward pass, and what lies around them.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esm_efficient import compat
from esm_efficient.adapters.prepare import prepare_model
from esm_efficient.adapters.registry import encoder_layers, ends_with, find_architecture
from esm_efficient.adapters.resolve import recipe_adapters
from esm_efficient.costs.allocations import AllocationTracker
from esm_efficient.costs.devices import Device
from esm_efficient.costs.memory import CATEGORIES
from esm_efficient.costs.throughput import flops_of
from esm_efficient.encoder import apply_lean_encoder
from esm_efficient.encoder.attention import attend_by_length, use_attention
from esm_efficient.errors import ConfigurationError
from esm_efficient.estimation.kernels import Kernels, packed_attention
from esm_efficient.estimation.optimizers import OPTIMIZERS
from esm_efficient.recipes import Precision, Recipe
from esm_efficient.tasks import Head, auto_class

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Padding = Literal["padded", "equal-length", "padding-free"]

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "pure-bf16": torch.bfloat16}
_CUDA_BLOCK = 512
"""Bytes that torch's CUDA allocator rounds up to."""
_LAUNCH = 5e-6
"""Seconds below which no operation gets on a GPU: what eager PyTorch needs to start one."""


@dataclass(frozen=True)
class Step:
    """What step to simulate.

    Attributes:
        recipe: the training method with its sizes.
        tokens: tokens of every sequence in the batch, special tokens included.
        device: whose kernels, and whose rates.
        precision: ``"float32"``; ``"bf16"`` or ``"fp16"``, autocast with frozen weights held in that type and
            trainable ones in float32; ``"pure-bf16"``, everything held in bfloat16.
        optimizer: a name in `OPTIMIZERS`.
        attention: transformers' name of the attention implementation, ``"sdpa"`` or ``"eager"``.
        padding: ``"padded"`` if the batch holds padding, ``"equal-length"`` if all its sequences have the same length,
            ``"padding-free"`` if the lean encoder computes without padding.
        head: what the model predicts.
        num_labels: labels of a classification head.
        adapter_options: options of `lora_config` that win over the recipe's, as pairs.
    """

    recipe: Recipe
    tokens: int
    device: Device
    precision: Precision = "float32"
    optimizer: str = "adamw_fused"
    attention: str = "sdpa"
    padding: Padding = "padded"
    head: Head = "sequence-classification"
    num_labels: int = 2
    adapter_options: tuple[tuple[str, Any], ...] = ()


@dataclass
class Segment:
    """A stretch of a step.

    Attributes:
        phase: ``"forward"``, ``"backward"`` or ``"optimizer"``.
        part: ``"layer 3"``, or the name of what lies around the layers.
        start: bytes held when it begins, int64 of shape (categories,).
        peak: bytes at its highest moment, likewise.
        end: bytes held when it ends, likewise.
        cost: float64 of shape (3,): FLOPs, bytes moved, seconds.
    """

    phase: str
    part: str
    start: np.ndarray
    peak: np.ndarray
    end: np.ndarray
    cost: np.ndarray


@dataclass(frozen=True)
class Simulation:
    """The segments of a step in order, and the parameters of the model that took it."""

    segments: tuple[Segment, ...]
    trainable_parameters: int
    total_parameters: int


def simulate(config: PreTrainedConfig, step: Step, *, layers: int) -> Simulation:
    """Take one optimizer step of a model of some depth under fake tensors.

    The step is one in the middle of a run: the optimizer has its state, and under gradient accumulation the gradients
    of the micro-batches before are there. Of an accumulated batch one micro-batch is taken; `Step.recipe` says how
    many there are.

    Args:
        config: of the model.
        step: what to simulate.
        layers: how many of the encoder's layers to keep, at least 1.

    Returns:
        Segments in the order of time.

    Raises:
        ConfigurationError: the options contradict each other or the device.
        TargetModuleError: the adapters do not fit the model.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    _check(step)
    with ExitStack() as stack:
        model = _build(config, step, layers)
        stack.enter_context(FakeTensorMode())
        _make_fake(model)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = OPTIMIZERS[step.optimizer](trainable)
        for parameter in trainable:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        if step.recipe.accumulation == 1:
            optimizer.zero_grad()
        recorder = _Recorder(step.device)
        tracker = recorder.tracker
        tracker.hold([*model.parameters(), *model.buffers()], "weights")
        tracker.hold((p.grad for p in trainable), "gradients")
        tracker.hold(_tensors(optimizer.state), "optimizer")
        for parameter in trainable:
            parameter.register_post_accumulate_grad_hook(lambda p: tracker.hold([p.grad], "gradients"))
        recorder.watch(model)

        stack.enter_context(compat.attention_masks(step.padding == "padded"))
        stack.enter_context(Kernels(step.device.backend))
        if step.device.backend != "cpu":
            stack.enter_context(use_attention(packed_attention if step.device.backend == "cuda" else attend_by_length))
        with tracker, _quiet("transformers.modeling_layers", "esm_efficient.encoder"):
            _train(model, trainable, optimizer, step, recorder)
        for segment in recorder.segments:
            if segment.phase != "optimizer":
                segment.cost = segment.cost * step.recipe.accumulation
        return Simulation(
            tuple(recorder.segments),
            sum(p.numel() for p in trainable),
            sum(p.numel() for p in model.parameters()),
        )


def _check(step: Step) -> None:
    choices = {
        "precision": (step.precision, ("float32", *_AUTOCAST)),
        "optimizer": (step.optimizer, tuple(OPTIMIZERS)),
        "attention": (step.attention, ("sdpa", "eager")),
        "padding": (step.padding, ("padded", "equal-length", "padding-free")),
        "head": (step.head, ("sequence-classification", "token-classification", "masked-lm")),
    }
    for name, (value, known) in choices.items():
        if value not in known:
            raise ConfigurationError(f"{name}={value!r}: expected one of {', '.join(known)}")
    if step.tokens < 1:
        raise ConfigurationError(f"a sequence of {step.tokens} tokens: expected at least 1")
    if step.padding == "padding-free" and step.attention != "sdpa":
        raise ConfigurationError(f"attention={step.attention!r} goes with padding: the lean encoder has its own")
    wanted = {"float32": "float32", "fp16": "float16"}.get(step.precision, "bfloat16")
    if step.device.flops_per_second and wanted not in step.device.flops_per_second:
        raise ConfigurationError(
            f"the device multiplies no {wanted} matrices: take precision="
            f"{' or '.join(repr({'float16': 'fp16'}.get(name, name)) for name in step.device.flops_per_second)}"
        )


def _build(config: PreTrainedConfig, step: Step, layers: int) -> nn.Module:
    """The model, prepared to train, on the meta device: modules cannot change the dtype of fake parameters."""
    changed = type(config).from_dict(config.to_dict() | {"num_labels": step.num_labels})
    recipe = step.recipe
    frozen = None if step.precision in ("float32", "pure-bf16") else _AUTOCAST[step.precision]
    with torch.device("meta"), _quiet("esm_efficient.adapters.prepare", "esm_efficient.adapters.resolve"):
        model = auto_class(step.head).from_config(changed, attn_implementation=step.attention, dtype=torch.float32)
        # What lies around the layers may depend on their number, as the contact head does: it stays as it is.
        suffix = find_architecture(model).layers
        for path, module in model.named_modules():
            if ends_with(path, suffix):
                del cast(nn.ModuleList, module)[layers:]
        model = prepare_model(
            model,
            adapters=recipe_adapters(recipe, model, **dict(step.adapter_options)),
            head_only=recipe.trains == "head",
            gradient_checkpointing=recipe.gradient_checkpointing,
            dtype=frozen,
        )
        if step.padding == "padding-free":
            apply_lean_encoder(model)
    return (model.bfloat16() if step.precision == "pure-bf16" else model).train()


def _make_fake(model: nn.Module) -> None:
    """Put fake tensors on the CPU in the place of a model's parameters and buffers."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in cast(list[dict[str, Any]], [module._parameters, module._buffers]):
            for name, old in tensors.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                tensors[name] = made[id(old)]


def _train(
    model: nn.Module,
    trainable: list[nn.Parameter],
    optimizer: Any,
    step: Step,
    recorder: _Recorder,
) -> None:
    """One micro-batch and the optimizer's step, as Trainer takes them."""
    batch = _batch(step)
    recorder.mark("forward", "embeddings")
    dtype = _AUTOCAST.get(step.precision)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    loss = F.cross_entropy(logits.float().flatten(0, -2), batch["labels"].flatten())
    del logits
    recorder.mark("backward", "head")
    # What loss.backward() calls in the end. It would itself take Kernels away while the engine recomputes layers.
    torch.autograd.Variable._execution_engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )
    del loss
    recorder.mark("optimizer", "step")
    nn.utils.clip_grad_norm_(trainable, 1.0, foreach=step.device.backend == "cuda")
    optimizer.step()
    recorder.mark("", "")


def _batch(step: Step) -> dict[str, Tensor]:
    shape = step.recipe.micro_batch, step.tokens
    batch = {"input_ids": torch.zeros(shape, dtype=torch.int64)}
    if step.padding != "padding-free":  # where all sequences have the average length, and nothing is left to drop
        batch["attention_mask"] = torch.ones(shape, dtype=torch.int64)
    labels = shape[:1] if step.head == "sequence-classification" else shape
    return batch | {"labels": torch.zeros(labels, dtype=torch.int64)}


def _tensors(state: Any) -> Iterator[Tensor]:
    """The tensors in an optimizer's state."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Keep what is said of a model that nobody will see out of the log."""
    loggers = [logging.getLogger(name) for name in names]
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


class _Recorder:
    """Cuts a step into segments as its model runs."""

    def __init__(self, device: Device) -> None:
        self.tracker = AllocationTracker(
            granularity=_CUDA_BLOCK if device.backend == "cuda" else 1, observer=self._observe
        )
        self.segments: list[Segment] = []
        self._device = device
        self._launch = 0.0 if device.backend == "cpu" else _LAUNCH
        self._cost = np.zeros(3)
        self._open: tuple[str, str, np.ndarray] | None = None

    def mark(self, phase: str, part: str) -> None:
        """End the segment that is open and begin another."""
        now = _vector(self.tracker.held)
        if self._open is not None:
            peak = _vector(self.tracker.peak.to_dict())
            self.segments.append(Segment(*self._open, peak, now, self._cost))
        self.tracker.reset_peak()
        self.tracker.category = "activations" if phase == "forward" else "other"
        self.tracker.recomputes = phase == "backward"
        self._open, self._cost = (phase, part, now), np.zeros(3)

    def watch(self, model: nn.Module) -> None:
        """Begin a segment whenever a layer begins its forward or its backward pass."""
        layers = encoder_layers(model)

        def forward(index: int) -> Callable[..., None]:
            def begin(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                if self._phase == "forward":  # and not when the layer is recomputed
                    if index == 0:
                        self._at_gradient(inputs[0], "embeddings")
                    self.mark("forward", f"layer {index}")

            return begin

        def backward(index: int) -> Callable[..., None]:
            def begin(module: nn.Module, inputs: Any, output: Any) -> None:
                if self._phase == "forward":
                    self._at_gradient(output if isinstance(output, Tensor) else output[0], f"layer {index}")
                    if index == len(layers) - 1:
                        self.mark("forward", "head")

            return begin

        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(forward(index))
            layer.register_forward_hook(backward(index))

    @property
    def _phase(self) -> str:
        return self._open[0] if self._open else ""

    def _at_gradient(self, tensor: Tensor, part: str) -> None:
        if tensor.grad_fn is not None:
            tensor.grad_fn.register_prehook(lambda _: self.mark("backward", part))

    def _observe(self, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
        """Add an operation to the costs of the segment: a roofline of its FLOPs and the bytes it moves."""
        if func.is_view or func._overloadpacket is torch.ops.aten._unsafe_view:
            return
        flops = flops_of(func, args, kwargs, result)
        moved = sum(map(_size, _flat((args, tuple(kwargs.values()), result))))
        seconds = 0.0
        if self._device.flops_per_second:
            rate = self._device.flops_per_second.get(_dtype_name(result), self._device.flops_per_second["float32"])
            seconds = max(flops / rate, moved / self._device.bandwidth, self._launch)
        self._cost += (flops, moved, seconds)


def _vector(values: Any) -> np.ndarray:
    return np.array([values[name] for name in CATEGORIES], dtype=np.int64)


def _flat(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _flat(item)


def _size(tensor: Tensor) -> int:
    """Bytes that reading or writing a tensor moves; a broadcast one is read once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _dtype_name(result: Any) -> str:
    first = next(_flat(result), None)
    return "" if first is None else str(first.dtype).removeprefix("torch.")
