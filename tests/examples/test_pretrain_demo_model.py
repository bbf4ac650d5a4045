"""examples/pretrain_demo_model.py still makes a demo model."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
from copies import Copy
from transformers import AutoModelForMaskedLM, AutoTokenizer

ROOT = Path(__file__).parents[2]


def test_a_few_steps_give_a_model_a_tokenizer_and_a_card(tmp_path):
    rng = np.random.default_rng(0)
    proteins = ["".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), size=n)) for n in rng.integers(20, 90, size=40)]
    with gzip.open(tmp_path / "proteins.fasta.gz", "wt") as handle:
        for number, protein in enumerate(proteins * 2):
            handle.write(f">protein{number}\n{protein[:30]}\n{protein[30:]}\n")
    done = Copy(
        ROOT / "examples" / "pretrain_demo_model.py",
        *("--fasta", tmp_path / "proteins.fasta.gz", "--output", tmp_path / "model"),
        *("--layers", 1, "--width", 16, "--heads", 2, "--window", 40),
        *("--steps", 3, "--batch", 8, "--heldout", 20, "--seed", 1),
        folder=tmp_path,
    ).wait()
    assert done.returncode == 0, done.stderr[-2000:]
    # The file has each protein twice, and the copies of held-out proteins must be dropped from training.
    assert "20 held out" in done.stdout
    held_out_with_copies = 80 - int(done.stdout.split(" proteins")[0])
    assert 20 < held_out_with_copies <= 40
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "model")
    assert model.config.num_hidden_layers == 1
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("MK")["input_ids"] == [0, 20, 15, 2]
    assert "| this model |" in (tmp_path / "model" / "README.md").read_text()
