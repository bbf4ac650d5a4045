"""Measure what cached states save: time and memory of an epoch that trains the top layers alone.

    python examples/benchmarks/trunk.py --model 8M --json trunk.json

An epoch goes through proteins with DeepLoc's lengths (100 to 512 residues) in random batches of 8: collator, forward,
backward, AdamW, in float32 with LoRA r=8 on all linear layers and a new head, with the lean encoder on every side. For
each number k of top layers (0, a sixth, a third and a half of all), the sides are:

- ``all``: LoRA on all layers.
- ``top``: LoRA on the top k layers; the layers below are computed in every epoch. For k = 0 the head alone trains.
- ``cached``: the same on the cached states, which are read from disk.

The sides alternate in one process, with the same proteins and batches, and a figure is the median of ``--turns`` turns.
On a machine that does other work too, ``--clock cpu --threads 1`` measures the CPU seconds of this process instead.
Every turn also makes the states anew. Totals of 1, 3 and 10 epochs are computed from these medians: those of ``cached``
are the time to make the states, plus the epochs. ``saved`` are the bytes that the forward pass saves for the backward
pass, without parameters, and ``peak`` the peak bytes of making a batch, forward and backward, beyond weights, gradients
and optimizer state. The goals at a third of the layers compare ``cached`` with ``all``.

The last figure is that of the recipe ``frozen``: `finetune` for 10 epochs, from token ids to a trained head, against
one prediction pass of the whole model over the same proteins. All weights are random; a model whose name ends in
``-shape`` has that width and six layers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import platform
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import peft
import torch
import transformers
from measured_step import PERCENTILES, RANK, ROWS, Batch, compute_gradient, make_optimizer, peak_bytes
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainerCallback,
)

from esm_efficient import (
    RECIPES,
    PooledEsmForSequenceClassification,
    StatesCollator,
    apply_lean_encoder,
    cache_states,
    demo_model_path,
    finetune,
    format_table,
    lora_config,
    prepare_model,
    split_model,
    tokenize_dataset,
)
from esm_efficient.estimation.inputs import resolve_config
from esm_efficient.recipes import select_layers
from esm_efficient.reporting.tables import format_bytes

SHAPE_LAYERS = 6
EPOCHS = (1, 3, 10)
FROZEN_EPOCHS = 10
GOALS = {"residues_per_s_ratio": 2.5, "saved_ratio": 0.36, "frozen_ratio": 1.15}
SHARES = ("0", "1/6", "1/3", "1/2")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
LETTERS = np.array(list("ACDEFGHIKLMNPQRSTVWY"))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="8M", choices=["8M", "35M", "650M-shape", "demo"])
    parser.add_argument("--shares", nargs="+", default=list(SHARES), choices=SHARES, help="top layers that train")
    parser.add_argument("--batches", type=int, default=4, help="batches of 8 proteins per epoch")
    parser.add_argument("--frozen-batches", type=int, default=30, help="the same for the recipe frozen; 0 for none")
    parser.add_argument("--turns", type=int, default=5, help="measurements of each figure")
    parser.add_argument("--max-residues", type=int, default=512, help="residues at which sequences are cut")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock", default="wall", choices=CLOCKS, help="seconds that pass, or CPU seconds of the process"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    return parser.parse_args()


def make_config(name: str) -> transformers.PreTrainedConfig:
    if name == "demo":
        return AutoConfig.from_pretrained(demo_model_path())
    _, config = resolve_config(name.removesuffix("-shape"))
    if name.endswith("-shape"):
        config.num_hidden_layers = SHAPE_LAYERS
    return config


def draw_proteins(batches: int, options: argparse.Namespace) -> datasets.Dataset:
    """Draw random sequences with DeepLoc's lengths."""
    rng = np.random.default_rng(options.seed)
    lengths = np.interp(rng.random(batches * ROWS), np.linspace(0, 1, len(PERCENTILES)), PERCENTILES).astype(int)
    lengths = np.minimum(lengths, options.max_residues)
    sequences = ["".join(rng.choice(LETTERS, length)) for length in lengths]
    features = {"sequence": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    rows = {"sequence": sequences, "label": [number % 2 for number in range(len(sequences))]}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


class Side:
    """A model that trains, and the batches of its epoch."""

    def __init__(self, model: nn.Module, layers: int, data: datasets.Dataset, collator: Callable) -> None:
        adapters = lora_config(model, preset="all-linear", r=RANK, layers=f"top-{layers}") if layers else None
        model = prepare_model(model, adapters=adapters, head_only=not layers)
        torch.manual_seed(1)
        for path, parameter in sorted(model.named_parameters()):
            if "lora_B" in path:  # LoRA starts with B = 0, which makes the gradient of A zero
                nn.init.normal_(parameter, std=0.02)
            elif "lora_A" in path:
                nn.init.normal_(parameter, std=0.05)
        self.model = apply_lean_encoder(model).train()
        self.data, self.collator = data, collator
        self.optimizer = make_optimizer(self.model)

    def batch(self, number: int) -> Batch:
        """Read and collate a batch, as a DataLoader does."""
        inputs = dict(self.collator(list(self.data.select(range(number * ROWS, (number + 1) * ROWS)))))
        labels = inputs.pop("labels")
        return Batch(inputs, labels, 0)

    def epoch(self) -> None:
        for number in range(len(self.data) // ROWS):
            compute_gradient(self.model, self.batch(number))
            self.optimizer.step()
            self.optimizer.zero_grad()

    def gradient(self) -> torch.Tensor:
        """Return the gradient of the first batch as one vector, and leave one on every trainable parameter."""
        compute_gradient(self.model, self.batch(0))
        named = sorted((path, p.grad) for path, p in self.model.named_parameters() if p.grad is not None)
        return torch.cat([gradient.flatten().double() for _, gradient in named])

    def memory(self) -> dict[str, int]:
        """Return the bytes of weights, those saved for the backward pass, and the peak beyond both."""
        self.gradient()  # gradients are allocated before the measurement
        peak = peak_bytes(lambda: compute_gradient(self.model, self.batch(0)))
        saved = saved_bytes(self.model, self.batch(0))
        self.model.zero_grad()
        return {"weights": sum(p.nbytes for p in self.model.parameters()), "saved": saved, "peak": peak}


def saved_bytes(model: nn.Module, batch: Batch) -> int:
    """Return the bytes of the storages that a forward pass saves for the backward pass, without parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compute_gradient(model, batch)
    return sum(sizes.values())


def measure_layers(share: str, config: transformers.PreTrainedConfig, options: argparse.Namespace) -> dict:
    """Compare the sides with one number of top layers."""
    count = config.num_hidden_layers
    top = 0 if share == "0" else len(select_layers(f"top-{share}", count))
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    raw = datasets.DatasetDict(train=draw_proteins(options.batches, options))
    data = tokenize_dataset(raw, tokenizer)[0]["train"].remove_columns("tokens")
    collator = DataCollatorWithPadding(tokenizer)
    pooling = "tokens" if top else "first"
    with tempfile.TemporaryDirectory() as place:
        trunk, rest = split_model(make_model(config), top)
        states = cache_states(data, trunk, Path(place) / "kept", pooling=pooling)
        disk = sum(file.stat().st_size for file in Path(place).rglob("*.arrow"))
        sides = {
            "all": Side(make_model(config), count, data, collator),
            "top": Side(make_model(config), top, data, collator),
            "cached": Side(rest, top, states, StatesCollator(collator, trunk)),
        }
        expected, got = sides["top"].gradient(), sides["cached"].gradient()
        times: dict[str, list[float]] = {"states": [], **{name: [] for name in sides}}
        for side in sides.values():
            side.model.zero_grad()
            side.epoch()
        for turn in range(options.turns):
            again = Path(place) / "again"
            times["states"].append(taken(options, cache_states, data, trunk, again, pooling=pooling))
            shutil.rmtree(again)
            for name in list(sides) if turn % 2 else reversed(sides):
                times[name].append(taken(options, sides[name].epoch))
        memory = {name: side.memory() for name, side in sides.items()}
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "share": share,
        "top": top,
        "layers": count,
        "residues": sum(len(ids) - 2 for ids in data["input_ids"]),
        "seconds": times,
        "memory": memory,
        "disk_bytes": disk,
        "gradient_error": float((got - expected).norm() / expected.norm()),
        **{f"{name}_ratio": ratio(times[name], times["cached"]) for name in ("all", "top")},
        **{
            f"{what}_ratio_{name}": memory["cached"][what] / memory[name][what]
            for what, name in itertools.product(("saved", "peak", "weights"), ("all", "top"))
        },
        "totals": {
            epochs: {
                **{name: epochs * medians[name] for name in ("all", "top")},
                "cached": medians["states"] + epochs * medians["cached"],
            }
            for epochs in EPOCHS
        },
    }


def taken(options: argparse.Namespace, function: Callable, *args: object, **kwargs: object) -> float:
    """Call a function and return the seconds that it takes, by the chosen clock."""
    began = CLOCKS[options.clock]()
    function(*args, **kwargs)
    return CLOCKS[options.clock]() - began


def ratio(times: list[float], others: list[float]) -> float:
    """Return the median ratio of two sides, turn by turn."""
    return statistics.median(one / other for one, other in zip(times, others, strict=True))


def make_model(config: transformers.PreTrainedConfig) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa")


def measure_frozen(config: transformers.PreTrainedConfig, options: argparse.Namespace) -> dict:
    """Compare the recipe frozen, from token ids to a trained head, with one prediction pass."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    tokenizer.model_max_length = config.max_position_embeddings
    proteins = draw_proteins(options.frozen_batches, options)
    raw = datasets.DatasetDict(train=proteins, test=proteins.select(range(ROWS)))
    data = tokenize_dataset(raw, tokenizer)[0]
    collator = DataCollatorWithPadding(tokenizer)
    rows = data["train"].remove_columns("tokens")

    def make_frozen() -> nn.Module:
        torch.manual_seed(0)
        return PooledEsmForSequenceClassification(config, classifier_pooling=RECIPES["frozen"].pooling)

    model = apply_lean_encoder(make_frozen().eval())

    @torch.no_grad()
    def predict() -> None:
        for start in range(0, len(rows), 2 * ROWS):
            model(**collator(list(rows.select(range(start, min(start + 2 * ROWS, len(rows)))))))

    passes, runs = [], []
    predict()
    for _ in range(options.turns):
        passes.append(taken(options, predict))
        untrained = make_frozen()
        watch = TrainingClock(CLOCKS[options.clock])
        with tempfile.TemporaryDirectory() as place:
            finetune(
                untrained,
                data,
                recipe=RECIPES["frozen"],
                tokenizer=tokenizer,
                output_dir=place,
                num_train_epochs=FROZEN_EPOCHS,
                callbacks=[watch],
                probe=False,
                disable_tqdm=True,
                logging_strategy="no",
            )
        runs.append(watch)
    return {
        "proteins": len(rows),
        "epochs": FROZEN_EPOCHS,
        "prediction_seconds": passes,
        "states_seconds": [run.began - run.started for run in runs],
        "training_seconds": [run.ended - run.began for run in runs],
        "ratio": ratio([run.ended - run.started for run in runs], passes),
    }


class TrainingClock(TrainerCallback):
    """Note when a run started, when its training loop began, which is after the states are made, and when it ended."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.started, self.began, self.ended = clock(), math.nan, math.nan

    def on_train_begin(self, args, state, control, **kwargs):
        self.began = self.clock()

    def on_train_end(self, args, state, control, **kwargs):
        self.ended = self.clock()


def check_goals(rows: list[dict], frozen: dict | None) -> list[dict]:
    """Return each goal with its figure, and whether it is met."""
    figures = []
    for row in rows:
        if row["share"] == "1/3":
            figures.append(("residues_per_s_ratio", "residues/s, cached / all", row["all_ratio"], True))
            figures.append(("saved_ratio", "saved bytes, cached / all", row["saved_ratio_all"], False))
    if frozen is not None:
        figures.append(("frozen_ratio", "frozen, 10 epochs / prediction pass", frozen["ratio"], False))
    return [
        {
            "what": what,
            "figure": figure,
            "goal": GOALS[goal],
            "met": figure >= GOALS[goal] if more else figure <= GOALS[goal],
        }
        for goal, what, figure, more in figures
    ]


def show(rows: list[dict]) -> str:
    """Return the table of all numbers of layers."""
    cells = []
    for row in rows:
        totals, medians = row["totals"], {name: statistics.median(values) for name, values in row["seconds"].items()}
        cells.append(
            (
                f"{row['top']} of {row['layers']}",
                *(f"{medians[name]:.2f} s" for name in ("all", "top", "cached", "states")),
                *(f"{row[f'{name}_ratio']:.2f}" for name in ("all", "top")),
                *(
                    f"{totals[n]['all'] / totals[n]['cached']:.2f} / {totals[n]['top'] / totals[n]['cached']:.2f}"
                    for n in EPOCHS
                ),
                *(
                    f"{row[f'{what}_ratio_all']:.2f} / {row[f'{what}_ratio_top']:.2f}"
                    for what in ("saved", "peak", "weights")
                ),
                format_bytes(row["disk_bytes"]),
                f"{row['gradient_error']:.0e}",
            )
        )
    header = ["top layers", "all", "top", "cached", "states", "speed / all", "speed / top"]
    header += [f"{n} epoch{'s' * (n > 1)}" for n in EPOCHS] + ["saved", "peak", "weights", "disk", "gradient error"]
    return format_table(cells, header)


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    logging.getLogger("esm_efficient").setLevel(logging.WARNING)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    config = make_config(options.model)
    versions = {library.__name__: library.__version__ for library in (torch, transformers, peft, datasets)}
    print(
        f"{options.model}: {config.num_hidden_layers} layers of width {config.hidden_size}, random weights; "
        f"{options.batches} x {ROWS} proteins per epoch, {options.turns} turns; {options.threads} thread(s), "
        f"{options.clock} clock, {platform.machine()}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items()),
        flush=True,
    )
    rows = []
    for share in options.shares:
        rows.append(measure_layers(share, config, options))
        print(f"top {rows[-1]['top']}: {rows[-1]['all_ratio']:.2f} x residues/s of all layers", flush=True)
    frozen = measure_frozen(config, options) if options.frozen_batches else None
    goals = check_goals(rows, frozen)
    print("\nRatios are `all` / `top`: speed and times of them over cached, bytes of cached over theirs.\n")
    print(show(rows) + "\n")
    for goal in goals:
        print(f"{goal['what']}: {goal['figure']:.2f}, goal {goal['goal']}: {'met' if goal['met'] else 'missed'}")
    if options.json:
        settings = {key: str(value) for key, value in vars(options).items()}
        record = {"settings": settings, "versions": versions, "rows": rows, "frozen": frozen, "goals": goals}
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
