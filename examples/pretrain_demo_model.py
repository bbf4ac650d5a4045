"""Pretrain the tiny ESM-2 of ``esm_efficient/demo`` with masked language modelling.

The sequences are the 20,000 UniProt proteins of Debian's package ``mmseqs2-examples`` (``DB.fasta.gz``; UniProt is
CC BY 4.0). Get the package with ``apt-get download mmseqs2-examples`` and unpack it with ``dpkg -x``, then::

    python examples/pretrain_demo_model.py --fasta DB.fasta.gz --output esm_efficient/demo/model

The model is transformers' ``EsmForMaskedLM`` with the settings of ESM-2 (rotary positions, token dropout, no other
dropout) and four narrow layers. The script measures the figures of the model card on held-out proteins. Proteins that
share runs of residues with a held-out protein are left out of the training set.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm
from transformers import EsmConfig, EsmForMaskedLM, EsmTokenizer, set_seed

from esm_efficient.saving import portable_saving

VOCABULARY = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>"]
CLS, PAD, EOS, UNK, MASK = (VOCABULARY.index(token) for token in ("<cls>", "<pad>", "<eos>", "<unk>", "<mask>"))
FIRST_RESIDUE, N_STANDARD = VOCABULARY.index("L"), 20
SHARED_RUN = 7  # residues; two proteins with two shared runs of this length count as relatives

CARD = """# A tiny ESM-2 for demonstrations and tests

This model lets everything in `esm_efficient` run offline. It is too small for scientific use.

- **Architecture**: transformers' `EsmForMaskedLM` as in ESM-2 (rotary positions, token dropout, vocabulary of 33):
  {layers} layers, width {width}, {heads} heads, {parameters:,} parameters, float32.
