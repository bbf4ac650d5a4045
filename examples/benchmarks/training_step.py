"""Training steps of the lean encoder and of others, in one process, in turns: speed, memory and gradient.

    python examples/benchmarks/training_step.py --model 8M --json step.json

A step is forward, backward and AdamW on 8 proteins with the lengths of DeepLoc (100 to 512 residues), in float32 on two
threads, LoRA r=8 on all linear layers without dropout. Each row sets the lean encoder against one baseline, on the same
weights and the same batches:

- ``default``: transformers and peft as most people run them, fused attention, random batches.
- ``grouped``: the same with batches of like length, so that there is next to no padding.
- ``compiled``: that under torch.compile.
- ``tutorial``: attention in single steps, random batches, full fine-tuning; against the lean encoder in full
  fine-tuning and, in a row of its own, with LoRA.
- ``checkpointing``: random batches with gradient checkpointing, against ``recompute="layer"``.
- ``prediction``: random batches without gradients.

Ratios are medians over the batches: of a step's residues per second, and of its activation bytes, the highest sum of
what a forward and a backward pass hold beyond weights, gradients and optimizer state, from the allocator's own events.
The gradient's error is that of the whole vector. ``matmul_share`` is the rate of the FLOPs that the mathematics needs,
as a share of the measured rate of a float32 matrix product of the MLP's shape. With ``--others``, other packages'
encoders run beside it, as far as they are installed.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from other_encoders import OTHERS, build_other
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import EsmForSequenceClassification

from esm_efficient import apply_lean_encoder, load_deeploc, lora_config, prepare_model
from esm_efficient.estimation.inputs import resolve_config
from esm_efficient.reporting import format_bytes, format_table

ROWS, RANK = 8, 8
# Residues of DeepLoc-2.0's 15,876 proteins of 100 to 512 residues: the 0th, 5th, ... and 100th percentile, as
# np.quantile prints them for the table that load_deeploc() loads.
PERCENTILES = (
    *(100, 129, 151, 176, 198, 216, 234, 253, 272, 292, 312),
    *(331, 350, 367, 387, 406, 425, 448, 470, 491, 512),
)
GOALS = {  # residues per second at least, activation bytes at most
    "default": (2.2, 0.20),
    "grouped": (1.5, 0.35),
    "compiled": (1.2, 0.6),
    "tutorial": (4.0, 0.12),
    "checkpointing": (2.0, 1.0),
    "prediction": (2.0, None),
}


@dataclass(frozen=True)
class Batch:
    """One batch, its labels and its residues."""

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    residues: int


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="8M", choices=["8M", "35M", "150M", "650M-4layers", "demo"])
    parser.add_argument("--baselines", nargs="+", default=list(GOALS), choices=GOALS)
    parser.add_argument("--batches", type=int, default=5, help="batches of each row")
    parser.add_argument("--others", nargs="*", default=[], choices=OTHERS, help="packages to run beside it")
    parser.add_argument("--data", type=Path, help="DeepLoc's table; without it, lengths are drawn from its percentiles")
    parser.add_argument("--longest", type=int, default=512, help="residues at which sequences are cut")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    return parser.parse_args()


def draw_batches(options: argparse.Namespace, *, grouped: bool) -> list[Batch]:
    """Batches of random proteins, or of neighbours in the order of length."""
    rng = np.random.default_rng(options.seed)
    if options.data:
        splits = load_deeploc(options.data).values()
        known = np.array([len(sequence) for split in splits for sequence in split["sequence"]])
    else:
        known = np.interp(rng.random(16000), np.linspace(0, 1, len(PERCENTILES)), PERCENTILES).astype(int)
    known = np.sort(np.minimum(known, options.longest))
    batches = []
    for _ in range(options.batches):
        start = rng.integers(len(known) - ROWS)
        residues = known[start : start + ROWS] if grouped else rng.choice(known, ROWS)
        tokens = torch.from_numpy(residues) + 2
        mask = (torch.arange(int(tokens.max())) < tokens[:, None]).long()
        ids = torch.from_numpy(rng.integers(4, 24, mask.shape))
        ids[:, 0] = 0
        ids = ids.scatter(1, tokens[:, None] - 1, 2).where(mask.bool(), 1)
        labels = torch.from_numpy(rng.integers(0, 2, ROWS))
        batches.append(Batch({"input_ids": ids, "attention_mask": mask}, labels, int(residues.sum())))
    return batches


def make_model(name: str, *, attention: str = "sdpa", full: bool = False, checkpointing: bool = False) -> nn.Module:
    """A classifier with random weights, ready to train."""
    if name == "demo":
        from esm_efficient import demo_model_path

        config = transformers.AutoConfig.from_pretrained(demo_model_path())
    else:
        _, config = resolve_config(name.removesuffix("-4layers"))
    if name.endswith("-4layers"):
        config.num_hidden_layers = 4
    torch.manual_seed(0)
    model = EsmForSequenceClassification._from_config(config, attn_implementation=attention)
    adapters = None if full else lora_config(model, preset="all-linear", r=RANK, lora_dropout=0.0)
    model = prepare_model(model, adapters=adapters, gradient_checkpointing=checkpointing)
    for path, parameter in model.named_parameters():
        if "lora_B" in path:  # zero at first, which would hide half of the gradient
            nn.init.normal_(parameter, std=0.02)
    return model.train()


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)


def compute_gradient(model: nn.Module, batch: Batch) -> None:
    F.cross_entropy(model(**batch.inputs).logits, batch.labels).backward()


def seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def peak_bytes(function: Callable[[], object]) -> int:
    """The most bytes that a call held at once of what it allocated."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    records = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate((size for _, size in records), initial=0))


