"""Tables, plots and an HTML page of results."""

from esm_efficient.reporting.tables import (
    escape_markdown,
    file_name,
    format_bytes,
    format_csv,
    format_markdown,
    format_number,
    format_table,
    one_line,
)

__all__ = [
    "escape_markdown",
    "file_name",
    "format_bytes",
    "format_csv",
    "format_markdown",
    "format_number",
    "format_table",
    "one_line",
]
