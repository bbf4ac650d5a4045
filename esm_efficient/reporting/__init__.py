"""Tables, plots and an HTML page of results."""

from esm_efficient.reporting.tables import format_bytes, format_csv, format_markdown, format_number, format_table

__all__ = ["format_bytes", "format_csv", "format_markdown", "format_number", "format_table"]
