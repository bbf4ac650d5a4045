"""Write a synthetic table in the schema of DeepLoc-2.0, with invented proteins, to run everything offline.

No row is a real protein. Membrane-like proteins have hydrophobic helices of 19-24 residues with more positive charge
on one side. Soluble-like proteins are drawn from the average composition of proteins, with short hydrophobic stretches
and sometimes a signal peptide, which resembles a helix. Proteins belong to homologous families, and each family is in
one partition, as in the real table. The format is that of the real table too: rows sorted by sequence, an unnamed first
column, CRLF line ends, labels as floats, proteins that are too short or too long to keep, and a few X, U and B.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from esm_efficient.data.deeploc import COLUMNS, LOCATIONS
from esm_efficient.errors import ConfigurationError

# Average composition of proteins in UniProtKB/Swiss-Prot, per cent.
_AVERAGE = {
    "A": 8.3, "R": 5.5, "N": 4.1, "D": 5.5, "C": 1.4, "Q": 3.9, "E": 6.7, "G": 7.1, "H": 2.3, "I": 5.9,
    "L": 9.7, "K": 5.8, "M": 2.4, "F": 3.9, "P": 4.7, "S": 6.6, "T": 5.3, "W": 1.1, "Y": 2.9, "V": 6.9,
}  # fmt: skip
# Composition of a membrane-spanning helix, per cent, after the usual ranking of hydrophobicity scales.
_HELIX = {
    "L": 19, "I": 12, "V": 13, "A": 12, "F": 10, "G": 9, "M": 4, "S": 5, "T": 5, "W": 2, "Y": 3, "C": 2, "P": 2, "N": 1,
    "Q": 1,
}  # fmt: skip
_KINGDOMS = {"Metazoa": 0.59, "Fungi": 0.21, "Viridiplantae": 0.18, "Other": 0.02}
_MEMBRANE_LOCATIONS = {
    "Cell membrane": 0.41, "Endoplasmic reticulum": 0.22, "Mitochondrion": 0.14, "Lysosome/Vacuole": 0.12,
    "Golgi apparatus": 0.11,
}  # fmt: skip
_SOLUBLE_LOCATIONS = {
    "Nucleus": 0.42, "Cytoplasm": 0.32, "Extracellular": 0.14, "Mitochondrion": 0.07, "Plastid": 0.03,
    "Peroxisome": 0.01, "Cell membrane": 0.01,
}  # fmt: skip
_PARTITIONS = 5
_RARE = "XUB"


def _draw(rng: np.random.Generator, weights: Mapping[str, float], size: int) -> str:
    """Draw a sequence of `size` letters with these relative frequencies."""
    values = np.array(list(weights.values()), dtype=float)
    return "".join(rng.choice(list(weights), size=size, p=values / values.sum()))


def _ancestor(rng: np.random.Generator, membrane: bool, length: int) -> str:
    """Draw the first sequence of a family."""
    sequence = "M" + _draw(rng, _AVERAGE, length - 1)
    if membrane:
        # Most proteins have several helices; those with one are the hard cases.
        wanted = int(rng.choice([1, 2, 4, 7], p=[0.25, 0.2, 0.25, 0.3]))
        starts = np.linspace(8, length - 34, num=min(wanted, max(1, (length - 12) // 32))).astype(int)
        for number, start in enumerate(starts):
            # Positive charge is on the inner side: before helices with an even number, after the others.
            helix = _draw(rng, _HELIX, int(rng.integers(19, 25)))
            helix = "RK" + helix if number % 2 == 0 else helix + "KR"
            sequence = sequence[:start] + helix + sequence[start + len(helix) :]
    else:
        if rng.random() < 0.15:
            signal = "MK" + _draw(rng, _HELIX, int(rng.integers(10, 14))) + "SAQA"
            sequence = signal + sequence[len(signal) :]
        for _ in range(int(rng.integers(0, 4))):
            core = _draw(rng, _HELIX, int(rng.integers(5, 10)))
            start = int(rng.integers(20, length - 12))
            sequence = sequence[:start] + core + sequence[start + len(core) :]
    return sequence[:length]


def _relative(rng: np.random.Generator, ancestor: str, identity: float) -> str:
    """Mutate a copy: most substitutions keep hydrophobic residues hydrophobic; half of the copies lose a stretch."""
    hydrophobic = set("AILVFMGW")
    letters = list(ancestor)
    mutated = np.flatnonzero(rng.random(len(letters)) > identity)
    conservative = rng.random(len(mutated)) < 0.7
    helical, average = _draw(rng, _HELIX, len(mutated)), _draw(rng, _AVERAGE, len(mutated))
    for n, i in enumerate(mutated):
        if i:  # the first residue stays M
            letters[i] = helical[n] if letters[i] in hydrophobic and conservative[n] else average[n]
    sequence = "".join(letters)
    if rng.random() < 0.5 and len(sequence) > 80:
        cut = int(rng.integers(1, 9))
        where = int(rng.integers(30, len(sequence) - 30))
        sequence = sequence[:where] + sequence[where + cut :]
    return sequence


def write_demo_table(path: str | Path, *, proteins: int = 1400, seed: int = 0) -> Path:
    """Write a synthetic table in the exact schema of the DeepLoc-2.0 CSV.

    Args:
        path: the file to write; its folder is created if necessary.
        proteins: rows to write, at least 100.
        seed: seed of the draw; the same seed gives the same file.

    Returns:
        The path.

    Raises:
        ConfigurationError: fewer than 100 proteins, too few for five partitions of families.

    Example:
        >>> write_demo_table("demo.csv", proteins=100).name  # doctest: +SKIP
        'demo.csv'
    """
    if proteins < 100:
        raise ConfigurationError(
            f"proteins={proteins}: at least 100 are needed for {_PARTITIONS} partitions of families"
        )
    rng = np.random.default_rng(seed)
    rows: dict[str, dict[str, object]] = {}
    family = 0
    while len(rows) < proteins:
        membrane = bool(rng.random() < 0.3)
        length = int(np.clip(rng.lognormal(mean=5.55, sigma=0.5), 60, 900))
        ancestor = _ancestor(rng, membrane, length)
        kingdom = str(rng.choice(list(_KINGDOMS), p=list(_KINGDOMS.values())))
        for _ in range(int(rng.integers(1, 5))):
            sequence = _relative(rng, ancestor, identity=float(rng.uniform(0.5, 0.9)))
            if rng.random() < 0.01:
                where = int(rng.integers(1, len(sequence)))
                sequence = sequence[:where] + str(rng.choice(list(_RARE))) + sequence[where + 1 :]
            if sequence in rows or len(rows) == proteins:
                continue
            rows[sequence] = {
                "ACC": f"SYNTH{len(rows):05d}",
                "Kingdom": kingdom,
                "Partition": family % _PARTITIONS,
                "Membrane": float(membrane),
                **_locations(rng, membrane),
            }
        family += 1

    lines = ["," + ",".join(COLUMNS)]
    for number, sequence in enumerate(sorted(rows)):
        values = rows[sequence]
        lines.append(",".join([str(number), *(str(values[name]) for name in COLUMNS[:-1]), sequence]))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(("\r\n".join(lines) + "\r\n").encode("ascii"))
    return path


def _locations(rng: np.random.Generator, membrane: bool) -> dict[str, float]:
    """Draw one or two locations, as a column of 0 and 1 per location."""
    weights = _MEMBRANE_LOCATIONS if membrane else _SOLUBLE_LOCATIONS
    chances = np.array(list(weights.values()))
    number = 1 if rng.random() < 0.75 else 2
    chosen = set(rng.choice(list(weights), size=number, replace=False, p=chances / chances.sum()))
    return {name: float(name in chosen) for name in LOCATIONS}
