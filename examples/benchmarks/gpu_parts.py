"""The parts of gpu.py: each function measures one thing, and records a row for every figure or failure."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import re
import statistics
import subprocess
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from gpu_rows import (
    DEVICE,
    DTYPES,
    ENCODERS,
    EVEN,
    HALF,
    MIXED,
    Rows,
    Settings,
    Trained,
    allocated,
    release_memory,
    synchronize,
)
from measured_step import Batch, gradient_vector, seconds
from profiler_overhead import compare
from torch import nn
from torch.profiler import ProfilerActivity, profile

from esm_efficient import RECIPES, ConfigurationError, Device, estimate, measure_device
from esm_efficient.costs.devices import native_precision
from esm_efficient.encoder.attention import BACKENDS, attend, choose_backend
from esm_efficient.encoder.fusion import COMPILED
from esm_efficient.encoder.packing import Packing

ROOT = Path(__file__).resolve().parents[2]
PLAIN_AND_LEAN: dict[str, dict] = {name: {"encoder": name} for name in ENCODERS}
WITH_AND_WITHOUT_FUSION: dict[str, dict] = {"lean": {"encoder": "lean"}, "fused": {"encoder": "lean", "fused": True}}


def machine(rows: Rows, settings: Settings) -> None:
    """Versions, the device and its measured rates, and what "auto" chooses."""
    with rows.row(what="versions") as row:
        names = ("torch", "transformers", "peft", "accelerate", "triton", "flash-attn", "bitsandbytes", "torchao")
        for name in names:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                row[name] = importlib.metadata.version(name)
    with rows.row(what="device") as row:
        if DEVICE.type == "cuda":
            row |= {"name": torch.cuda.get_device_name(), "cuda": torch.version.cuda or ""}
            row["capability"] = "{}.{}".format(*torch.cuda.get_device_capability())
        row |= {"precision": native_precision(DEVICE), "cpus": os.cpu_count()}
        row["measured"] = dataclasses.asdict(measure_device(DEVICE))
    for name, dtype in DTYPES.items():
        with rows.row(what="attention", precision=name) as row:
            for width in (16, 24, 64):
                row[f"width {width}"] = choose_backend("auto", DEVICE, dtype or torch.float32, width)


def compare_recipes(rows: Rows, settings: Settings, size: str, precision: str, recipes: tuple[str, ...]) -> None:
    """Steps of recipes, plain and lean: time and peak for proteins of many lengths, and for proteins of one length.

    The recipe ``frozen`` trains without its cache.
    """
    for recipe in settings.some(recipes):
        names = {"size": size, "recipe": recipe, "precision": precision}
        before = allocated()
        try:
            trained = Trained(settings.config(size), recipe, precision)
            for what, lengths in (("mixed", MIXED), ("even", EVEN)):
                batches = trained.micro_batches(settings.residues(lengths))
                measure_sides(rows, trained, batches, before, settings.steps, names | {"what": what})
            del trained, batches
        except Exception as error:  # written down by name: one failure must not take the other rows
            rows.add_failed(error, names)
        release_memory()


def measure_sides(
    rows: Rows,
    trained: Trained,
    batches: list[Batch],
    before: int,
    steps: int,
    names: dict[str, str],
    sides: dict[str, dict] = PLAIN_AND_LEAN,
) -> None:
    """Measure two encoders in alternating steps; a side that fails leaves the other."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    peaks: dict[str, int] = {}
    for name, options in sides.items():
        trained.use(**options)
        try:
            trained.step(batches)  # creates the optimizer's state and compiles what is compiled
            peaks[name] = trained.peak_bytes(batches, before)
        except Exception as error:  # the other side is still measured
            rows.add_failed(error, names | {"encoder": name})
        trained.optimizer.zero_grad()
        release_memory()
    for _ in range(steps):
        for name in peaks:
            trained.use(**sides[name])
            trained.step(batches)  # so that nothing is left of the other side in the caches
            times[name].append(seconds(lambda: trained.step(batches)))
    first, second = sides
    for name in peaks:
        with rows.row(**names, encoder=name) as row:
            row |= {"ms": 1e3 * statistics.median(times[name]), "peak_bytes": peaks[name]}
            if len(peaks) > 1 and name == second:
                pairs = zip(times[first], times[second], strict=True)
                row["speedup"] = statistics.median(slow / fast for slow, fast in pairs)
                row["peak_ratio"] = peaks[second] / peaks[first]