def gradient_vector(model: nn.Module, batch: Batch) -> torch.Tensor:
    model.zero_grad()
    compute_gradient(model, batch)
    named = sorted((path.replace("_orig_mod.", ""), p) for path, p in model.named_parameters() if p.requires_grad)
    return torch.cat([p.grad.flatten().double() for _, p in named if p.grad is not None])


class Side:
    """One of two sides: a model that trains or predicts."""

    def __init__(self, model: nn.Module, *, trains: bool = True) -> None:
        self.model = model if trains else model.eval()
        self.trains = trains
        self.optimizer = make_optimizer(model) if trains else None
        self.seconds: list[float] = []

    def step(self, batch: Batch) -> None:
        """An optimizer step, or a prediction."""
        if self.optimizer is None:
            with torch.no_grad():
                self.model(**batch.inputs)
            return
        compute_gradient(self.model, batch)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def activation_bytes(self, batch: Batch) -> int:
        """Bytes of a forward and a backward pass at their peak, with gradients there already."""
        if self.optimizer is None:
            return peak_bytes(lambda: self.step(batch))
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        peak = peak_bytes(lambda: compute_gradient(self.model, batch))
        self.model.zero_grad()
        return peak


def needed_flops(config: transformers.EsmConfig, batch: Batch, *, adapters: bool) -> float:
    """FLOPs of a training step that the gradient of a first-token classifier needs.

    Each token counts a multiplication and an addition for every weight, in the forward pass and again for the gradient
    of its input, and with full fine-tuning for that of the weight. The last layer needs keys and values of every token
    and the rest of one; with adapters, the first layer's input needs no gradient. LoRA's own matrices and attention are
    counted likewise; heads, norms and what is recomputed are not.
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
        total += 2 * pairs * d * 2 * 3  # two products forward, and two for each of them backward
    return total


def compare_sides(name: str, baseline: Side, lean: Side, batches: list[Batch], same: bool, note: dict) -> dict:
    """Steps of both sides in turns."""
    config = lean.model.config
    longest = max(batches, key=lambda batch: batch.inputs["input_ids"].numel())
    for side in (baseline, lean):
        side.step(longest)
    error = None
    if same and lean.trains:
        expected, found = gradient_vector(baseline.model, longest), gradient_vector(lean.model, longest)
        error = float((found - expected).norm() / expected.norm())
        baseline.model.zero_grad()
        lean.model.zero_grad()
    elif same:
        with torch.no_grad():
            expected, found = (side.model(**longest.inputs).logits for side in (baseline, lean))
        error = float((found - expected).norm() / expected.norm())
    shares = []
    for batch in batches:
        for side in (baseline, lean) if len(shares) % 2 else (lean, baseline):
            side.seconds.append(seconds(lambda side=side, batch=batch: side.step(batch)))
        if lean.trains:
            left = torch.randn(int(batch.inputs["attention_mask"].sum()), config.hidden_size)
            right = torch.randn(config.hidden_size, config.intermediate_size)
            product = statistics.median(seconds(lambda left=left, right=right: left @ right) for _ in range(5))
            rate = 2 * left.numel() * right.shape[1] / product
            need = needed_flops(config, batch, adapters=note["trains"] != "full")
            shares.append(need / lean.seconds[-1] / rate)
        else:
            shares.append(float("nan"))
    held = {
        what: [side.activation_bytes(b) for b in batches] for what, side in (("baseline", baseline), ("lean", lean))
    }
    ratios = [b / a for b, a in zip(baseline.seconds, lean.seconds, strict=True)]
    held_ratios = [a / b for b, a in zip(held["baseline"], held["lean"], strict=True)]
    raw = {
        what: {
            "seconds": side.seconds,
            "residues_per_s": sum(batch.residues for batch in batches) / sum(side.seconds),
            "activation_bytes": held[what],
        }
        for what, side in (("baseline", baseline), ("lean", lean))
    }
    fill = sum(int(b.inputs["attention_mask"].sum()) for b in batches)
    return {
        "baseline": name,
        **note,
        "residues_per_s_ratio": statistics.median(ratios),
        "activation_ratio": statistics.median(held_ratios),
        "gradient_error": error if lean.trains else None,
        "output_error": None if lean.trains else error,
        "matmul_share": statistics.median(shares) if lean.trains else None,
        "non_padding": fill / sum(b.inputs["input_ids"].numel() for b in batches),
        "goal_residues_per_s_ratio": 3.0 if name == "default" and config.hidden_size == 1280 else GOALS[name][0],
        "goal_activation_ratio": GOALS[name][1],
        "sides": raw,
    }


def run_baseline(name: str, options: argparse.Namespace) -> list[dict]:
    batches = draw_batches(options, grouped=name in ("grouped", "compiled"))
    full = name == "tutorial"
    attention = "eager" if full else "sdpa"
    plain = make_model(options.model, attention=attention, full=full, checkpointing=name == "checkpointing")
    lean = copy.deepcopy(plain)
    apply_lean_encoder(lean, recompute="layer" if name == "checkpointing" else "none")
    trains = name != "prediction"
    note = {"trains": "full" if full else "adapters"}
    if name == "compiled":
        plain = torch.compile(plain, dynamic=True)
        for batch in batches:  # every shape that makes it compile anew
            compute_gradient(plain, batch)
        plain.zero_grad()
    rows = [compare_sides(name, Side(plain, trains=trains), Side(lean, trains=trains), batches, True, note)]
    if full:
        adapted = apply_lean_encoder(make_model(options.model))
        rows.append(compare_sides(name, Side(plain), Side(adapted), batches, False, {"trains": "adapters"}))
    return rows


def run_other(name: str, options: argparse.Namespace) -> list[dict]:
    """Another package's encoder with the same weights, in prediction and, where it can, in full fine-tuning."""
    batches = draw_batches(options, grouped=False)
    model = make_model(options.model, full=True).esm
    rows = []
    for trains in (False, True):
        row: dict = {"package": name, "trains": "full" if trains else "nothing"}
        lean = apply_lean_encoder(copy.deepcopy(model).train(trains))
        try:
            other = build_other(name, model).train(trains)
            compared = compare_encoders(other, lean, batches, trains)
        except Exception as error:  # whatever keeps a package from running here is its row
            lines = str(error).strip().splitlines() or [""]
            row["reason"] = f"{type(error).__name__}: {lines[0][:200]}"
        else:
            row |= compared
        rows.append(row)
    return rows


