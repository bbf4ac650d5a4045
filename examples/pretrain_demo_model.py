"""Pretrain the tiny ESM-2 that ships in ``esm_efficient/demo`` with masked language modelling.

The sequences are the 20,000 UniProt proteins of Debian's package ``mmseqs2-examples`` (``DB.fasta.gz``; UniProt is
CC BY 4.0). Get the package with ``apt-get download mmseqs2-examples`` and unpack it with ``dpkg -x``, then::

    python examples/pretrain_demo_model.py --fasta DB.fasta.gz --output esm_efficient/demo/model

The model is transformers' own ``EsmForMaskedLM`` with the settings of ESM-2 (rotary positions, token dropout, no
other dropout) and four narrow layers. The figures that go into the card are measured here, on proteins held out
together with everything that shares a stretch of residues with them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm
from transformers import EsmConfig, EsmForMaskedLM, EsmTokenizer, set_seed

from esm_efficient import compat

VOCABULARY = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>"]
CLS, PAD, EOS, UNK, MASK = (VOCABULARY.index(token) for token in ("<cls>", "<pad>", "<eos>", "<unk>", "<mask>"))
FIRST_RESIDUE, N_STANDARD = VOCABULARY.index("L"), 20
SHARED_RUN = 7  # residues; two shared runs of this length make two proteins relatives

CARD = """# A tiny ESM-2 for demonstrations and tests

Not a model to do science with: it exists so that everything in `esm_efficient` runs offline.

- **Architecture**: transformers' `EsmForMaskedLM` as in ESM-2 (rotary positions, token dropout, vocabulary of 33):
  {layers} layers, width {width}, {heads} heads, {parameters:,} parameters, float32.