def recipes_650m(rows: Rows, settings: Settings) -> None:
    """Every recipe with ESM-2 650M in half precision."""
    compare_recipes(rows, settings, "650M", HALF, ("lora", "base", "all", "frozen", "gc", "ga"))


def recipes_8m(rows: Rows, settings: Settings) -> None:
    """Every recipe with ESM-2 8M in half precision: launches limit a small model."""
    compare_recipes(rows, settings, "8M", HALF, ("lora", "base", "all", "frozen", "gc", "ga"))


def fp16(rows: Rows, settings: Settings) -> None:
    """Recipes in fp16 with a loss scale, as on a T4."""
    compare_recipes(rows, settings, "8M", "fp16", ("lora", "base"))
    compare_recipes(rows, settings, "650M", "fp16", ("lora",))


def cuda_tests(rows: Rows, settings: Settings) -> None:
    """The tests that need a GPU. They are skipped on a CPU, where one file shows that the command works."""
    files = sorted(str(f.relative_to(ROOT)) for f in ROOT.glob("tests/**/test_*.py") if "mark.cuda" in f.read_text())
    with rows.row(what="pytest") as row:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "cuda",
            "-p",
            "no:cacheprovider",
            "--tb=line",
            "-rfE",
            "-o",
            "addopts=",
        ]
        command += [f for f in files if "costs" in f] if settings.tiny else files
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        run = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
        lines = run.stdout.strip().splitlines()
        counts = re.findall(r"(\d+) (passed|failed|errors?|skipped)", lines[-1])
        row |= {"status": run.returncode, "last line": lines[-1][:200]}
        row |= {kind: int(number) for number, kind in counts}
        row["failures"] = [line[:300] for line in lines if line.startswith(("FAILED ", "ERROR "))]
        if run.returncode:
            raise RuntimeError(f"pytest ended with status {run.returncode}")


def launches(rows: Rows, settings: Settings) -> None:
    """What a step launches, by torch's profiler, and where it makes the host wait."""
    for recipe in ("lora", "base"):
        trained = Trained(settings.config("650M"), recipe, HALF)
        batches = trained.micro_batches(settings.residues(MIXED))
        for encoder in ENCODERS:
            with rows.row(recipe=recipe, encoder=encoder) as row:
                trained.use(encoder)
                row |= profiled(trained, batches)
                if DEVICE.type == "cuda":
                    row["waits"] = waits(lambda trained=trained, batches=batches: trained.backward(batches))
                    trained.optimizer.zero_grad()
        del trained


def fusion(rows: Rows, settings: Settings) -> None:
    """The lean encoder with its elementwise functions fused and not: steps in turns, and what each side launches."""
    for recipe in settings.some(("lora", "base")):
        names = {"size": "650M", "recipe": recipe, "precision": HALF}
        before = allocated()
        trained = Trained(settings.config("650M"), recipe, HALF)
        batches = trained.micro_batches(settings.residues(MIXED))
        measure_sides(rows, trained, batches, before, settings.steps, names, WITH_AND_WITHOUT_FUSION)
        for name, options in WITH_AND_WITHOUT_FUSION.items():
            with rows.row(**names, encoder=name, what="launches") as row:
                trained.use(**options)
                row |= profiled(trained, batches)
        del trained, batches
    with rows.row(what="compiled") as row:
        row["functions"] = [function.name for function in COMPILED if function.can_compile]
        if len(row["functions"]) < len(COMPILED):
            raise RuntimeError(f"torch.compile compiled only {row['functions']}: the log says why")


