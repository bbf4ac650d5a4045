"""What is taken as sequences to predict from, and texts that are not proteins."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from esm_efficient.data.in_memory import frame_file, table_file
from esm_efficient.data.schema import USUAL_NAMES, non_letters
from esm_efficient.data.sequences import STOP, NucleotideCount, clean, looks_like_words
from esm_efficient.errors import DataError, listing
from esm_efficient.reporting import count_of

logger = logging.getLogger(__name__)

_FILE = re.compile(r"\.(fa|faa|fas|fasta|csv|tsv|txt|parquet|json|jsonl|pdb|cif)(\.(gz|xz|bz2|zip))?$", re.IGNORECASE)


class CheckedSequences(list[str]):
    """Sequences of a file whose rows `esm_efficient.inference.rows.check_rows` has checked, all of them together.

    Args:
        sequences: the sequences.
        names: what messages call each of them.
    """

    def __init__(self, sequences: Iterable[str], names: Iterable[str]) -> None:
        super().__init__(sequences)
        self.names = list(names)


def name_of(sequences: list[str], index: int) -> str:
    """Return what a message calls a sequence: its name if they have names, else its number.

    Example:
        >>> name_of(["MKT"], 0), name_of(CheckedSequences(["MKT"], ["P12345"]), 0)
        ('sequence 1', 'P12345')
    """
    return sequences.names[index] if isinstance(sequences, CheckedSequences) else f"sequence {index + 1}"


def sequences_from(given: Any) -> list[str]:
    """Return the sequences in a list, an array, a pandas Series, a column of a data set or a split of one.

    Args:
        given: texts, or rows with a column of a usual name (`esm_efficient.data.schema.USUAL_NAMES`).

    Raises:
        DataError: one text or path, all splits of a data set, or another mapping was given; a table has no column of
            sequences; an item is not a text, is empty, or is not a protein sequence; or most sequences are nucleotides.
            Fewer, or a short one, are a warning.

    Example:
        >>> import numpy as np
        >>> sequences_from(np.array(["MKT", "MAL"]))
        ['MKT', 'MAL']
    """
    if isinstance(given, CheckedSequences):
        return given
    sequences = _items_of(given)
    if bad := [f"sequence {i}" for i, item in enumerate(sequences, 1) if not isinstance(item, str)]:
        raise DataError(f"{len(bad)} sequence(s) are not texts: {listing(bad)}")
    problems = [(number, problem_of(text)) for number, text in enumerate(sequences, 1)]
    if bad := [f"sequence {number} {problem}" for number, problem in problems if problem]:
        raise DataError(f"{len(bad)} of {len(sequences)} texts are not protein sequences: {listing(bad, 3)}")
    nucleotides = NucleotideCount()
    nucleotides.add(sequences, [f"sequence {number}" for number in range(1, len(sequences) + 1)])
    if warning := nucleotides.warning("the given sequences"):
        logger.warning("%s", warning)
    warn_of_unknown(sum(map(count_unknown, sequences)), "the given sequences")
    return [str(text) for text in sequences]


@contextmanager
def source_file(given: Any) -> Iterator[str | Path]:
    """Give the path of a file with these sequences; a path is returned as it is.

    Args:
        given: a path; a table in memory, which is copied to the cache folder with all its columns
            (`esm_efficient.data.in_memory.table_file`); or what `sequences_from` takes.

    Raises:
        DataError: it is none of these, or two columns of a table have the same name.

    Example:
        >>> with source_file("proteome.fasta") as path:
        ...     print(path)
        proteome.fasta
    """
    import pandas as pd
    from datasets import Dataset

    if isinstance(given, str | Path | pd.DataFrame | Dataset):
        with table_file(given) as path:
            yield path
    else:
        with frame_file(pd.DataFrame({"sequence": _items_of(given)}), "the list") as path:
            yield path


def _items_of(given: Any) -> list[Any]:
    """Return the sequences in what was given, which may not be texts yet.

    Raises:
        DataError: as `sequences_from`, but for what is wrong with one of them.
    """
    if isinstance(given, Path) or (isinstance(given, str) and _FILE.search(given.strip())):
        raise DataError(f"expected a list of sequences, got the path {given}: predict_file and embed_file read files")
    if isinstance(given, str | bytes):
        raise DataError("expected a list of sequences, got a single text: put it into a list")
    if isinstance(given, Mapping):
        raise DataError(
            f"expected a list of sequences, got a {type(given).__name__} with {listing([repr(key) for key in given])}: "
            'give one of its values, such as data["test"]'
        )
    columns = getattr(given, "column_names", None)
    if columns is None and getattr(given, "ndim", 1) == 2:
        if not hasattr(given, "columns"):
            raise DataError(f"the {type(given).__name__} has the shape {given.shape}: expected one text per sequence")
        columns = list(given.columns)
    if columns is not None:  # a split of a data set, or a table of pandas
        usual = [name for name in columns if isinstance(name, str) and name.lower() in USUAL_NAMES["sequence"]]
        if "sequence" not in columns and len(usual) != 1:
            raise DataError(
                f"the {type(given).__name__} has the columns {listing([repr(name) for name in columns])}: expected one "
                "column with a usual name of sequences, such as sequence, or give the column itself"
            )
        given = given["sequence" if "sequence" in columns else usual[0]]
    if not isinstance(given, Iterable):
        raise DataError(f"expected a list of sequences, got {type(given).__name__}")
    return list(given)


def count_unknown(sequence: str) -> int:
    """Return the letters of a sequence that are not an amino acid: of the alphabet, J alone.

    Example:
        >>> count_unknown("MKTJ"), count_unknown("MKTX")
        (1, 0)
    """
    return clean(sequence).count("J")


def warn_of_unknown(letters: int, where: str) -> None:
    """Warn of letters that are not amino acids."""
    if letters:
        logger.warning(
            "%s: %s J, which is not an amino acid: the model reads it as <unk>", where, count_of(letters, "letter")
        )


def problem_of(text: str) -> str:
    """Return why a text is not a protein sequence; empty if it may be one.

    Example:
        >>> problem_of("MKTAYIAKQR"), problem_of("proteins.fasta")[:26]
        ('', 'is the name of a file (pro')
    """
    if _FILE.search(text.strip()):
        return f"is the name of a file ({text.strip()[:80]}): read it with load_sequences"
    sequence = clean(text)
    if not sequence:
        return "is empty"
    if STOP in sequence:
        return f"has a stop (*) inside: cut it there, or write X in its place: {text[:40]!r}"
    if unknown := non_letters(sequence):
        return f"contains characters that are not residues ({listing([repr(c) for c in unknown])}): {text[:40]!r}"
    if looks_like_words(text):
        return f"looks like words ({text[:40]!r}): write a sequence in capital letters without spaces"
    return ""
