"""Measure the profiler's overhead: the time that it adds to a step, as a share of a step of real size.

    python examples/benchmarks/profiler_overhead.py --json overhead.json

The profiler's work depends on the number of operations, not on the size of their tensors. So the script measures the
added seconds on tiny steps (one sequence of eight tokens), where they are large enough to measure, and divides them by
the seconds of a step of real size. Two copies of the model train in one process in alternating steps, one with and one
without the profiler. The profiler counts every operation in each tenth step. An average step is therefore nine parts
the median ordinary step and one part the median tenth step. The last column is the same ratio from steps of real size;
on a noisy machine it is mostly noise. The exit status is 1 if the overhead is above two percent.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
import transformers
from measured_step import make_optimizer, make_recipe_model

from esm_efficient import RECIPES, Profiler, format_table
from esm_efficient.estimation.inputs import resolve_config

LIMIT = 0.02
EVERY = 10


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="8M", help="an ESM-2 size, or a folder with a config.json")
    parser.add_argument("--recipes", nargs="+", default=["base", "lora"], choices=RECIPES)
    parser.add_argument("--steps", type=int, default=401, help="tiny steps per side")
    parser.add_argument("--real-steps", type=int, default=21, help="steps of real size per side")
    parser.add_argument("--tokens", type=int, default=512, help="most tokens per sequence in a real batch of 8")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    return parser.parse_args()


def make_side(config, recipe: str, device: str):
    model = make_recipe_model(config, recipe).to(device)
    return model, make_optimizer(model)


def make_batches(number: int, rows: int, shortest: int, longest: int, device: str) -> list:
    batches = []
    for _ in range(number):
        lengths = torch.randint(shortest, longest + 1, (rows,))
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        ids = torch.where(mask.bool(), torch.randint(4, 24, mask.shape), 1)
        batch = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        batches.append((batch, torch.randint(0, 2, (rows,), device=device)))
    # The largest batch comes first: the profiler counts every operation of a batch that is larger than all before,
    # which is rare in a long run.
    largest = max(range(number), key=lambda i: batches[i][0]["input_ids"].numel())
    return [batches.pop(largest), *batches]


def step(model, optimizer, batch, labels, profiler=None) -> float:
    """Run one optimizer step and return its seconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    loss = torch.nn.functional.cross_entropy(model(**batch).logits, labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if profiler is not None:
        profiler.step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def take_turns(profiled, bare, batches) -> list[tuple[float, float]]:
    """Return the seconds of each step with and without the profiler, except the first."""
    pairs = []
    with Profiler(*profiled, warmup_steps=0, every=EVERY) as profiler:
        for number, batch in enumerate(batches):
            if number % 4 in (0, 3):  # the profiled side also alternates between first and second in every tenth step
                with_it, without = step(*profiled, *batch, profiler), step(*bare, *batch)
            else:
                without, with_it = step(*bare, *batch), step(*profiled, *batch, profiler)
            pairs.append((with_it, without))
    return pairs[1:]


def of_average_step(values: list[float]) -> float:
    """Return nine tenths of the median ordinary step plus one tenth of the median tenth step."""
    counted = [value for number, value in enumerate(values, 1) if number % EVERY == 0]
    ordinary = [value for number, value in enumerate(values, 1) if number % EVERY]
    return (1 - 1 / EVERY) * statistics.median(ordinary) + statistics.median(counted) / EVERY


def compare(config, recipe: str, options: argparse.Namespace, device: str) -> dict:
    sides = make_side(config, recipe, device), make_side(config, recipe, device)
    tiny = take_turns(*sides, make_batches(options.steps, 1, 8, 8, device))
    real = take_turns(*sides, make_batches(options.real_steps, 8, min(102, options.tokens), options.tokens, device))
    cost = of_average_step([with_it - without for with_it, without in tiny])
    step_seconds = statistics.median(without for _, without in real)
    return {
        "recipe": recipe,
        "seconds_per_step": step_seconds,
        "profiler_seconds_per_step": cost,
        "overhead": cost / step_seconds,
        "ratio_of_real_steps": of_average_step([with_it / without for with_it, without in real]) - 1,
        "tiny_steps": tiny,
        "real_steps": real,
    }


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(2)
    _, config = resolve_config(options.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [compare(config, recipe, options, device) for recipe in options.recipes]
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}, 2 threads"
    cells = [
        (
            r["recipe"],
            f"{r['seconds_per_step']:.3f} s",
            f"{r['profiler_seconds_per_step']:.4f} s",
            f"{r['overhead']:+.2%}",
            f"{r['ratio_of_real_steps']:+.2%}",
        )
        for r in rows
    ]
    print(f"{options.model}, batches of 8 x 102-{options.tokens} tokens, {device} ({versions})\n")
    print(format_table(cells, ("recipe", "step", "profiler", "overhead", "ratio of real steps")))
    if options.json is not None:
        options.json.write_text(json.dumps({"versions": versions, "device": device, "rows": rows}, indent=2) + "\n")
    if max(row["overhead"] for row in rows) > LIMIT:
        raise SystemExit(f"the profiler costs more than {LIMIT:.0%} of a step")


if __name__ == "__main__":
    main()