def profiled(trained: Trained, batches: list[Batch]) -> dict:
    """Return what a step launches; the step before it compiles what is compiled."""
    trained.step(batches)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if DEVICE.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        trained.step(batches)
    return launched(profiler.events())


def launched(events: list) -> dict:
    """Count a profile's events: kernels and their time on a GPU, and operations that no other operation calls."""

    def is_outermost(event) -> bool:
        while event.cpu_parent is not None:
            event = event.cpu_parent
            if event.name.startswith("aten::"):
                return False
        return True

    on_gpu = [event for event in events if str(event.device_type).endswith("CUDA")]
    kernels = [event for event in on_gpu if not event.name.startswith(("Memcpy", "Memset"))]
    by_name: dict[str, float] = {}
    for event in kernels:
        name = event.name[:60]
        by_name[name] = by_name.get(name, 0.0) + event.time_range.elapsed_us() / 1e3
    return {
        "operations": sum(event.name.startswith("aten::") and is_outermost(event) for event in events),
        "kernels": len(kernels),
        "copies": sum(event.name.startswith("Memcpy") for event in on_gpu),
        "launch calls": sum(bool(re.match(r"cu(da)?LaunchKernel", event.name)) for event in events),
        "device_ms": sum(event.time_range.elapsed_us() for event in on_gpu) / 1e3,
        "longest_ms": dict(sorted(by_name.items(), key=lambda item: -item[1])[:8]),
    }


def waits(function: Callable[[], None]) -> dict[str, int]:
    """Return the lines that make the host wait for the GPU, and how often."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = [f"{Path(w.filename).name}:{w.lineno}" for w in seen if "synchroniz" in str(w.message)]
    return {place: places.count(place) for place in dict.fromkeys(places)}


def estimates(rows: Rows, settings: Settings) -> None:
    """The estimate of steps that were measured, on the device as it was measured, and the ratio of both."""
    [measured] = [row["measured"] for row in rows.of("machine") if row["what"] == "device"]
    rates = measured["flops_per_second"]
    rates.setdefault({"bf16": "bfloat16", "fp16": "float16"}[HALF], rates["float32"])  # a CPU is measured in float32
    device = Device(**measured)
    kernels = {(row["recipe"], row["encoder"]): row["kernels"] for row in rows.of("launches")}
    for found in rows.of("recipes_650m"):
        if found["what"] != "even":
            continue
        recipe, encoder = RECIPES[found["recipe"]], found["encoder"]
        with rows.row(size=found["size"], recipe=recipe.name, encoder=encoder) as row:
            tokens = (settings.residues(EVEN) + 2).tolist()
            predicted = estimate(
                settings.config(found["size"]),
                recipe=recipe.replace(encoder=encoder, cache=False),
                device=device,
                precision=found["precision"],
                tokens=tokens if encoder == "lean" else max(tokens),
            )
            row |= {"predicted_bytes": predicted.peak.total, "measured_bytes": found["peak_bytes"]}
            row["bytes_ratio"] = predicted.peak.total / found["peak_bytes"]
            row |= {"predicted_ms": 1e3 * predicted.seconds, "measured_ms": found["ms"]}
            row["ms_ratio"] = 1e3 * predicted.seconds / found["ms"]
            row["limited by"] = "host" if predicted.is_host_bound else "device"
            row |= {"predicted_kernels": predicted.kernels, "measured_kernels": kernels.get((recipe.name, encoder))}


def gradients(rows: Rows, settings: Settings) -> None:
    """Gradients of the lean encoder against those of transformers in float32; bf16 beside what bf16 itself costs."""
    for recipe in ("lora", "base"):
        trained = Trained(settings.config("8M"), recipe, "float32")
        for path, parameter in trained.model.named_parameters():
            if "lora_B" in path:  # LoRA starts with B = 0, which makes the gradient of A zero
                nn.init.normal_(parameter, std=0.02)
        [batch] = trained.micro_batches(settings.residues(MIXED))
        trained.use("plain")
        expected = gradient_vector(trained.model, batch)
        for encoder, precision in (("lean", "float32"), ("plain", "bf16"), ("lean", "bf16")):
            with rows.row(recipe=recipe, encoder=encoder, precision=precision) as row:
                trained.use(encoder)
                with torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16"):
                    found = gradient_vector(trained.model, batch)
                row["relative_error"] = float((found - expected).norm() / expected.norm())
                if precision == "float32" and row["relative_error"] > 1e-5:
                    raise RuntimeError(f"the gradient is off by {row['relative_error']:.1e}: expected at most 1e-5")


def recompute(rows: Rows, settings: Settings) -> None:
    """The lean encoder's ways to recompute."""
    for recipe in ("lora", "base"):
        before = allocated()
        trained = Trained(settings.config("650M"), recipe, HALF)
        batches = trained.micro_batches(settings.residues(MIXED))
        for name in ("none", "mlp", "layer"):
            with rows.row(recipe=recipe, recompute=name) as row:
                trained.use("lean", recompute=name)
                trained.step(batches)
                row["peak_bytes"] = trained.peak_bytes(batches, before)
                times = [seconds(lambda t=trained, b=batches: t.step(b)) for _ in range(settings.steps)]
                row["ms"] = 1e3 * statistics.median(times)
        del trained, batches