def compare_encoders(other: nn.Module, lean: nn.Module, batches: list[Batch], trains: bool) -> dict:
    """The last hidden states of two encoders, or the gradient of a loss of them, in turns."""

    def states(model: nn.Module, batch: Batch) -> torch.Tensor:
        found = model(**batch.inputs)
        return getattr(found, "last_hidden_state", found) * batch.inputs["attention_mask"].unsqueeze(-1)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer | None, batch: Batch) -> None:
        with torch.set_grad_enabled(trains):
            result = states(model, batch)
        if optimizer is not None:
            result.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    sides = [(model, make_optimizer(model) if trains else None) for model in (other, lean)]
    with torch.no_grad():
        expected, found = (states(model, batches[0]) for model, _ in sides)
    error = float((found - expected).norm() / expected.norm())
    for side, batch in itertools.product(sides, batches):  # every shape, for what compiles
        step(*side, batch)
    times = []
    for number, batch in enumerate(batches):
        turns = (0, 1) if number % 2 else (1, 0)
        taken = {turn: seconds(lambda side=sides[turn], batch=batch: step(*side, batch)) for turn in turns}
        times.append((taken[0], taken[1]))
    return {
        "residues_per_s_ratio": statistics.median(theirs / ours for theirs, ours in times),
        "output_error": error,
        "sides": {"other": [theirs for theirs, _ in times], "lean": [ours for _, ours in times]},
    }


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.baselines:
        rows += run_baseline(name, options)
        print(describe(rows[-1]), flush=True)
    others = [row for name in options.others for row in run_other(name, options)]
    cells = []
    for row in rows:
        speed, memory = row["goal_residues_per_s_ratio"], row["goal_activation_ratio"]
        cells.append(
            (
                f"{row['baseline']} ({row['trains']})",
                f"{row['residues_per_s_ratio']:.2f} (goal {speed})",
                f"{row['activation_ratio']:.2f}" + (f" (goal {memory})" if memory else ""),
                format_bytes(max(row["sides"]["lean"]["activation_bytes"])),
                "" if row["gradient_error"] is None else f"{row['gradient_error']:.1e}",
                "" if row["matmul_share"] is None else f"{row['matmul_share']:.2f}",
                f"{row['non_padding']:.2f}",
            )
        )
    headers = ["baseline", "residues/s", "activation", "ours", "gradient error", "matmul share", "fill"]
    print(f"{options.model}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(format_table(cells, headers))
    for row in others:
        print(f"{row['package']}, trains {row['trains']}: {row.get('reason') or row['residues_per_s_ratio']}")
    if options.json:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__, "cpu": platform.processor()}
        settings = {key: str(value) for key, value in vars(options).items()}
        record = {"settings": settings, "versions": versions, "rows": rows, "others": others}
        options.json.write_text(json.dumps(record, indent=2) + "\n")


def describe(row: dict) -> str:
    ratios = f"{row['residues_per_s_ratio']:.2f} x residues/s, {row['activation_ratio']:.2f} x activations"
    return f"{row['baseline']}: {ratios}"


if __name__ == "__main__":
    main()
