"""Tables, plots and an HTML page of results."""

from esm_efficient.reporting.tables import (
    count_of,
    escape_markdown,
    file_name,
    finite_values,
    format_bytes,
    format_csv,
    format_markdown,
    format_number,
    format_seconds,
    format_table,
    one_line,
)

__all__ = [
    "count_of",
    "escape_markdown",
    "file_name",
    "finite_values",
    "format_bytes",
    "format_csv",
    "format_markdown",
    "format_number",
    "format_seconds",
    "format_table",
    "one_line",
]
