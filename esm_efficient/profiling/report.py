"""What a profiled run has cost, as a record and as a page of text."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from esm_efficient.costs.memory import CATEGORIES, Memory
from esm_efficient.reporting import format_bytes, format_table


@dataclass(frozen=True)
class PhaseFigures:
    """What one phase of training has cost on one rank.

    Attributes:
        peak: bytes of tensors at the phase's highest moment, by category.
        reserved: bytes that torch's allocator had taken from the device at most; 0 where it keeps no such count.
        seconds: spent in the phase after warm-up, all steps together.
    """

    peak: Memory
    reserved: int
    seconds: float


@dataclass(frozen=True)
class Growth:
    """Memory that each step leaves behind.

    Attributes:
        bytes_per_step: at the end of a step, more than at the end of the one before.
        category: what most of it counts as.
        steps: over how many steps it was seen.
    """

    bytes_per_step: float
    category: str
    steps: int

    def __str__(self) -> str:
        cure = {
            "activations": "outputs of the forward pass stay alive: is a loss, a logit or a hidden state kept in a "
            "list without detach()?",
            "gradients": "gradients pile up: are they of parameters that were made anew?",
            "optimizer": "the optimizer's state grows: are parameters added to it?",
            "weights": "the model grows.",
            "other": "tensors made outside the forward pass stay alive: are batches or gradients kept in a list?",
        }[self.category]
        return (
            f"memory held at the end of a step grows by {format_bytes(round(self.bytes_per_step))} a step "
            f"({self.category}, seen over {self.steps} steps): {cure}"
        )


def find_growth(ends: Sequence[Memory], *, noise: int = 256 * 1024) -> Growth | None:
    """Find memory that is kept from step to step.

    What was held at the ends of the later half must all be more than at any end of the earlier half: memory that is
    kept grows, while that of longer and shorter batches comes and goes.

    Args:
        ends: what was held at the ends of steps, in order.
        noise: bytes that the halves must differ by at least.

    Returns:
        The growth between the halves' medians, or None; None with fewer than 6 steps.

    Example:
        >>> find_growth([Memory(activations=i * 2**20) for i in range(6)]).bytes_per_step / 2**20
        1.0
    """
    half = len(ends) // 2
    if half < 3:
        return None
    early, late = ends[:half], ends[-half:]
    if min(memory.total for memory in late) <= max(memory.total for memory in early) + noise:
        return None
    between = len(ends) - half  # steps from the middle of the one half to that of the other
    grown = {
        name: statistics.median(getattr(m, name) for m in late) - statistics.median(getattr(m, name) for m in early)
        for name in CATEGORIES
    }
    return Growth(sum(grown.values()) / between, max(grown, key=lambda name: grown[name]), len(ends))


@dataclass(frozen=True)
class ProfileReport:
    """What a run has cost on one rank.

    Rates leave the warm-up steps out. A rate that could not be measured is NaN.

    Attributes:
        device: such as ``"cuda:0"``.
        counted: what `PhaseFigures.peak` counts, and how it was split into categories.
        phases: figures by phase; a phase that did not occur is left out.
        peak_phase: the phase with the highest peak.
        steps: optimizer steps, warm-up included.
        warmup_steps: optimizer steps that no rate includes.
        samples_per_second: sequences trained on.
        residues_per_second: residues trained on, padding and special tokens not counted.
        tokens_per_second: tokens computed, padding included.
        non_padding: share of the tokens that are no padding.
        model_flops_per_second: FLOP/s of the tokens that are no padding, recomputation not counted.
        matmul_flops_per_second: what the device was measured to reach in one large matrix product of the same dtype.
        driver_bytes: memory in use on the device by every process, at the end; None without a GPU.
        driver: where that is from.
        resident_bytes: peak resident memory of the process, Python and libraries included.
        growth: memory that each step leaves behind, or None.
        rank: of this process.
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
        """Bytes of tensors at the run's highest moment, by category."""
        return self.phases[self.peak_phase].peak if self.phases else Memory()

    @property
    def reserved(self) -> int:
        """Bytes that torch's allocator had taken from the device at most; 0 where it keeps no such count."""
        return max((figures.reserved for figures in self.phases.values()), default=0)

    @property
    def utilisation(self) -> float:
        """Model FLOP/s as a share of the measured rate of matrix products."""
        return self.model_flops_per_second / self.matmul_flops_per_second

    def to_dict(self) -> dict[str, Any]:
        """Every figure, ready for JSON; what could not be measured is None."""
        rates = ["samples_per_second", "residues_per_second", "tokens_per_second", "non_padding"]
        rates += ["model_flops_per_second", "matmul_flops_per_second", "utilisation"]
        return {
            "device": self.device,
            "counted": self.counted,
            "rank": self.rank,
            "ranks": self.ranks,
            "steps": self.steps,
            "warmup_steps": self.warmup_steps,
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
        """The figures as a flat mapping for an experiment tracker; what could not be measured is left out."""
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
            (
                name,
                *(format_bytes(getattr(figures.peak, category)) for category in CATEGORIES),
                format_bytes(figures.peak.total),
                f"{figures.seconds / total:.1%}",
            )
            for name, figures in self.phases.items()
        ]
        lines = [
            f"{self.steps} optimizer steps on {self.device} ({self.warmup_steps} of them warm-up, in no rate)",
            f"counted: {self.counted}",
            "",
            format_table(rows, ("peak of phase", *CATEGORIES, "total", "time")),
            "",
            f"peak: {format_bytes(self.peak.total)} in {self.peak_phase}",
            f"process: {format_bytes(self.resident_bytes)} resident at most, Python and libraries included",
        ]
        if self.reserved:
            lines.append(f"reserved by torch's allocator: {format_bytes(self.reserved)} at most")
        if self.driver_bytes is not None:
            lines.append(f"in use on the device by every process: {format_bytes(self.driver_bytes)} ({self.driver})")
        if not math.isnan(self.residues_per_second):
            lines.append(
                f"{self.samples_per_second:,.2f} samples/s, {self.residues_per_second:,.0f} residues/s, "
                f"{self.tokens_per_second:,.0f} tokens/s, of which {self.non_padding:.1%} are no padding"
            )
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
    """The reports of every rank of a run, and what they sum to.

    Attributes:
        reports: one a rank, in order.
    """

    reports: Sequence[ProfileReport] = field(default_factory=tuple)

    @property
    def peak_bytes(self) -> int:
        """Peaks of all ranks together."""
        return sum(report.peak.total for report in self.reports)

    @property
    def residues_per_second(self) -> float:
        """Of all ranks together."""
        return sum(report.residues_per_second for report in self.reports)

    @property
    def samples_per_second(self) -> float:
        """Of all ranks together."""
        return sum(report.samples_per_second for report in self.reports)

    def to_dict(self) -> dict[str, Any]:
        """Every rank's figures and the sums, ready for JSON."""
        sums = {name: getattr(self, name) for name in ("peak_bytes", "samples_per_second", "residues_per_second")}
        return {
            "ranks": [report.to_dict() for report in self.reports],
            "sum": {name: None if math.isnan(value) else value for name, value in sums.items()},
        }

    def metrics(self, prefix: str = "profile/") -> dict[str, float]:
        """The first rank's figures, and with several ranks each one's peak and rate and the sums."""
        flat = self.reports[0].metrics(prefix)
        if len(self.reports) > 1:
            for report in self.reports:
                flat[f"{prefix}rank{report.rank}_peak_bytes"] = report.peak.total
                flat[f"{prefix}rank{report.rank}_residues_per_second"] = report.residues_per_second
            flat[f"{prefix}sum_peak_bytes"] = self.peak_bytes
            flat[f"{prefix}sum_residues_per_second"] = self.residues_per_second
            flat[f"{prefix}sum_samples_per_second"] = self.samples_per_second
        return {name: value for name, value in flat.items() if not math.isnan(value)}

    def __str__(self) -> str:
        if len(self.reports) == 1:
            return str(self.reports[0])
        rows: list[tuple[str, ...]] = [
            (f"rank {r.rank}", r.device, format_bytes(r.peak.total), f"{r.residues_per_second:,.0f}")
            for r in self.reports
        ]
        rows.append(("sum", "", format_bytes(self.peak_bytes), f"{self.residues_per_second:,.0f}"))
        return f"{self.reports[0]}\n\n{format_table(rows, ('', 'device', 'peak', 'residues/s'))}"
