"""Names of classes and of labels: spellings of one name, names that are none, and texts that hold several."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal

from esm_efficient.data.label_cells import MAX_CLASSES, MAX_NAME, SEPARATORS, holds_list, is_bracketed, spelling
from esm_efficient.data.schema import number_of
from esm_efficient.errors import DataError, listing

_COMPOUND = re.compile(r"\s*[,/&+]\s*")
_WHOLE = re.compile(r"[+-]?(?:0|[1-9]\d*)(?:\.0*)?(?:[eE]\+?\d+)?")
"""A whole number; with a zero before it, a text is a code."""


def usual_spellings(texts: Sequence[str], counts: Mapping[str, int]) -> dict[str, str]:
    """Return the most frequent spelling of each text; spellings differ in case, white space, hyphens or underscores."""
    groups: dict[str, list[str]] = {}
    for text in texts:
        groups.setdefault(spelling(text), []).append(text)
    return {text: max(groups[spelling(text)], key=lambda each: counts[each]) for text in texts}


def respelled(usual: Mapping[str, str]) -> str:
    """Return which texts `usual_spellings` has another spelling for; empty if there is none."""
    others = [f"{text!r:.40} as {name!r:.40}" for text, name in usual.items() if text != name]
    return listing(others) if others else ""


def compounds(texts: Sequence[str]) -> list[str]:
    """Return texts that may hold several labels: lists, with a bar or a semicolon, or with a part that others have."""
    if certain := [text for text in texts if "|" in text or ";" in text or holds_list(text)]:
        return certain
    parts = {text: {part.strip() for part in _COMPOUND.split(text) if part.strip()} for text in texts}
    texts_with: dict[str, int] = {}
    for part in (part for found in parts.values() for part in found):
        texts_with[part] = texts_with.get(part, 0) + 1
    return [text for text, found in parts.items() if len(found) > 1 and any(texts_with[part] > 1 for part in found)]


def named(spellings: Sequence[str]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Return class names and the class of each spelling; if all are whole numbers, ``1.0`` is the class ``1``.

    Codes such as ``01`` beside ``1`` are no numbers, and stay as they are.
    """
    if all(_WHOLE.fullmatch(text) and number_of(text) is not None for text in spellings):
        exact = {text: int(Decimal(text)) for text in spellings}  # a float has 16 digits
        names = [str(number) for number in sorted(set(exact.values()))]
        return tuple(names), {text: names.index(str(number)) for text, number in exact.items()}
    return tuple(spellings), {text: index for index, text in enumerate(spellings)}


def two_spellings(texts: Sequence[str]) -> str:
    """Return two texts that are one number, as codes may be; empty if there are none.

    A whole number such as ``1`` and ``1.0`` has two usual spellings, and so has one with an exponent.

    Example:
        >>> two_spellings(["1.1", "1.10", "3.4"]), two_spellings(["1", "1.0", "2.5"])
        ('1.1 and 1.10', '')
    """
    first: dict[float, str] = {}
    for text in texts:
        value = number_of(text)
        if value is not None and value % 1 and "e" not in text.lower() and first.setdefault(value, text) != text:
            return f"{first[value]} and {text}"
    return ""


def rare_classes(counts: Mapping[str, int], places: Mapping[str, str]) -> Iterator[str]:
    """Notes on classes with one row, where another class has ten or more, and on a single class.

    Args:
        counts: the rows of each class.
        places: the first row of each class.
    """
    if len(counts) == 1:
        yield f"the label is {next(iter(counts))!r:.40} in every row"
    rare = [f"{text!r:.40} ({places[text]})" for text in sorted(counts) if counts[text] == 1]
    if rare and max(counts.values()) >= 10:
        yield f"{len(rare)} class(es) have a single row, which may be a slip: {listing(rare)}"


def refuse_many(names: Sequence[str]) -> None:
    """Refuse more names than classes may have, with a DataError."""
    if len(names) > MAX_CLASSES:
        raise DataError(
            f"the label has more than {MAX_CLASSES} values, such as {listing(list(names))}: too many for classes"
        )


def refuse_long(names: Sequence[str], places: Mapping[str, str]) -> None:
    """Refuse a name that is too long, with a DataError; `places` has the first row of each name."""
    if long := [f"{places[name]}: {name!r:.40}" for name in names if len(name) > MAX_NAME]:
        raise DataError(f"a label has more than {MAX_NAME} characters in {listing(long)}: too long for a name")


def refuse_bars(names: Sequence[str]) -> None:
    """Refuse names of several labels with a bar, which separates the labels of a sequence in a table.

    Raises:
        DataError: a name has one.
    """
    if wrong := [repr(name) for name in names if "|" in name]:
        raise DataError(f"the label name {listing(wrong)} has a |, which separates several labels: rename it")


def refuse_separators(names: Sequence[str], separator: str, places: Mapping[str, str]) -> None:
    """Refuse names that another separator than that of the column divides into several labels.

    Args:
        names: of the labels.
        separator: that of the column; empty for lists.
        places: the first row of each name.

    Raises:
        DataError: a name has a semicolon, though bars separate the labels; a part of a name is a label too; or a name
            is another one in brackets.
    """
    known = {spelling(name) for name in names}
    wrong = []
    for other in (SEPARATORS.replace(separator, "") if separator else SEPARATORS) + "/&+":
        for name in names:
            parts = [spelling(part) for part in name.split(other)]
            if len(parts) > 1 and ((separator, other) == ("|", ";") or known.intersection(parts)):
                wrong.append(f"{places[name]}: {name!r:.40}")
    wrong += [f"{places[name]}: {name!r:.40}" for name in names if is_bracketed(name) and spelling(name[1:-1]) in known]
    if wrong:
        between = f"{separator} between" if separator else "separate items for"
        raise DataError(f"a label of a sequence seems to be several: {listing(wrong)}. Write {between} all labels")
