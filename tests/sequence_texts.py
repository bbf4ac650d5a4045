"""Random sequences of amino acids."""

from __future__ import annotations

import numpy as np

RESIDUES = list("ACDEFGHIKLMNPQRSTVWY")


def sequences(count=30, *, longest=60, seed=0) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(RESIDUES, int(n))) for n in rng.integers(1, longest, count)]
