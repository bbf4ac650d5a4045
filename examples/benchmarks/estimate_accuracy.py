"""Compare `estimate` with the measured peak of a real step on this CPU and with peaks that others published.

The measurement trains a freshly initialised model with `WeightedTrainer` for two optimizer steps. It takes the peak of
the second step from the CPU allocator's events, which torch's profiler records::

    python examples/benchmarks/estimate_accuracy.py --json accuracy.json

The whole table takes about half an hour on two cores; ``--sizes 8M --tokens 128`` takes a few minutes. The exit
status is 1 if an estimate differs from its measurement by more than five percent.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import platform
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from measured_step import make_recipe_model
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from esm_efficient import (
    RECIPES,
    WeightedTrainer,
    apply_lean_encoder,
    estimate,
    format_table,
    recipe_arguments,
)
from esm_efficient.estimation.inputs import resolve_config
from esm_efficient.reporting.tables import format_bytes

TOLERANCE = 0.05
"""Largest allowed difference from a measured peak, as a share of it."""
EXPLAINED = 0.15
"""A difference from a published peak above this share has an explanation in the table below."""

TUTORIAL = (
    "AWS, 'Efficiently fine-tune the ESM-2 protein language model with Amazon SageMaker' (2024), notebook "
    "Fine-Tune-ESM2-On-DeepLoc of aws-samples/aws-healthcare-lifescience-ai-ml-sample-notebooks"
)
BIONEMO = "NVIDIA BioNeMo Framework documentation, ESM-2, figure of the memory use of LoRA fine-tuning"

# The tutorial's script loads the weights in bfloat16 and uses no autocast, so gradients and optimizer state are
# bfloat16 too. Its transformers version (4.34) has only eager attention. It pads sequences of up to 512 tokens to the
# longest one of their batch.
_AS_THE_TUTORIAL = {
    "model": "650M",
    "device": "A10G",
    "tokens": 512,
    "precision": "pure-bf16",
    "attention": "eager",
    "padding": "padded",
    "optimizer": "adamw_foreach",
    "micro_batch": 8,
}
_ITS_LORA = {"preset": "qkv", "adapter_options": {"lora_dropout": 0.05}}
_CACHED = (
    "The tutorial read NVML once, after training and evaluation. NVML includes the CUDA context (0.3 to 0.5 GB) and "
    "all blocks that the allocator cached over an epoch of batches of different lengths and the evaluation (8 x 512, "
    "no gradient checkpointing). The estimate is the largest sum of tensor bytes at one moment. "
)
# NVIDIA states neither batch size nor length. Precision and adapters are those of its script. The micro-batch of
# 2 x 1,024 tokens is fitted to its row for 650M with LoRA, so only the other three rows test the estimate.
_AS_BIONEMO = {
    "padding": "padded",
    "device": "A100-80",
    "tokens": 1024,
    "precision": "bf16",
    "micro_batch": 2,
    "accumulation": 1,
}
_ITS_ADAPTERS = {"adapter_options": {"r": 32}}
_MEGATRON = (
    "Megatron needs 18 bytes per parameter (bfloat16 weight; float32 weight, gradient and two moments). Autocast needs "
    "16, so the estimate is lower by 2 bytes per parameter (5.7 GB for 3B)."
)

PUBLISHED = [
    ("tutorial: base", 22.6e9, TUTORIAL, "base", _AS_THE_TUTORIAL, ""),
    (
        "tutorial: accumulation",
        17.8e9,
        TUTORIAL,
        "ga",
        _AS_THE_TUTORIAL | {"micro_batch": 4, "accumulation": 2},
        _CACHED + "The tutorial does not state the micro-batch of this row; an earlier version of the notebook had 4.",
    ),
    (
        "tutorial: gradient checkpointing",
        10.2e9,
        TUTORIAL,
        "gc",
        _AS_THE_TUTORIAL,
        _CACHED
        + "The optimizer's temporary tensors have other sizes than a layer's activations and cannot reuse their "
        "cached blocks, so NVML shows the sum of both phases' peaks.",
    ),
    ("tutorial: LoRA", 18.6e9, TUTORIAL, "lora", _AS_THE_TUTORIAL | _ITS_LORA, ""),
    (
        "tutorial: all together",
        3.3e9,
        TUTORIAL,
        "frozen",
        _AS_THE_TUTORIAL,
        _CACHED + "The estimate follows the actual run: the adapters received no gradient, so no layer saved "
        "activations. Context and cached blocks are as large as the rest here.",
    ),
    ("BioNeMo: 650M", 15.86e9, BIONEMO, "base", _AS_BIONEMO | {"model": "650M"}, _MEGATRON),
    ("BioNeMo: 650M LoRA", 6.40e9, BIONEMO, "lora", _AS_BIONEMO | _ITS_ADAPTERS | {"model": "650M"}, ""),
    ("BioNeMo: 3B", 62.92e9, BIONEMO, "base", _AS_BIONEMO | {"model": "3B"}, _MEGATRON),
    (
        "BioNeMo: 3B LoRA",
        15.04e9,
        BIONEMO,
        "lora",
        _AS_BIONEMO | _ITS_ADAPTERS | {"model": "3B"},
        "Megatron's fused kernels save fewer activations per token than transformers' layers do.",
    ),
]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["8M", "35M"])
    parser.add_argument("--recipes", nargs="+", default=["base", "ga", "gc", "lora", "all"], choices=RECIPES)
    parser.add_argument("--precisions", nargs="+", default=["float32", "bf16"], choices=["float32", "bf16"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[128, 512], help="tokens per sequence")
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[1, 8], help="sequences per micro-batch")
    parser.add_argument("--encoders", nargs="+", default=["lean", "plain"], choices=["lean", "plain"])
    parser.add_argument("--published-only", action="store_true", help="measure nothing here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows to this file")
    return parser.parse_args()


def measure(
    size: str, recipe_name: str, encoder: str, precision: str, tokens: int, micro_batch: int, accumulation: int
) -> int:
    """Train for two optimizer steps and return the peak bytes of the second, from the allocator's events."""
    set_seed(0)
    recipe = RECIPES[recipe_name].replace(micro_batch=micro_batch, accumulation=accumulation)
    rows = 2 * recipe.batch_size
    ids = torch.randint(4, 24, (rows, tokens))
    mask = torch.ones_like(ids)
    if micro_batch > 1:  # the estimate also assumes padding in a batch of several sequences
        ids[:, -1], mask[:, -1] = 1, 0
    data = Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": mask.tolist(), "labels": [row % 2 for row in range(rows)]}
    ).with_format("torch")
    _, config = resolve_config(size)
    with (
        tempfile.TemporaryDirectory() as folder,
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        model = make_recipe_model(config, recipe, dtype=torch.bfloat16 if precision == "bf16" else None)
        if encoder == "lean":
            apply_lean_encoder(model)
        args = recipe_arguments(
            recipe, folder, precision=precision, max_steps=2, use_cpu=True, disable_tqdm=True, logging_strategy="no"
        )
        trainer = WeightedTrainer(model, args, train_dataset=data)
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        trainer.add_callback(Spans())
        trainer.train()
    peak = peak_within(profiler, "step 2")
    del trainer, model, profiler
    gc.collect()
    return peak


class Spans(transformers.TrainerCallback):
    """Marks each optimizer step in the profile with a span named after its number."""

    span: record_function | None = None

    def on_step_begin(self, args, state, control, **kwargs):
        """Open the span."""
        self.span = record_function(f"step {state.global_step + 1}")
        self.span.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        """Close the span."""
        self.span.__exit__(None, None, None)


def peak_within(profiler: profile, span: str) -> int:
    """Return the highest sum of bytes within a span, without bytes that were freed before it."""
    events = profiler.profiler.kineto_results.events()
    (begin, end), *_ = [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() == span]
    records = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    allocated = peak = 0
    for moment, change in records:
        allocated += change
        if moment <= begin:
            peak = allocated
        elif moment <= end:
            peak = max(peak, allocated)
    return peak


def measured_rows(options: argparse.Namespace) -> list[dict]:
    rows = []
    combinations = list(
        itertools.product(
            options.sizes, options.recipes, options.encoders, options.precisions, options.tokens, options.micro_batches
        )
    )
    for number, (size, recipe, encoder, precision, tokens, micro_batch) in enumerate(combinations, 1):
        accumulation = 2 if RECIPES[recipe].accumulation > 1 else 1
        padding = "equal-length" if micro_batch == 1 else "padded"
        predicted = estimate(
            size,
            recipe=recipe,
            device="cpu",
            precision=precision,
            # In a batch of several, measure() makes the last token of each sequence padding.
            tokens=tokens - (encoder == "lean" and micro_batch > 1),
            micro_batch=micro_batch,
            accumulation=accumulation,
            padding="padding-free" if encoder == "lean" else padding,
        )
        measured = measure(size, recipe, encoder, precision, tokens, micro_batch, accumulation)
        row = {
            "what": f"{size} {recipe} {encoder} {precision} {micro_batch} x {tokens} tokens",
            "predicted_bytes": predicted.peak.total,
            "measured_bytes": measured,
            "difference": predicted.peak.total / measured - 1,
            "peak_phase": predicted.peak_phase,
            "predicted": predicted.peak.to_dict(),
            "source": "torch.profiler memory records of a real step on this CPU",
        }
        rows.append(row)
        print(f"{number}/{len(combinations)} {row['what']}: {row['difference']:+.2%}", file=sys.stderr, flush=True)
    return rows


def published_rows() -> list[dict]:
    rows = []
    for what, measured, source, recipe, settings, explanation in PUBLISHED:
        # None of the runs had a cache, and every head read the first token.
        predicted = estimate(recipe=RECIPES[recipe].replace(cache=False, pooling="first"), **settings)
        rows.append(
            {
                "what": what,
                "predicted_bytes": predicted.peak.total,
                "measured_bytes": int(measured),
                "difference": predicted.peak.total / measured - 1,
                "peak_phase": predicted.peak_phase,
                "predicted": predicted.peak.to_dict(),
                "assumed": {"recipe": recipe, **settings},
                "explanation": explanation,
                "source": source,
            }
        )
    return rows


def show(rows: list[dict]) -> str:
    cells = [
        (
            row["what"],
            format_bytes(row["predicted_bytes"]),
            format_bytes(row["measured_bytes"]),
            f"{row['difference']:+.1%}",
            row["peak_phase"],
        )
        for row in rows
    ]
    return format_table(cells, ("what", "predicted", "measured", "difference", "predicted peak in"))


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(2)
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}, 2 threads"
    measured = [] if options.published_only else measured_rows(options)
    if measured:
        print(f"A real step on this CPU ({versions})\n\n{show(measured)}\n")
    published = published_rows()
    print(f"Peaks that others published\n\n{show(published)}\n")
    for row in published:
        if abs(row["difference"]) > EXPLAINED:
            print(f"- {row['what']} ({row['difference']:+.0%}): {row['explanation']}")
    for name, source in (("tutorial", TUTORIAL), ("BioNeMo", BIONEMO)):
        print(f"- source of {name}: {source}")
    if options.json is not None:
        options.json.write_text(
            json.dumps({"versions": versions, "rows": measured, "published": published}, indent=2) + "\n"
        )
    off = [row["what"] for row in measured if abs(row["difference"]) > TOLERANCE]
    if off:
        raise SystemExit(
            f"{len(off)} of {len(measured)} estimates differ from the measurement by more than {TOLERANCE:.0%}: "
            f"{', '.join(off)}"
        )


if __name__ == "__main__":
    main()
