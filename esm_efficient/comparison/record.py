"""Comparison: the figures of every recipe at both budgets."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esm_efficient.comparison.figures import BUDGETS, MethodFigures
from esm_efficient.comparison.rendering import comparison_page, table_rows
from esm_efficient.errors import ConfigurationError
from esm_efficient.estimation.estimate import Estimate
from esm_efficient.reporting import format_csv, format_markdown, format_table


@dataclass(frozen=True)
class Comparison:
    """The figures of every recipe at both budgets.

    Attributes:
        model: name of the model.
        figures: one entry per recipe and budget.
        metric: name of the metric.
        seeds: seeds of the runs; empty for estimates.
        timelines: estimates by recipe, for the plot of memory over one step.
        note: where the figures are from.
    """

    model: str
    figures: tuple[MethodFigures, ...]
    metric: str
    seeds: tuple[int, ...]
    timelines: Mapping[str, Estimate]
    note: str

    def at(self, budget: str) -> list[MethodFigures]:
        """Return the figures at one budget.

        Raises:
            ConfigurationError: `budget` is neither ``"steps"`` nor ``"epochs"``.
        """
        if budget not in BUDGETS:
            raise ConfigurationError(f"budget={budget!r}: expected one of {', '.join(BUDGETS)}")
        return [figures for figures in self.figures if figures.budget == budget]

    def rows(self, budget: str) -> tuple[list[str], list[list[object]]]:
        """Return the header and the rows of the table at one budget, as text for people.

        Raises:
            ConfigurationError: `budget` is neither ``"steps"`` nor ``"epochs"``.
        """
        return table_rows(self.at(budget), self.metric if self.seeds else None)

    def to_dict(self) -> dict[str, Any]:
        """Return every figure, ready for JSON."""
        scores = [[None if math.isnan(score) else score for score in f.scores] for f in self.figures]
        return {
            "model": self.model,
            "metric": self.metric,
            "seeds": list(self.seeds),
            "note": self.note,
            "rows": [f.to_dict(self.metric) | {"scores": s} for f, s in zip(self.figures, scores, strict=True)],
        }

    def to_csv(self) -> str:
        """Return one line per recipe and budget, with plain numbers in bytes and seconds."""
        records = [figures.to_dict(self.metric) for figures in self.figures]
        return format_csv([list(record.values()) for record in records], list(records[0]))

    def to_markdown(self) -> str:
        """Return both tables in Markdown."""
        tables = {name: self.rows(budget) for budget, name in BUDGETS.items()}
        return "\n".join(f"### At {name}\n\n{format_markdown(rows, head)}\n" for name, (head, rows) in tables.items())

    def to_html(self, *, command: str | None = None) -> str:
        """Return one page with tables and plots that opens offline; without matplotlib it says why it has no plots.

        Args:
            command: the line that repeats it, if there is one.
        """
        by_budget = {budget: self.at(budget) for budget in BUDGETS}
        return comparison_page(
            self.model,
            by_budget,
            self.metric if self.seeds else None,
            timelines=self.timelines,
            note=self.note,
            command=command,
        )

    def save(self, folder: str | Path, *, command: str | None = None) -> list[Path]:
        """Write ``comparison.txt``, ``.md``, ``.csv``, ``.json`` and ``.html`` into a folder.

        Args:
            folder: the folder, which need not exist yet.
            command: as `to_html`.

        Returns:
            The paths of the files.
        """
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        contents = {
            "txt": f"{self}\n",
            "md": self.to_markdown(),
            "csv": self.to_csv(),
            "json": json.dumps(self.to_dict(), indent=2) + "\n",
            "html": self.to_html(command=command),
        }
        for suffix, content in contents.items():
            (folder / f"comparison.{suffix}").write_text(content, encoding="utf-8")
        return [folder / f"comparison.{suffix}" for suffix in contents]

    def __str__(self) -> str:
        parts = [f"{self.model}. {self.note}"]
        for budget, name in BUDGETS.items():
            header, rows = self.rows(budget)
            parts.append(f"At {name}:\n\n{format_table(rows, header)}")
        return "\n\n".join(parts)
