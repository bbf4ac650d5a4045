"""Draw the plots of the pages that explain: accumulation with class weights, adapters under checkpointing, memory.

    python examples/explanations.py docs/pages/images

The script needs no network and no GPU: it takes the demo model and the demo table, and `estimate`.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed
from transformers.utils import logging as transformers_logging

from esm_efficient import (
    RECIPES,
    demo_model_path,
    estimate,
    load_deeploc,
    lora_config,
    prepare_model,
    tokenize_dataset,
    write_demo_table,
)
from esm_efficient.reporting.plots import memory_plot, new_figure, plain_text, svg_of

BATCH = 32
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
DRAWS = 200
MEMORY = {"model": "650M", "device": "A10G", "tokens": 512}
SIZES = ("8M", "35M", "150M", "650M", "3B")
SIZED = {"base": "#999999", "top": "#0072b2", "all": "#d55e00"}
GPUS = (8, 16, 24)
GIB = 2**30


def load_model() -> torch.nn.Module:
    """Return the demo model with a new head."""
    set_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(demo_model_path(), num_labels=2)


def load_batch() -> list[dict]:
    """Return the tokens and labels of the first sequences of the shuffled training split of the demo table."""
    with tempfile.TemporaryDirectory() as folder:
        data = load_deeploc(write_demo_table(Path(folder) / "table.csv"))
        tokenized, _ = tokenize_dataset(data, AutoTokenizer.from_pretrained(demo_model_path()))
        return [tokenized["train"][index] for index in range(BATCH)]


def example_gradients(model: torch.nn.Module, examples: list[dict]) -> np.ndarray:
    """Return the gradient of the loss of each example, of shape (examples, parameters)."""
    rows = []
    for example in examples:
        model.zero_grad()
        model(
            input_ids=torch.tensor([example["input_ids"]]),
            attention_mask=torch.ones(1, len(example["input_ids"]), dtype=torch.long),
            labels=torch.tensor([example["labels"]]),
        ).loss.backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).numpy())
    return np.stack(rows)


def accumulation_errors() -> dict[int, np.ndarray]:
    """Return the relative error of the gradient if the weighted means of micro-batches are averaged.

    A batch of 32 sequences is divided at random into micro-batches. The classes have balanced weights. The error is
    that of the whole gradient vector, against the weighted mean over the batch.

    Returns:
        Errors of 200 divisions by size of a micro-batch.
    """
    examples = load_batch()
    labels = np.array([example["labels"] for example in examples])
    weights = (len(labels) / (2 * np.bincount(labels)))[labels]
    gradients = example_gradients(load_model(), examples)
    exact = weights @ gradients / weights.sum()
    inner, rng = gradients @ gradients.T, np.random.default_rng(0)
    errors: dict[int, list[float]] = {size: [] for size in MICRO_BATCHES}
    for size in MICRO_BATCHES:
        for _ in range(DRAWS):
            parts = rng.permutation(BATCH).reshape(-1, size)
            shares = np.zeros(BATCH)
            for part in parts:
                shares[part] = weights[part] / weights[part].sum() / len(parts)
            wrong = shares - weights / weights.sum()  # the error as a combination of the examples' gradients
            errors[size].append(np.sqrt(max(wrong @ inner @ wrong, 0)) / np.linalg.norm(exact))
    return {size: np.array(values) for size, values in errors.items()}


def adapter_gradients() -> dict[str, list[float]]:
    """Return the norm of the adapters' gradient by layer, with and without a gradient at the embeddings' output.

    The model is checkpointed in the reentrant way. Old versions of transformers left out the hook that makes the
    embeddings' output require a gradient.
    """
    found = {}
    example = load_batch()[0]
    for name in ("embeddings without a gradient", "prepare_model"):
        model = load_model()
        adapted = prepare_model(model, adapters=lora_config(model, r=8))
        model.gradient_checkpointing_enable({"use_reentrant": True})
        if name != "prepare_model":
            model.disable_input_require_grads()
        adapted.train()
        batch = {"input_ids": torch.tensor([example["input_ids"]]), "labels": torch.tensor([example["labels"]])}
        adapted(**batch).loss.backward()
        layers = [0.0] * model.config.num_hidden_layers
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_B" in parameter_name and parameter.grad is not None:
                layers[int(parameter_name.split(".layer.")[1].split(".")[0])] += float(parameter.grad.square().sum())
        found[name] = [square**0.5 for square in layers]
    return found


@plain_text
def accumulation_plot() -> str:
    """Plot the error of the gradient by the size of a micro-batch."""
    errors = accumulation_errors()
    figure, [[axes]] = new_figure(7, 3.6)
    low, middle, high = np.quantile(list(errors.values()), (0.05, 0.5, 0.95), axis=1)
    places = range(len(errors))
    axes.fill_between(places, low, high, color="#d55e00", alpha=0.2, linewidth=0, label="90 % of the divisions")
    axes.plot(places, middle, color="#d55e00", marker="o", label="mean of the micro-batches' weighted means (median)")
    axes.axhline(0, color="#0072b2", label="WeightedTrainer, to rounding")
    axes.set_xticks(places, [f"{size} x {BATCH // size}" for size in errors])
    axes.set_xlabel("micro-batch x accumulation")
    axes.set_ylabel("relative error of the gradient")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return svg_of(figure)


@plain_text
def adapters_plot() -> str:
    """Plot the norm of the adapters' gradient by layer, for both orders."""
    found = adapter_gradients()
    figure, [[axes]] = new_figure(7, 3.2)
    for shift, (name, norms), colour in zip((-0.2, 0.2), found.items(), ("#d55e00", "#0072b2"), strict=True):
        bars = axes.bar([layer + shift for layer in range(len(norms))], norms, 0.38, color=colour, label=name)
        axes.bar_label(bars, [f"{norm:.2g}" for norm in norms], fontsize=8)
    axes.set_xticks(range(len(norms)), [f"layer {layer}" for layer in range(len(norms))])
    axes.set_ylabel("norm of the adapters' gradient")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return svg_of(figure)


