"""Clusters of related sequences, by MMseqs2 where it is installed."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from esm_efficient.data.download import made_folder, unfinished

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

PROGRAM_VARIABLE = "ESM_EFFICIENT_MMSEQS"
"""The environment variable with the path of MMseqs2, if it is not on the PATH; an empty one says not to use it."""

OPTIONS = ("--min-seq-id", "0.3", "-c", "0.8")
"""Sequences of a cluster share 30 % of their residues with its representative, over 80 % of both."""


def find_mmseqs() -> str | None:
    """Return the path of MMseqs2; None if it is not installed or is not to be used."""
    named = os.environ.get(PROGRAM_VARIABLE)
    return shutil.which("mmseqs" if named is None else named) if named != "" else None


def cluster_rows(dataset: Dataset) -> np.ndarray | None:
    """Return a cluster number per row by MMseqs2 (Steinegger and Söding 2017); None without it, or if it fails.

    The clusters of the same sequences are computed once, and kept in the cache folder.

    Args:
        dataset: rows with ``sequence``.

    Returns:
        int64 of shape (rows,), or None.
    """
    if (program := find_mmseqs()) is None:
        return None
    texts, rows = np.unique(np.asarray(dataset["sequence"][:], dtype=object), return_inverse=True)
    content = hashlib.sha256("\n".join([*OPTIONS, *texts]).encode()).hexdigest()[:16]
    kept = made_folder("clusters") / f"{content}.tsv"
    if not kept.is_file():
        try:
            _run(program, texts.tolist(), kept)
        except (OSError, subprocess.CalledProcessError) as error:
            said = (getattr(error, "stderr", "") or getattr(error, "stdout", "") or str(error)).strip()
            logger.warning("%s failed, so that there are no clusters: %s", program, said.splitlines()[-1])
            return None
    clusters = np.arange(len(texts))  # a sequence that MMseqs2 leaves out is a cluster of its own
    for line in kept.read_text(encoding="utf-8").splitlines():
        representative, member = map(int, line.split("\t"))
        clusters[member] = representative
    return clusters[rows.ravel()]


def _run(program: str, sequences: Sequence[str], output: Path) -> None:
    """Write the clusters of sequences, which are named by their numbers, as pairs of representative and member."""
    with tempfile.TemporaryDirectory() as folder:
        fasta = Path(folder) / "sequences.fasta"
        fasta.write_text("".join(f">{number}\n{text}\n" for number, text in enumerate(sequences)), encoding="utf-8")
        command = [program, "easy-cluster", str(fasta), str(Path(folder) / "found"), str(Path(folder) / "scratch")]
        subprocess.run([*command, *OPTIONS], check=True, capture_output=True, text=True)
        partial = unfinished(output)
        shutil.copyfile(Path(folder) / "found_cluster.tsv", partial)
        os.replace(partial, output)
