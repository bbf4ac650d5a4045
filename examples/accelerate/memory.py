"""Predict the peak memory per GPU for large models, from `estimate` and arithmetic.

    python examples/accelerate/memory.py

Under DDP each GPU has the whole model, so the peak is that of `estimate`, plus DDP's copy of the gradients. Under FSDP2
each of n GPUs stores 1/n of weights, gradients and optimizer state. Activations and temporaries stay whole, because
each GPU computes its own sequences. Two encoder layers are whole in bf16: the one that computes and the next one. The
gradient of one layer is whole too. Nothing here is measured on a GPU.
"""

from __future__ import annotations

from esm_efficient import estimate, format_table
from esm_efficient.estimation.inputs import resolve_config
from esm_efficient.reporting.tables import format_bytes

CASES = [
    ("3B", "all", 4, "A10G", 4, "ddp"),
    ("3B", "gc", 1, "A100-80", 4, "ddp"),
    ("3B", "gc", 1, "A10G", 4, "fsdp2"),
    ("15B", "all", 4, "A100-80", 4, "ddp"),
    ("15B", "all", 4, "A10G", 4, "fsdp2"),
    ("15B", "gc", 1, "A100-80", 4, "fsdp2"),
    ("15B", "gc", 1, "A100-80", 8, "fsdp2"),
]
"""Model, recipe, sequences per GPU and micro-batch, GPU, number of GPUs, kind of parallelism."""


def peak_per_gpu(
    model: str, recipe: str, micro_batch: int, device: str, gpus: int, kind: str, *, tokens: int = 1024
) -> tuple[float, float]:
    """Return the predicted peak bytes per GPU, and the bytes of the GPU."""
    result = estimate(model, recipe=recipe, device=device, micro_batch=micro_batch, tokens=tokens, precision="bf16")
    peak = result.peak
    if kind == "ddp":
        return peak.total + peak.gradients, result.device.memory
    stored = (peak.weights + peak.gradients + peak.optimizer) / gpus
    layer = 2 * result.total_parameters / resolve_config(model)[1].num_hidden_layers
    whole = 2 * layer + layer * result.trainable_parameters / result.total_parameters
    return stored + peak.activations + peak.other + whole, result.device.memory


def main() -> None:
    rows = []
    for case in CASES:
        peak, memory = peak_per_gpu(*case)
        model, recipe, micro_batch, device, gpus, kind = case
        fits = "yes" if peak <= 0.9 * memory else "no"
        rows.append((model, recipe, micro_batch, f"{gpus} x {device}", kind, format_bytes(peak), fits))
    print(format_table(rows, ("model", "recipe", "micro-batch", "GPUs", "kind", "peak per GPU", "fits")))


if __name__ == "__main__":
    main()
