"""Compare training steps of the lean encoder with those of others: speed, memory and gradient.

    python examples/benchmarks/training_step.py --model 8M --json step.json

A step is forward, backward and AdamW on 8 proteins with DeepLoc's lengths (100 to 512 residues), in float32 on two
threads, with LoRA r=8 on all linear layers and no dropout. Each row compares the lean encoder with one baseline in one
process, in alternating steps with the same weights and batches:

- ``default``: transformers and peft with their defaults, sdpa attention, random batches.
- ``grouped``: as ``default``, with batches of similar length and so almost no padding.
- ``compiled``: as ``grouped``, under torch.compile.
- ``tutorial``: eager attention, random batches, full fine-tuning. One row compares it with the lean encoder in full
  fine-tuning, another row with the lean encoder and LoRA.
- ``checkpointing``: random batches with gradient checkpointing, compared with ``recompute="layer"``.
- ``prediction``: random batches without gradients.
- ``unfused``: the lean encoder itself, compared with its elementwise functions fused (``fused=True``); not by default.

Ratios are medians over the batches. One ratio compares residues per second. The other compares activation bytes: the
peak bytes of a forward and a backward pass beyond weights, gradients and optimizer state, from the allocator's events.
The gradient error is that of the whole gradient vector. ``matmul_share`` is the rate of the FLOPs that the mathematics
needs, as a share of the measured rate of a float32 matrix product of the MLP's shape. ``--others`` adds encoders of
other packages that are installed.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import platform
import statistics
from pathlib import Path

import torch
import transformers
from measured_step import (
    Batch,
    Side,
    compute_gradient,
    draw_batches,
    gradient_vector,
    make_model,
    make_optimizer,
    needed_flops,
    seconds,
)
from other_encoders import OTHERS, build_other
from torch import nn

from esm_efficient import apply_lean_encoder, format_table
from esm_efficient.reporting.tables import format_bytes

GOALS = {  # least ratio of residues per second, greatest ratio of activation bytes
    "default": (2.2, 0.20),
    "grouped": (1.5, 0.35),
    "compiled": (1.2, 0.6),
    "tutorial": (4.0, 0.12),
    "checkpointing": (2.0, 1.0),
    "prediction": (2.0, None),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="8M", choices=["8M", "35M", "150M", "650M-4layers", "demo"])
    parser.add_argument("--baselines", nargs="+", default=list(GOALS), choices=[*GOALS, "unfused"])
    parser.add_argument("--batches", type=int, default=5, help="batches per row")
    parser.add_argument("--others", nargs="*", default=[], choices=OTHERS, help="other packages to compare with")
    parser.add_argument("--data", type=Path, help="DeepLoc's table; without it, lengths are drawn from its percentiles")
    parser.add_argument("--max-residues", type=int, default=512, help="residues at which sequences are cut")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    return parser.parse_args()


def relative_error(values: torch.Tensor, expected: torch.Tensor) -> float:
    return float((values - expected).norm() / expected.norm())


def compare_sides(name: str, baseline: Side, lean: Side, batches: list[Batch], same: bool, note: dict) -> dict:
    """Run both sides in alternating steps and return the figures of one row."""
    config = lean.model.config
    longest = max(batches, key=lambda batch: batch.inputs["input_ids"].numel())
    for side in (baseline, lean):
        side.step(longest)
    error = None
    if same and lean.trains:
        error = relative_error(gradient_vector(lean.model, longest), gradient_vector(baseline.model, longest))
        baseline.model.zero_grad()
        lean.model.zero_grad()
    elif same:
        with torch.no_grad():
            error = relative_error(lean.model(**longest.inputs).logits, baseline.model(**longest.inputs).logits)
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
    activations = {
        what: [side.activation_bytes(b) for b in batches] for what, side in (("baseline", baseline), ("lean", lean))
    }
    ratios = [b / a for b, a in zip(baseline.seconds, lean.seconds, strict=True)]
    activation_ratios = [a / b for b, a in zip(activations["baseline"], activations["lean"], strict=True)]
    raw = {
        what: {
            "seconds": side.seconds,
            "residues_per_s": sum(batch.residues for batch in batches) / sum(side.seconds),
            "activation_bytes": activations[what],
        }
        for what, side in (("baseline", baseline), ("lean", lean))
    }
    speed, memory = GOALS.get(name, (None, None))
    fill = sum(int(b.inputs["attention_mask"].sum()) for b in batches)
    return {
        "baseline": name,
        **note,
        "residues_per_s_ratio": statistics.median(ratios),
        "activation_ratio": statistics.median(activation_ratios),
        "gradient_error": error if lean.trains else None,
        "output_error": None if lean.trains else error,
        "matmul_share": statistics.median(shares) if lean.trains else None,
        "non_padding": fill / sum(b.inputs["input_ids"].numel() for b in batches),
        "goal_residues_per_s_ratio": 3.0 if name == "default" and config.hidden_size == 1280 else speed,
        "goal_activation_ratio": memory,
        "sides": raw,
    }


def batches_of(options: argparse.Namespace, *, grouped: bool) -> list[Batch]:
    return draw_batches(
        options.batches, grouped=grouped, data=options.data, max_residues=options.max_residues, seed=options.seed
    )


def run_baseline(name: str, options: argparse.Namespace) -> list[dict]:
    """Return the rows of one baseline."""
    batches = batches_of(options, grouped=name in ("grouped", "compiled"))
    full = name == "tutorial"
    attention = "eager" if full else "sdpa"
    plain = make_model(options.model, attention=attention, full=full, gradient_checkpointing=name == "checkpointing")
    lean = copy.deepcopy(plain)
    apply_lean_encoder(lean, recompute="layer" if name == "checkpointing" else "none", fused=name == "unfused")
    trains = name != "prediction"
    note = {"trains": "full" if full else "adapters"}
    if name == "unfused":
        apply_lean_encoder(plain)
    if name == "compiled":
        plain = torch.compile(plain, dynamic=True)
        for batch in batches:  # compile for every shape before the measurement
            compute_gradient(plain, batch)
        plain.zero_grad()
    rows = [compare_sides(name, Side(plain, trains=trains), Side(lean, trains=trains), batches, True, note)]
    if full:
        adapted = apply_lean_encoder(make_model(options.model))
        rows.append(compare_sides(name, Side(plain), Side(adapted), batches, False, {"trains": "adapters"}))
    return rows


def run_other(name: str, options: argparse.Namespace) -> list[dict]:
    """Compare another package's encoder, with the same weights, in prediction and in full fine-tuning."""
    batches = batches_of(options, grouped=False)
    model = make_model(options.model, full=True).esm
    rows = []
    for trains in (False, True):
        row: dict = {"package": name, "trains": "full" if trains else "nothing"}
        lean = apply_lean_encoder(copy.deepcopy(model).train(trains))
        try:
            other = build_other(name, model).train(trains)
            compared = compare_encoders(other, lean, batches, trains)
        except Exception as error:  # the row gives the reason if a package cannot run on this machine
            lines = str(error).strip().splitlines() or [""]
            row["reason"] = f"{type(error).__name__}: {lines[0][:200]}"
        else:
            row |= compared
        rows.append(row)
    return rows


def compare_encoders(other: nn.Module, lean: nn.Module, batches: list[Batch], trains: bool) -> dict:
    """Compare the last hidden states of two encoders and their seconds per step, in alternating steps."""

    def states(model: nn.Module, batch: Batch) -> torch.Tensor:
        output = model(**batch.inputs)
        return getattr(output, "last_hidden_state", output) * batch.inputs["attention_mask"].unsqueeze(-1)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer | None, batch: Batch) -> None:
        with torch.set_grad_enabled(trains):
            result = states(model, batch)
        if optimizer is not None:
            result.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    sides = [(model, make_optimizer(model) if trains else None) for model in (other, lean)]
    with torch.no_grad():
        error = relative_error(states(lean, batches[0]), states(other, batches[0]))
    for side, batch in itertools.product(sides, batches):  # a compiled model compiles for every shape here
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
                f"{row['residues_per_s_ratio']:.2f}" + (f" (goal {speed})" if speed else ""),
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
    """One line that shows progress."""
    ratios = f"{row['residues_per_s_ratio']:.2f} x residues/s, {row['activation_ratio']:.2f} x activations"
    return f"{row['baseline']}: {ratios}"


if __name__ == "__main__":
    main()
