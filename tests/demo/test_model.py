"""The demo model is small, has the real architecture, predicts better than chance, and has a model card."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForMaskedLM, AutoTokenizer

import esm_efficient
from esm_efficient import demo_model_path

# Human ubiquitin, UniProt P0CG48.
UBIQUITIN = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"


def test_the_demo_is_under_4_megabytes():
    folder = Path(esm_efficient.__file__).parent / "demo"
    files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 4_000_000


def test_it_is_an_esm2_with_every_weight_under_its_own_name():
    model = AutoModelForMaskedLM.from_pretrained(demo_model_path())
    config = model.config
    assert config.model_type == "esm"
    assert config.position_embedding_type == "rotary"
    assert config.token_dropout
    assert (config.vocab_size, config.pad_token_id, config.mask_token_id) == (33, 1, 32)
    with safe_open(Path(demo_model_path()) / "model.safetensors", "pt") as handle:
        missing = {name for name, _ in model.named_parameters()} - set(handle.keys())
    assert missing <= {"lm_head.decoder.weight"}, "only the weight that is tied to the embeddings is left out"


def test_the_tokenizer_is_that_of_esm2():
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    assert tokenizer("LAGVSERTIDPKQNFYMHWCXBUZO")["input_ids"] == [0, *range(4, 29), 2]
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id, tokenizer.unk_token_id) == (1, 32, 3)


def test_it_predicts_residues_from_their_context():
    """With one residue masked at a time, the residues of ubiquitin are more likely than shuffled ones."""
    model = AutoModelForMaskedLM.from_pretrained(demo_model_path()).eval()
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    ids = tokenizer(UBIQUITIN, return_tensors="pt")["input_ids"][0]
    masked = ids.repeat(len(UBIQUITIN), 1)
    positions = torch.arange(1, len(UBIQUITIN) + 1)
    masked[positions - 1, positions] = tokenizer.mask_token_id
    with torch.no_grad():
        logits = model(masked, attention_mask=torch.ones_like(masked)).logits[positions - 1, positions]
    chance = logits.log_softmax(-1)
    own = chance[positions - 1, ids[1:-1]].mean()
    shuffled = torch.stack(
        [
            chance[positions - 1, ids[1:-1][torch.randperm(len(UBIQUITIN), generator=torch.Generator().manual_seed(s))]]
            for s in range(20)
        ]
    ).mean()
    assert own > shuffled


def test_the_card_gives_method_data_licence_and_accuracy():
    card = (Path(demo_model_path()) / "README.md").read_text()
    for words in ("mmseqs2-examples", "CC BY 4.0", "pretrain_demo_model.py", "| this model |", "Held out"):
        assert words in card
