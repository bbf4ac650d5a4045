"""What the parts of gpu.py share: the rows that they record, and a model that trains as a recipe does."""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measured_step import Batch, make_batch, make_optimizer, make_recipe_model, peak_bytes
from torch import nn
from torch.nn import functional as F
from transformers import EsmConfig

from esm_efficient import RECIPES, apply_lean_encoder, remove_lean_encoder
from esm_efficient.costs.devices import native_precision
from esm_efficient.estimation.inputs import resolve_config

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = "fp16" if native_precision(DEVICE) == "fp16" else "bf16"
"""The half precision of the device."""
DTYPES = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
ENCODERS = ("plain", "lean")
# Eight proteins as DeepLoc has them, 306 residues on average, and eight of almost one length. In every micro-batch of
# two or more one is shorter than the other or both are equal, as the estimate assumes for padded batches.
MIXED = (502, 399, 367, 342, 304, 249, 185, 100)
EVEN = (306, *(305,) * 7)


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    tiny: bool
    steps: int

    def config(self, size: str) -> EsmConfig:
        """Return the config of a size, or a tiny one."""
        _, config = resolve_config(size)
        if self.tiny:
            config.hidden_size, config.intermediate_size, config.num_attention_heads = 32, 64, 2
            config.num_hidden_layers = 2
        return config

    def some(self, choices: tuple) -> tuple:
        """Return all choices, or the first alone."""
        return choices[:1] if self.tiny else choices

    def residues(self, lengths: tuple[int, ...]) -> np.ndarray:
        """Return the lengths of a batch's sequences."""
        return np.array(lengths) // (16 if self.tiny else 1)


class Rows:
    """Writes a line for the beginning, for each row and for the end of a part; reads rows of earlier parts."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.part = ""

    def begin(self, part: str) -> None:
        self.part = part
        self._write({"part": part, "status": "started"})

    def end(self) -> None:
        self._write({"part": self.part, "status": "done"})

    def of(self, part: str) -> list[dict]:
        """Return the rows of an earlier part, without those that failed."""
        lines = map(json.loads, self.file.read_text().splitlines())
        return [line["row"] for line in lines if line["part"] == part and "row" in line and "error" not in line["row"]]

    @contextlib.contextmanager
    def row(self, **names: str) -> Iterator[dict]:
        """Record the figures that the block puts into the row, or its error; the next row goes on in both cases."""
        row: dict = dict(names)
        try:
            yield row
        except Exception as error:  # written down by name: one failure must not take the other rows
            self.add_failed(error, row)
        else:
            self._write({"part": self.part, "row": row})
        release_memory()

    def add_failed(self, error: Exception, row: dict) -> None:
        """Record an error. After an error of CUDA itself nothing works in this process any more, so it ends."""
        frames = traceback.extract_tb(error.__traceback__)[-3:]
        row["error"] = f"{type(error).__name__}: {str(error).strip()[:300]}"
        row["at"] = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames]
        self._write({"part": self.part, "row": row})
        if "CUDA error" in str(error):
            sys.exit(row["error"])

    def _write(self, line: dict) -> None:
        with self.file.open("a") as stream:
            stream.write(json.dumps(line) + "\n")


def synchronize() -> None:
    """Wait until the device has finished."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def release_memory() -> None:
    """Give the memory of objects that are gone back to the device."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


class Trained:
    """A model with a recipe's trainable part, its optimizer and its batches; the encoder can be changed."""

    def __init__(self, config: EsmConfig, recipe: str, precision: str) -> None:
        self.recipe, self.dtype = RECIPES[recipe], DTYPES[precision]
        with DEVICE:
            self.model = make_recipe_model(config, self.recipe, dtype=self.dtype)
        self.optimizer = make_optimizer(self.model)
        self.scaler = torch.amp.GradScaler(DEVICE.type, enabled=precision == "fp16")

    def use(self, encoder: str, **options: Any) -> None:
        """Run with the lean encoder or with that of transformers."""
        if encoder == "lean":
            apply_lean_encoder(self.model, **options)
        else:
            remove_lean_encoder(self.model)

    def micro_batches(self, residues: np.ndarray) -> list[Batch]:
        """Return the batch of an optimizer step on the device, divided as the recipe divides it."""
        rng = np.random.default_rng(0)
        parts = np.split(residues, self.recipe.accumulation)
        return [on_device(make_batch(part, rng)) for part in parts]

    def backward(self, batches: list[Batch]) -> None:
        for batch in batches:
            with torch.autocast(DEVICE.type, self.dtype, enabled=self.dtype is not None):
                logits = self.model(**batch.inputs).logits
            self.scaler.scale(F.cross_entropy(logits.float(), batch.labels) / len(batches)).backward()

    def step(self, batches: list[Batch]) -> None:
        """Take an optimizer step as Trainer does, and wait for the device."""
        self.backward(batches)
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.grad is not None], 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        synchronize()

    def peak_bytes(self, batches: list[Batch], before: int) -> int:
        """Return the peak of a step, with weights and optimizer state.

        Args:
            batches: the micro-batches.
            before: bytes on the GPU that do not belong to this model.
        """
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.step(batches)
            return torch.cuda.max_memory_allocated() - before
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = [*self.model.parameters(), *self.model.buffers(), *filter(torch.is_tensor, states)]
        kept = {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
        return sum(kept.values()) + peak_bytes(lambda: self.step(batches))


def on_device(batch: Batch) -> Batch:
    inputs = {name: tensor.to(DEVICE) for name, tensor in batch.inputs.items()}
    return Batch(inputs, batch.labels.to(DEVICE), batch.residues)


def allocated() -> int:
    return torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0
