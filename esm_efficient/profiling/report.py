"""Costs of a profiled run, as a record and as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from esm_efficient.costs.memory import CATEGORIES, Memory
from esm_efficient.profiling.growth import Growth
from esm_efficient.reporting import format_bytes, format_number, format_table


@dataclass(frozen=True)
class PhaseFigures:
    """Costs of one phase of training on one rank.

    Attributes:
        peak: bytes of tensors at the highest moment of the phase, by category.
        reserved: most bytes that torch's allocator had reserved on the device; 0 where it does not count them.
        seconds: time in the phase after the warm-up, summed over all steps.
    """

    peak: Memory
    reserved: int
    seconds: float


@dataclass(frozen=True)
class ProfileReport:
    """Costs of a run on one rank.

    Rates do not include the warm-up steps. A rate that could not be measured is NaN. If the model gets pooled states,
    as of a head that trains alone on the first token, the rates of tokens are NaN.

    Attributes:
        device: such as ``"cuda:0"``.
        counted: what `PhaseFigures.peak` counts, and how it was split into categories.
        phases: figures by phase; a phase that did not occur is left out.
        peak_phase: the phase with the highest peak.
        steps: optimizer steps, warm-up included.
        warmup_steps: optimizer steps that no rate includes.
        samples_per_second: training sequences per second.
        residues_per_second: training residues per second, without padding and special tokens.
        tokens_per_second: tokens per second, padding included.
        non_padding: share of the tokens that are not padding.
        model_flops_per_second: FLOP/s for the tokens that are not padding, without recomputation.
        matmul_flops_per_second: FLOP/s measured in one large matrix product of the same dtype on the device.
        driver_bytes: bytes that all processes use on the device at the end; None without a GPU.
        driver: source of `driver_bytes`.
        resident_bytes: peak resident memory of the process, with Python and libraries.
        growth: memory that each step leaves behind, or None.
        rank: rank of this process.
        ranks: number of processes.
    """

    device: str
    counted: str
    phases: Mapping[str, PhaseFigures]
    peak_phase: str
    steps: int
    warmup_steps: int
    samples_per_second: float = math.nan
    residues_per_second: float = math.nan
    tokens_per_second: float = math.nan
    non_padding: float = math.nan
    model_flops_per_second: float = math.nan
    matmul_flops_per_second: float = math.nan
    driver_bytes: int | None = None
    driver: str = ""
    resident_bytes: int = 0
    growth: Growth | None = None
    rank: int = 0
    ranks: int = 1

    @property
    def peak(self) -> Memory:
        """Bytes of tensors at the highest moment of the run, by category."""
        return self.phases[self.peak_phase].peak if self.phases else Memory()

    @property
    def reserved(self) -> int:
        """Most bytes that torch's allocator had reserved on the device; 0 where it does not count them."""
        return max((figures.reserved for figures in self.phases.values()), default=0)

    @property
    def utilisation(self) -> float:
        """Model FLOP/s as a share of the measured FLOP/s of matrix products."""
        return self.model_flops_per_second / self.matmul_flops_per_second

    def to_dict(self) -> dict[str, Any]:
        """Return all figures, ready for JSON; a figure that could not be measured is None."""
        rates = ["samples_per_second", "residues_per_second", "tokens_per_second", "non_padding"]
        rates += ["model_flops_per_second", "matmul_flops_per_second", "utilisation"]
        settings = ("device", "counted", "rank", "ranks", "steps", "warmup_steps")
        return {
            **{name: getattr(self, name) for name in settings},
            "peak_bytes": self.peak.total,
            "peak": self.peak.to_dict(),
            "peak_phase": self.peak_phase,
            "reserved_bytes": self.reserved,
            "driver_bytes": self.driver_bytes,
            "driver": self.driver,
            "resident_bytes": self.resident_bytes,
            **{name: None if math.isnan(getattr(self, name)) else getattr(self, name) for name in rates},
            "phases": {
                name: {"peak": f.peak.to_dict(), "reserved_bytes": f.reserved, "seconds": f.seconds}
                for name, f in self.phases.items()
            },
            "growth_bytes_per_step": 0.0 if self.growth is None else self.growth.bytes_per_step,
            "growth_category": None if self.growth is None else self.growth.category,
        }

    def metrics(self, prefix: str = "profile/") -> dict[str, float]:
        """Return the figures as a flat dict for an experiment tracker, without those that could not be measured."""
        flat: dict[str, float] = {"peak_bytes": self.peak.total, "reserved_bytes": self.reserved}
        flat |= {f"peak_{category}_bytes": getattr(self.peak, category) for category in CATEGORIES}
        for name, figures in self.phases.items():
            flat |= {f"{name}_peak_bytes": figures.peak.total, f"{name}_seconds": figures.seconds}
        for name in ("samples", "residues", "tokens", "model_flops"):
            flat[f"{name}_per_second"] = getattr(self, f"{name}_per_second")
        flat |= {"non_padding": self.non_padding, "utilisation": self.utilisation}
        flat["resident_bytes"] = self.resident_bytes
        if self.driver_bytes is not None:
            flat["driver_bytes"] = self.driver_bytes
        if self.growth is not None:
            flat["growth_bytes_per_step"] = self.growth.bytes_per_step
        return {prefix + name: float(value) for name, value in flat.items() if not math.isnan(value)}

    def __str__(self) -> str:
        total = sum(figures.seconds for figures in self.phases.values()) or math.nan
        rows = [
            (name, *map(format_bytes, figures.peak.to_dict().values()), f"{figures.seconds / total:.1%}")
            for name, figures in self.phases.items()
        ]
        lines = [
            f"{self.steps} optimizer steps on {self.device} ({self.warmup_steps} of them warm-up, not in the rates)",
            f"counted: {self.counted}",
            "",
            format_table(rows, ("peak of phase", *CATEGORIES, "total", "time")),
            "",
            f"peak: {format_bytes(self.peak.total)} in {self.peak_phase}",
            f"process: at most {format_bytes(self.resident_bytes)} resident, with Python and libraries",
        ]
        if self.reserved:
            lines.append(f"reserved by torch's allocator: at most {format_bytes(self.reserved)}")
        if self.driver_bytes is not None:
            lines.append(f"used on the device by all processes: {format_bytes(self.driver_bytes)} ({self.driver})")
        if not math.isnan(self.samples_per_second):
            tokens = (
                ""
                if math.isnan(self.residues_per_second)
                else f", {self.residues_per_second:,.0f} residues/s, {self.tokens_per_second:,.0f} tokens/s, "
                f"{self.non_padding:.1%} of them not padding"
            )
            lines.append(f"{self.samples_per_second:,.2f} samples/s{tokens}")
        if not math.isnan(self.utilisation):
            lines.append(
                f"{self.model_flops_per_second / 1e12:.3g} model TFLOP/s, {self.utilisation:.1%} of the "
                f"{self.matmul_flops_per_second / 1e12:.3g} TFLOP/s of a large matrix product here"
            )
        if self.growth is not None:
            lines.append(f"warning: {self.growth}")
        return "\n".join(lines)