def recipes_plot() -> str:
    """Plot the peak memory of each recipe by category."""
    stacks, capacity = {}, 0
    for name in RECIPES:
        found = estimate(MEMORY["model"], recipe=name, device=MEMORY["device"], tokens=MEMORY["tokens"])
        stacks[name] = found.peak.to_dict()
        capacity = found.device.memory
    return memory_plot(stacks, capacity=capacity)


@plain_text
def sizes_plot() -> str:
    """Plot the peak memory of three recipes by the size of the model, with the memory of usual GPUs."""
    figure, [[axes]] = new_figure(7, 3.8)
    for shift, (recipe, colour) in zip((-0.26, 0, 0.26), SIZED.items(), strict=True):
        peaks = [estimate(size, recipe=recipe, device=MEMORY["device"], tokens=MEMORY["tokens"]).peak for size in SIZES]
        heights = [peak.total / GIB for peak in peaks]
        bars = axes.bar([n + shift for n in range(len(SIZES))], heights, 0.24, color=colour, label=recipe)
        axes.bar_label(bars, [f"{height:.2g}" for height in heights], fontsize=8)
    for memory in GPUS:
        axes.axhline(memory, color="#999999", linewidth=0.8, linestyle="--")
        axes.annotate(f"{memory} GiB", (-0.45, memory), (0, 2), fontsize=8, textcoords="offset points")
    axes.set_yscale("log")
    axes.set_yticks((0.1, 1, 10), ("0.1", "1", "10"))
    axes.set_xticks(range(len(SIZES)), SIZES)
    axes.set_xlabel("size of ESM-2")
    axes.set_ylabel("peak memory in GiB")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return svg_of(figure)


PLOTS = {"sizes": sizes_plot, "accumulation": accumulation_plot, "adapters": adapters_plot, "memory": recipes_plot}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder for the SVG files")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers_logging.set_verbosity_error()
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, plot in PLOTS.items():
        (options.folder / f"explain_{name}.svg").write_text(plot())


if __name__ == "__main__":
    main()
