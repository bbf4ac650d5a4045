"""Which column of a file is meant: one that the user names, or the only one with a usual name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from esm_efficient.data.encoding import WEIGHT_COLUMN
from esm_efficient.errors import ConfigurationError, DataError, listing

NAMES = {
    "sequence": ("sequence", "seq", "protein_sequence", "aa_sequence", "protein", "primary"),
    "label": ("label", "labels", "target", "class", "y"),
    "accession": ("accession", "acc", "id", "entry", "protein_id", "uniprot", "uniprot_id", "name"),
    "partition": ("partition", "fold"),
    "split": ("split",),
    WEIGHT_COLUMN: (WEIGHT_COLUMN,),
}
"""What a column may be called, in any case, to be found without being named."""


def compile_pattern(header: str | None) -> re.Pattern[str] | None:
    """A pattern for headers of FASTA records; None for None.

    Raises:
        ConfigurationError: it is no regular expression, or names no group.
    """
    if header is None:
        return None
    try:
        pattern = re.compile(header)
    except re.error as error:
        raise ConfigurationError(f"header={header!r} is no regular expression ({error})") from error
    if not pattern.groupindex:
        raise ConfigurationError(f"header={header!r} has no named group, such as (?P<label>...)")
    return pattern


def match_headers(
    pattern: re.Pattern[str], columns: Mapping[str, list[Any]], path: str | Path, places: list[str]
) -> dict[str, list[str]]:
    """What a pattern finds in the headers of FASTA records: a column for each of its named groups.

    Raises:
        ConfigurationError: the file is no FASTA file.
        DataError: a header does not match.
    """
    if "header" not in columns:
        raise ConfigurationError(f"{path} is no FASTA file: header= is for the headers of one")
    matches = [pattern.search(header) for header in columns["header"]]
    if bad := [place for place, match in zip(places, matches, strict=True) if match is None]:
        raise DataError(f"the header does not match {pattern.pattern!r} in {len(bad)} record(s): {listing(bad)}")
    return {name: [match[name] or "" for match in matches if match] for name in pattern.groupindex}


def find_column(what: str, names: Sequence[str], given: str | None, path: str | Path) -> str | None:
    """The column that was named, or the only one that is called like what is wanted; None if there is none.

    Raises:
        DataError: the column that was named is not there, or it could be any of several.
    """
    if given is not None:
        if given not in names:
            raise DataError(f"{path} has no column {given!r}; it has {', '.join(names)}")
        return given
    found = [name for name in names if name.lower() in NAMES[what]]
    if len(found) > 1:
        raise DataError(f"{path}: {what} could be any of {', '.join(map(repr, found))}: name one with {what}=")
    return found[0] if found else None


def column_of(columns: Mapping[str, list[Any]], name: str, path: str | Path) -> list[Any]:
    """The cells of a column that was named.

    Raises:
        DataError: it is not there.
    """
    find_column("", list(columns), name, path)
    return columns[name]