def attention(rows: Rows, settings: Settings) -> None:
    """Every attention backend that is available: its error against float32, and the time of both passes."""
    lengths = tuple((settings.residues(MIXED) + 2).tolist())
    for width in settings.some((64, 16, 24)):
        for precision, dtype in DTYPES.items():
            for backend in BACKENDS[1:]:
                # Flex attention compiles for every width, which takes long.
                if backend == "flex" and (width != 64 or DEVICE.type == "cpu"):
                    continue
                with contextlib.suppress(ConfigurationError):
                    choose_backend(backend, DEVICE, dtype or torch.float32, width)
                    with rows.row(backend=backend, precision=precision, width=str(width)) as row:
                        row |= attend_once(backend, dtype or torch.float32, lengths, width, settings.steps)


def attend_once(backend: str, dtype: torch.dtype, lengths: tuple[int, ...], width: int, steps: int) -> dict[str, float]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    states = torch.randn(sum(lengths), 3, 20, width, device=DEVICE, generator=generator).to(dtype)

    def run(states: torch.Tensor, backend: str) -> list[torch.Tensor]:
        states = states.detach().requires_grad_()
        result = attend(states, None, Packing((len(lengths), max(lengths)), lengths), backend=backend)
        result.backward(torch.ones_like(result))
        synchronize()
        return [result.detach().float(), states.grad.float()]

    expected, found = run(states.float(), "sequences"), run(states, backend)
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
    times = [seconds(lambda: run(states, backend)) for _ in range(steps)]
    return {"output_error": errors[0], "gradient_error": errors[1], "ms": 1e3 * statistics.median(times)}


def profiler(rows: Rows, settings: Settings) -> None:
    """The cost of the profiler per step, as in profiler_overhead.py."""
    steps, tokens = (11, 16) if settings.tiny else (61, 512)
    options = Namespace(steps=steps, real_steps=11 if settings.tiny else 21, tokens=tokens)
    for size, recipe in settings.some((("650M", "lora"), ("8M", "lora"), ("8M", "base"))):
        with rows.row(size=size, recipe=recipe) as row:
            figures = compare(settings.config(size), recipe, options, DEVICE.type)
            row |= {key: value for key, value in figures.items() if not isinstance(value, list)}


def run_part(name: str, rows: Rows, settings: Settings) -> None:
    """Run a part; an error outside its rows becomes a row of its own."""
    try:
        globals()[name](rows, settings)
    except Exception as error:  # the next part still runs
        rows.add_failed(error, {"what": name})
    release_memory()