- **Data**: {train:,} proteins ({residues:,} residues) of `DB.fasta.gz` in Debian's package `mmseqs2-examples`,
  which are UniProt entries. UniProt is licensed under
  [CC BY 4.0](https://creativecommons.org/licenses/by/4.0/): The UniProt Consortium, *UniProt: the Universal Protein
  Knowledgebase*, Nucleic Acids Research. The sequences themselves are not shipped.
- **Held out**: {held_out:,} proteins. A further {dropped:,} proteins, which share two or more runs of {run} residues
  with one of them, were also left out of the training. Distant relatives may remain.
- **Training**: masked language modelling (15 % of the residues; 80 % masked, 10 % replaced, 10 % kept) on windows
  of {window} residues, {steps:,} steps of {batch} windows, AdamW, peak learning rate {lr:g}, seed {seed}, by
  `examples/pretrain_demo_model.py`. torch {torch}, transformers {transformers}.

Accuracy on masked residues of the held-out proteins (15 % masked, {evaluated:,} residues):

| predictor | top-1 accuracy | perplexity |
|---|---|---|
| uniform over the 20 residues | {uniform_accuracy:.3f} | {uniform_perplexity:.2f} |
| frequencies of the training set | {unigram_accuracy:.3f} | {unigram_perplexity:.2f} |
| this model | {accuracy:.3f} | {perplexity:.2f} |

Licence: Apache-2.0, with the attribution above for the data it was trained on.
"""


def read_fasta(path: str) -> list[np.ndarray]:
    """Read a FASTA file (plain or gzip) into one array of token ids per protein, without special tokens."""
    lookup = np.full(256, UNK, dtype=np.uint8)
    for token in VOCABULARY[FIRST_RESIDUE : VOCABULARY.index("O") + 1]:
        lookup[ord(token)] = VOCABULARY.index(token)
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rt") as handle:
        records = handle.read().split(">")[1:]
    bodies = ("".join(record.split("\n")[1:]).upper() for record in records)
    return [lookup[np.frombuffer(body.encode("ascii"), dtype=np.uint8)] for body in bodies]


def runs(protein: np.ndarray) -> np.ndarray:
    """Return the distinct integer codes of all runs of SHARED_RUN residues in a protein."""
    if len(protein) < SHARED_RUN:
        return np.empty(0, dtype=np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(protein.astype(np.int64), SHARED_RUN)
    return np.unique(windows @ (len(VOCABULARY) ** np.arange(SHARED_RUN)))


def split(proteins: list[np.ndarray], heldout: int, rng: np.random.Generator):
    """Hold out some proteins, and drop from the rest each protein that shares two runs with them.

    Returns:
        Training proteins, held-out proteins, and the number of dropped proteins.
    """
    order = rng.permutation(len(proteins))
    test = [proteins[i] for i in order[:heldout]]
    seen = np.unique(np.concatenate([runs(protein) for protein in test]))
    rest = [proteins[i] for i in order[heldout:]]
    train = [protein for protein in rest if np.isin(runs(protein), seen, assume_unique=True).sum() < 2]
    return train, test, len(rest) - len(train)


def windows_of(proteins: list[np.ndarray], window: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Cut every protein into windows at a random offset, so that an epoch reads each residue once."""
    chunks = []
    for protein in proteins:
        offset = int(rng.integers(window)) if len(protein) > window else 0
        cuts = [0, *range(offset or window, len(protein), window), len(protein)]
        chunks += [protein[a:b] for a, b in itertools.pairwise(cuts) if b - a >= 16]
    return chunks


def batches(chunks: list[np.ndarray], batch: int, rng: np.random.Generator):
    """Yield shuffled batches of windows of similar length: padded token ids with special tokens."""
    order = rng.permutation(len(chunks))
    pools = [order[i : i + 64 * batch] for i in range(0, len(order), 64 * batch)]
    groups = []
    for pool in pools:
        pool = pool[np.argsort([len(chunks[i]) for i in pool], kind="stable")]
        groups += [pool[i : i + batch] for i in range(0, len(pool), batch)]
    for g in rng.permutation(len(groups)):
        rows = [chunks[i] for i in groups[g]]
        ids = np.full((len(rows), max(map(len, rows)) + 2), PAD, dtype=np.int64)
        for row, chunk in zip(ids, rows, strict=True):
            row[: len(chunk) + 2] = [CLS, *chunk, EOS]
        yield torch.from_numpy(ids)


def mask(ids: torch.Tensor, generator: torch.Generator, *, always: bool = False):
    """Mask 15 % of the residues as BERT does; with `always`, replace every chosen residue by the mask token.

    Returns:
        Inputs and labels, both of the shape of `ids`. Labels are -100 where no residue was chosen.
    """
    draw = torch.rand(ids.shape, generator=generator)
    chosen = (ids >= FIRST_RESIDUE) & (ids < FIRST_RESIDUE + N_STANDARD) & (draw < 0.15)
    labels = torch.where(chosen, ids, -100)
    how = torch.rand(ids.shape, generator=generator)
    other = torch.randint(FIRST_RESIDUE, FIRST_RESIDUE + N_STANDARD, ids.shape, generator=generator)
    inputs = torch.where(chosen & (how < (1.0 if always else 0.8)), MASK, ids)
    if not always:
        inputs = torch.where(chosen & (how >= 0.9), other, inputs)
    return inputs, labels


@torch.no_grad()
def evaluate(model, test: list[np.ndarray], train: list[np.ndarray], window: int, batch: int, seed: int) -> dict:
    """Compute top-1 accuracy and perplexity on masked held-out residues, for the model and two simple predictors."""
    model.eval()
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    counts = np.bincount(np.concatenate(train), minlength=len(VOCABULARY)).astype(float)
    standard = slice(FIRST_RESIDUE, FIRST_RESIDUE + N_STANDARD)
    frequencies = torch.from_numpy(counts[standard] / counts[standard].sum())
    n = correct = correct_unigram = 0
    nll = unigram_nll = 0.0
    for ids in batches(windows_of(test, window, rng), batch, rng):
        inputs, labels = mask(ids, generator, always=True)
        logits = model(input_ids=inputs, attention_mask=(ids != PAD).long()).logits[labels >= 0][:, standard]
        truth = labels[labels >= 0] - FIRST_RESIDUE
        n += len(truth)
        correct += int((logits.argmax(-1) == truth).sum())
        correct_unigram += int((frequencies.argmax() == truth).sum())
        nll += float(torch.nn.functional.cross_entropy(logits.double(), truth, reduction="sum"))
        unigram_nll -= float(frequencies[truth].log().sum())
    return {
        "evaluated": n,
        "accuracy": correct / n,
        "perplexity": math.exp(nll / n),
        "unigram_accuracy": correct_unigram / n,
        "unigram_perplexity": math.exp(unigram_nll / n),
        "uniform_accuracy": 1 / N_STANDARD,
        "uniform_perplexity": float(N_STANDARD),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fasta", required=True, help="protein sequences, plain or gzip")
    parser.add_argument("--output", required=True, type=Path, help="folder for the model, the tokenizer and the card")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32, help="windows per step")
    parser.add_argument("--window", type=int, default=254, help="residues per window")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--heldout", type=int, default=500, help="number of held-out proteins")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def make_model(options: argparse.Namespace) -> EsmForMaskedLM:
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
    return EsmForMaskedLM(config)


def pretrain(
    model: EsmForMaskedLM,
    train: list[np.ndarray],
    test: list[np.ndarray],
    options: argparse.Namespace,
    rng: np.random.Generator,
) -> None:
    """Train the model in place; print its figures on the held-out proteins every 500 steps."""
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, options.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.02 + 0.98 * max(0.0, (options.steps - step) / options.steps)),
    )
    epochs = (batches(windows_of(train, options.window, rng), options.batch, rng) for _ in itertools.count())
    smooth = None
    bar = tqdm(itertools.islice(itertools.chain.from_iterable(epochs), options.steps), total=options.steps)
    for step, ids in enumerate(bar, 1):
        inputs, labels = mask(ids, generator)
        model.train()
        loss = model(input_ids=inputs, attention_mask=(ids != PAD).long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        bar.set_postfix(loss=f"{smooth:.3f}")
        if step % 500 == 0:
            figures = evaluate(model, test, train, options.window, options.batch, options.seed)
            tqdm.write(f"step {step}: " + json.dumps({k: round(v, 4) for k, v in figures.items()}))


def main() -> None:
    options = parse_arguments()
    started = time.time()
    set_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    train, test, dropped = split(read_fasta(options.fasta), options.heldout, rng)
    residues = sum(map(len, train))
    if not train:
        raise SystemExit(
            f"no training protein is left: all {len(test) + dropped:,} proteins are held out or are relatives of "
            "held-out proteins. Give a smaller --heldout"
        )
    print(f"{len(train):,} proteins ({residues:,} residues) to train on, {len(test):,} held out, {dropped:,} dropped")
    model = make_model(options)
    pretrain(model, train, test, options, rng)

    output: Path = options.output
    with portable_saving(model):
        model.save_pretrained(output)
    (output / "vocab.txt").write_text("\n".join(VOCABULARY))
    EsmTokenizer(str(output / "vocab.txt"), model_max_length=1024).save_pretrained(output)
    card = CARD.format(
        **vars(options),
        parameters=model.num_parameters(),
        train=len(train),
        residues=residues,
        held_out=len(test),
        dropped=dropped,
        run=SHARED_RUN,
        torch=torch.__version__.split("+")[0],
        transformers=transformers.__version__,
        **evaluate(model, test, train, options.window, options.batch, options.seed),
    )
    (output / "README.md").write_text(card)
    print(card)
    print(f"{time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