@dataclass(frozen=True)
class RankReports:
    """The reports of all ranks of a run, and their sums.

    Attributes:
        reports: one report per rank, in order.
    """

    reports: Sequence[ProfileReport]

    @property
    def sums(self) -> dict[str, float]:
        """Bytes at the peak, and sequences and residues per second, of all ranks together."""
        return {
            "peak_bytes": sum(report.peak.total for report in self.reports),
            "samples_per_second": sum(report.samples_per_second for report in self.reports),
            "residues_per_second": sum(report.residues_per_second for report in self.reports),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the figures of each rank and the sums, ready for JSON."""
        return {
            "ranks": [report.to_dict() for report in self.reports],
            "sum": {name: None if math.isnan(value) else value for name, value in self.sums.items()},
        }

    def metrics(self, prefix: str = "profile/") -> dict[str, float]:
        """Return the first rank's figures; with several ranks also the peak and rate of each, and the sums."""
        flat = self.reports[0].metrics(prefix)
        if len(self.reports) > 1:
            for report in self.reports:
                flat[f"{prefix}rank{report.rank}_peak_bytes"] = report.peak.total
                flat[f"{prefix}rank{report.rank}_residues_per_second"] = report.residues_per_second
            flat |= {f"{prefix}sum_{name}": value for name, value in self.sums.items()}
        return {name: value for name, value in flat.items() if not math.isnan(value)}

    def __str__(self) -> str:
        if len(self.reports) == 1:
            return str(self.reports[0])
        rows: list[tuple[str, ...]] = [
            (f"rank {r.rank}", r.device, format_bytes(r.peak.total), format_number(r.residues_per_second, "{:,.0f}"))
            for r in self.reports
        ]
        sums = self.sums
        total = format_number(sums["residues_per_second"], "{:,.0f}")
        rows.append(("sum", "", format_bytes(int(sums["peak_bytes"])), total))
        return f"{self.reports[0]}\n\n{format_table(rows, ('', 'device', 'peak', 'residues/s'))}"
