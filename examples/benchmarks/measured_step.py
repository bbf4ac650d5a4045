"""One training step of an ESM-2 classifier and its measurements: batches, model, seconds, peak bytes and FLOPs."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForSequenceClassification, EsmConfig

from esm_efficient import (
    RECIPES,
    Recipe,
    demo_model_path,
    load_deeploc,
    lora_config,
    prepare_model,
    recipe_adapters,
)
from esm_efficient.estimation.inputs import resolve_config

ROWS, RANK = 8, 8
# The 0th, 5th, ... and 100th percentile of residues per protein, for DeepLoc-2.0's 15,876 proteins of 100 to 512
# residues: np.quantile of the table that load_deeploc() loads.
PERCENTILES = (
    *(100, 129, 151, 176, 198, 216, 234, 253, 272, 292, 312),
    *(331, 350, 367, 387, 406, 425, 448, 470, 491, 512),
)


@dataclass(frozen=True)
class Batch:
    """A padded batch, its labels and its number of residues."""

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    residues: int


def draw_batches(
    number: int, *, grouped: bool, data: Path | None = None, max_residues: int = 512, seed: int = 0
) -> list[Batch]:
    """Draw batches of random proteins or, if grouped, of proteins of similar length."""
    rng = np.random.default_rng(seed)
    if data:
        splits = load_deeploc(data).values()
        lengths = np.array([len(sequence) for split in splits for sequence in split["sequence"]])
    else:
        lengths = np.interp(rng.random(16000), np.linspace(0, 1, len(PERCENTILES)), PERCENTILES).astype(int)
    lengths = np.sort(np.minimum(lengths, max_residues))
    batches = []
    for _ in range(number):
        start = rng.integers(len(lengths) - ROWS)
        residues = lengths[start : start + ROWS] if grouped else rng.choice(lengths, ROWS)
        batches.append(make_batch(residues, rng))
    return batches


def make_batch(residues: np.ndarray, rng: np.random.Generator) -> Batch:
    """Make a batch of random proteins with some numbers of residues."""
    tokens = torch.from_numpy(residues) + 2
    mask = (torch.arange(int(tokens.max())) < tokens[:, None]).long()
    ids = torch.from_numpy(rng.integers(4, 24, mask.shape))
    ids[:, 0] = 0
    ids = ids.scatter(1, tokens[:, None] - 1, 2).where(mask.bool(), 1)
    labels = torch.from_numpy(rng.integers(0, 2, len(residues)))
    return Batch({"input_ids": ids, "attention_mask": mask}, labels, int(residues.sum()))


def make_model(
    name: str, *, attention: str = "sdpa", full: bool = False, gradient_checkpointing: bool = False
) -> nn.Module:
    """Build a classifier with random weights, in training mode."""
    if name == "demo":
        config = AutoConfig.from_pretrained(demo_model_path())
    else:
        _, config = resolve_config(name.removesuffix("-4layers"))
    if name.endswith("-4layers"):
        config.num_hidden_layers = 4
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation=attention)
    adapters = None if full else lora_config(model, preset="all-linear", r=RANK, lora_dropout=0.0)
    model = prepare_model(model, adapters=adapters, gradient_checkpointing=gradient_checkpointing)
    for path, parameter in model.named_parameters():
        if "lora_B" in path:  # LoRA starts with B = 0, which makes the gradient of A zero
            nn.init.normal_(parameter, std=0.02)
    return model.train()


def make_recipe_model(config: EsmConfig, recipe: str | Recipe, *, dtype: torch.dtype | None = None) -> nn.Module:
    """Build a classifier with random weights that trains what a recipe trains, with frozen parameters of a dtype."""
    recipe = RECIPES[recipe] if isinstance(recipe, str) else recipe
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa")
    return prepare_model(
        model,
        adapters=recipe_adapters(recipe, model),
        head_only=recipe.trains == "head",
        layers=recipe.layers,
        gradient_checkpointing=recipe.gradient_checkpointing,
        dtype=dtype,
    ).train()


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)


def compute_gradient(model: nn.Module, batch: Batch) -> None:
    F.cross_entropy(model(**batch.inputs).logits, batch.labels).backward()


def seconds(function: Callable[[], object]) -> float:
    """Call a function and return the seconds that it takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def peak_bytes(function: Callable[[], object]) -> int:
    """Call a function and return the peak of the bytes that it allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    records = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate((size for _, size in records), initial=0))


def gradient_vector(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The gradient of all trainable parameters as one vector, in the order of their names."""
    model.zero_grad()
    compute_gradient(model, batch)
    named = sorted((path.replace("_orig_mod.", ""), p) for path, p in model.named_parameters() if p.requires_grad)
    return torch.cat([p.grad.flatten().double() for _, p in named if p.grad is not None])


class Side:
    """One side of a comparison: a model that trains or predicts, and its seconds per step."""

    def __init__(self, model: nn.Module, *, trains: bool = True) -> None:
        self.model = model if trains else model.eval()
        self.trains = trains
        self.optimizer = make_optimizer(model) if trains else None
        self.seconds: list[float] = []

    def step(self, batch: Batch) -> None:
        """Run an optimizer step, or a prediction."""
        if self.optimizer is None:
            with torch.no_grad():
                self.model(**batch.inputs)
            return
        compute_gradient(self.model, batch)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def activation_bytes(self, batch: Batch) -> int:
        """Return the peak bytes of a forward and a backward pass; gradients are allocated before."""
        if self.optimizer is None:
            return peak_bytes(lambda: self.step(batch))
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        peak = peak_bytes(lambda: compute_gradient(self.model, batch))
        self.model.zero_grad()
        return peak


def needed_flops(config: EsmConfig, batch: Batch, *, adapters: bool) -> float:
    """Count the FLOPs of a training step that the gradient of a first-token classifier needs.

    Each token costs one multiplication and one addition per weight in the forward pass, as many again for the gradient
    of the layer's input and, in full fine-tuning, as many again for the gradient of the weight. The last layer computes
    keys and values of every token, and everything else of the first token only. With adapters, the first layer's input
    needs no gradient. LoRA's matrices and attention are counted in the same way. Heads, norms and recomputation are not
    counted.
    """
    d, wide, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    lengths = batch.inputs["attention_mask"].sum(1).double()
    tokens, squares, rows = float(lengths.sum()), float(lengths.square().sum()), len(lengths)
    shapes = {"q": (d, d), "k": (d, d), "v": (d, d), "o": (d, d), "up": (d, wide), "down": (wide, d)}
    total = 0.0
    for layer in range(layers):
        last = layer == layers - 1
        for name, (inputs, outputs) in shapes.items():
            count = rows if last and name not in "kv" else tokens
            passes = 1 + (1 if layer or name not in "qkv" or not adapters else 0) + (0 if adapters else 1)
            total += 2 * count * inputs * outputs * passes
            if adapters:
                total += 2 * count * RANK * (inputs + outputs) * 3
        pairs = tokens if last else squares
        total += 2 * pairs * d * 2 * 3  # two products in the forward pass, two for each of them in the backward pass
    return total