- **Data**: {train:,} proteins ({residues:,} residues) of `DB.fasta.gz` in Debian's package `mmseqs2-examples`,
  which are UniProt entries. UniProt is licensed under
  [CC BY 4.0](https://creativecommons.org/licenses/by/4.0/): The UniProt Consortium, *UniProt: the Universal Protein
  Knowledgebase*, Nucleic Acids Research. The sequences themselves are not shipped.
- **Held out**: {heldout:,} proteins; {dropped:,} further proteins that share two or more runs of {run} residues
  with one of them were kept out of the training too. Distant relatives may remain.
- **Training**: masked language modelling (15 % of the residues; 80 % masked, 10 % replaced, 10 % kept) on windows
  of {window} residues, {steps:,} steps of {batch} windows, AdamW, peak learning rate {lr:g}, seed {seed}, by
  `examples/pretrain_demo_model.py`. torch {torch}, transformers {transformers}.

How well it predicts a masked residue of a held-out protein (15 % masked, {evaluated:,} residues):

| predictor | top-1 accuracy | perplexity |
|---|---|---|
| uniform over the 20 residues | {uniform_accuracy:.3f} | {uniform_perplexity:.2f} |
| frequencies of the training set | {unigram_accuracy:.3f} | {unigram_perplexity:.2f} |
| this model | {accuracy:.3f} | {perplexity:.2f} |

Licence: Apache-2.0, with the attribution above for the data it was trained on.
"""


def read_fasta(path: str) -> list[np.ndarray]:
    """Read a FASTA file (plain or gzip) into one array of token ids a protein, without special tokens."""
    lookup = np.full(256, UNK, dtype=np.uint8)
    for token in VOCABULARY[FIRST_RESIDUE : VOCABULARY.index("O") + 1]:
        lookup[ord(token)] = VOCABULARY.index(token)
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rt") as handle:
        records = handle.read().split(">")[1:]
    bodies = ("".join(record.split("\n")[1:]).upper() for record in records)
    return [lookup[np.frombuffer(body.encode("ascii"), dtype=np.uint8)] for body in bodies]


def runs(protein: np.ndarray) -> np.ndarray:
    """Distinct integer codes of every run of SHARED_RUN residues in a protein."""
    if len(protein) < SHARED_RUN:
        return np.empty(0, dtype=np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(protein.astype(np.int64), SHARED_RUN)
    return np.unique(windows @ (len(VOCABULARY) ** np.arange(SHARED_RUN)))


def split(proteins: list[np.ndarray], heldout: int, rng: np.random.Generator):
    """Hold out some proteins; drop from the rest those that share two runs with any of them."""
    order = rng.permutation(len(proteins))
    test = [proteins[i] for i in order[:heldout]]
    seen = np.unique(np.concatenate([runs(protein) for protein in test]))
    rest = [proteins[i] for i in order[heldout:]]
    train = [protein for protein in rest if np.isin(runs(protein), seen, assume_unique=True).sum() < 2]
    return train, test, len(rest) - len(train)


def windows_of(proteins: list[np.ndarray], window: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Cut every protein into windows at a random offset, so that each residue is seen once an epoch."""
    pieces = []
    for protein in proteins:
        offset = int(rng.integers(window)) if len(protein) > window else 0
        cuts = [0, *range(offset or window, len(protein), window), len(protein)]
        pieces += [protein[a:b] for a, b in pairwise(cuts) if b - a >= 16]
    return pieces


def batches(pieces: list[np.ndarray], batch: int, rng: np.random.Generator):
    """Shuffled batches of windows of similar length, padded with special tokens: ids and attention mask."""
    order = rng.permutation(len(pieces))
    pools = [order[i : i + 64 * batch] for i in range(0, len(order), 64 * batch)]
    groups = []
    for pool in pools:
        pool = pool[np.argsort([len(pieces[i]) for i in pool], kind="stable")]
        groups += [pool[i : i + batch] for i in range(0, len(pool), batch)]
    for g in rng.permutation(len(groups)):
        rows = [pieces[i] for i in groups[g]]
        ids = np.full((len(rows), max(map(len, rows)) + 2), PAD, dtype=np.int64)
        for row, piece in zip(ids, rows, strict=True):
            row[: len(piece) + 2] = [CLS, *piece, EOS]
        yield torch.from_numpy(ids)


def mask(ids: torch.Tensor, generator: torch.Generator, *, always: bool = False):
    """BERT masking of 15 % of the residues: (inputs, labels), both of the shape of `ids`; labels are -100 elsewhere."""
    chance = torch.rand(ids.shape, generator=generator)
    chosen = (ids >= FIRST_RESIDUE) & (ids < FIRST_RESIDUE + N_STANDARD) & (chance < 0.15)
    labels = torch.where(chosen, ids, -100)
    how = torch.rand(ids.shape, generator=generator)
    other = torch.randint(FIRST_RESIDUE, FIRST_RESIDUE + N_STANDARD, ids.shape, generator=generator)
    inputs = torch.where(chosen & (how < (1.0 if always else 0.8)), MASK, ids)
    if not always:
        inputs = torch.where(chosen & (how >= 0.9), other, inputs)
    return inputs, labels


@torch.no_grad()
def evaluate(model, test: list[np.ndarray], train: list[np.ndarray], window: int, batch: int, seed: int) -> dict:
    """Top-1 accuracy and perplexity on masked residues of held-out proteins, beside two predictors without a model."""
    model.eval()
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    counts = np.bincount(np.concatenate(train), minlength=len(VOCABULARY)).astype(float)
    standard = slice(FIRST_RESIDUE, FIRST_RESIDUE + N_STANDARD)
    frequencies = torch.from_numpy(counts[standard] / counts[standard].sum())
    n = right = usual = 0
    nll = unigram_nll = 0.0
    for ids in batches(windows_of(test, window, rng), batch, rng):
        inputs, labels = mask(ids, generator, always=True)
        logits = model(input_ids=inputs, attention_mask=(ids != PAD).long()).logits[labels >= 0][:, standard]
        truth = labels[labels >= 0] - FIRST_RESIDUE
        n += len(truth)
        right += int((logits.argmax(-1) == truth).sum())
        usual += int((frequencies.argmax() == truth).sum())
        nll += float(torch.nn.functional.cross_entropy(logits.double(), truth, reduction="sum"))
        unigram_nll -= float(frequencies[truth].log().sum())
    return {
        "evaluated": n,
        "accuracy": right / n,
        "perplexity": math.exp(nll / n),
        "unigram_accuracy": usual / n,
        "unigram_perplexity": math.exp(unigram_nll / n),
        "uniform_accuracy": 1 / N_STANDARD,
        "uniform_perplexity": float(N_STANDARD),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fasta", required=True, help="protein sequences, plain or gzip")
    parser.add_argument("--output", required=True, help="folder for the model, the tokenizer and the card")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32, help="windows a step")
    parser.add_argument("--window", type=int, default=254, help="residues a window")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--heldout", type=int, default=500, help="proteins held out")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    set_seed(options.seed)
    rng, generator = np.random.default_rng(options.seed), torch.Generator().manual_seed(options.seed)
    train, test, dropped = split(read_fasta(options.fasta), options.heldout, rng)
    residues = sum(map(len, train))
    if not train:
        raise SystemExit(f"all {len(test) + dropped:,} proteins are held out or relatives of those: hold out fewer")
    print(f"{len(train):,} proteins ({residues:,} residues) to train on, {len(test):,} held out, {dropped:,} dropped")

    config = EsmConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        intermediate_size=4 * options.width,
        pad_token_id=PAD,
        mask_token_id=MASK,
        eos_token_id=EOS,
        position_embedding_type="rotary",
        max_position_embeddings=1026,
        layer_norm_eps=1e-5,
        token_dropout=True,
        emb_layer_norm_before=False,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = EsmForMaskedLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, options.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.02 + 0.98 * max(0.0, (options.steps - step) / options.steps)),
    )

    step, smooth, started = 0, None, time.time()
    with tqdm(total=options.steps) as bar:
        while step < options.steps:
            for ids in batches(windows_of(train, options.window, rng), options.batch, rng):
                inputs, labels = mask(ids, generator)
                model.train()
                loss = model(input_ids=inputs, attention_mask=(ids != PAD).long(), labels=labels).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
                step += 1
                bar.update()
                bar.set_postfix(loss=f"{smooth:.3f}")
                if step % 500 == 0:
                    figures = evaluate(model, test, train, options.window, options.batch, options.seed)
                    tqdm.write(f"step {step}: " + json.dumps({k: round(v, 4) for k, v in figures.items()}))
                if step == options.steps:
                    break

    figures = evaluate(model, test, train, options.window, options.batch, options.seed)
    output = Path(options.output)
    compat.save_under_own_names(model)
    model.save_pretrained(output)
    (output / "vocab.txt").write_text("\n".join(VOCABULARY))
    EsmTokenizer(str(output / "vocab.txt"), model_max_length=1024).save_pretrained(output)
    card = CARD.format(
        layers=options.layers,
        width=options.width,
        heads=options.heads,
        parameters=model.num_parameters(),
        train=len(train),
        residues=residues,
        heldout=len(test),
        dropped=dropped,
        run=SHARED_RUN,
        window=options.window,
        steps=options.steps,
        batch=options.batch,
        lr=options.lr,
        seed=options.seed,
        torch=torch.__version__.split("+")[0],
        transformers=transformers.__version__,
        **figures,
    )
    (output / "README.md").write_text(card)
    print(card)
    print(f"{time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
