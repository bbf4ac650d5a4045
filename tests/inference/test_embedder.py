"""Embedder: the states of transformers' own model, of any layer, pooled over residues alone."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import get_peft_model
from sequence_texts import sequences
from transformers import AutoModel, AutoModelForSequenceClassification

from esm_efficient import Embedder, demo_model_path, embed_file, lora_config
from esm_efficient.encoder import forward
from esm_efficient.errors import ConfigurationError

LAYERS = 4


@torch.no_grad()
def reference(tokenizer, sequence, layer, pooling):
    model = AutoModel.from_pretrained(demo_model_path(), add_pooling_layer=False).eval()
    output = model(**tokenizer(sequence, return_tensors="pt"), output_hidden_states=True)
    states = (output.last_hidden_state if layer is None else output.hidden_states[layer])[0]
    return {"mean": states[1:-1].mean(0), "first": states[0], "residues": states[1:-1]}[pooling].numpy()


@pytest.mark.parametrize("pooling", ["mean", "first", "residues"])
@pytest.mark.parametrize("layer", [None, 0, 2, LAYERS])
def test_embeddings_are_the_states_of_the_plain_model(tokenizer, layer, pooling):
    texts = sequences(6)
    found = Embedder.load(demo_model_path(), layer=layer, pooling=pooling).embed(texts, token_budget=100)
    for text, embedding in zip(texts, found, strict=True):
        expected = reference(tokenizer, text, layer, pooling)
        assert embedding.shape == expected.shape
        assert np.abs(embedding - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("layer", [None, 2])
def test_the_lean_encoder_is_told_the_lengths_and_reads_no_mask(layer, monkeypatch):
    monkeypatch.setattr(forward, "make_packing", None)
    assert len(Embedder.load(demo_model_path(), layer=layer).embed(sequences(6), token_budget=100)) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 9}, "layer=9: expected 0 to 4; the last is read if no layer is given"),
        ({"layer": -1}, "layer=-1"),
        ({"pooling": "max"}, "pooling='max'"),
    ],
)
def test_a_layer_or_a_pooling_that_does_not_exist_is_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        Embedder.load(demo_model_path(), **options)


def test_a_model_with_adapters_has_their_embeddings_and_must_be_merged_for_a_lower_layer(tokenizer):
    model = AutoModelForSequenceClassification.from_pretrained(demo_model_path())
    config = lora_config(model, init_lora_weights=False)
    adapted, merged = get_peft_model(copy.deepcopy(model), config), get_peft_model(model, config)
    merged.load_state_dict(adapted.state_dict())
    texts = sequences(3)
    expected = Embedder(merged.merge_and_unload(), tokenizer).embed(texts)
    for one, other in zip(Embedder(adapted, tokenizer).embed(texts), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    with pytest.raises(ConfigurationError, match=r"layer=2: the model has adapters.*merge_and_unload"):
        Embedder(adapted, tokenizer, layer=2)


def test_a_file_of_embeddings_per_residue_needs_lists(tmp_path):
    source = tmp_path / "p.fasta"
    source.write_text(">a\nMKT\n>b\nMALWM\n")
    with pytest.raises(ConfigurationError, match=r"Write \.parquet or \.jsonl"):
        embed_file(demo_model_path(), source, tmp_path / "out.csv", pooling="residues")
    embed_file(demo_model_path(), source, tmp_path / "out.parquet", pooling="residues")
    import pyarrow.parquet as pq

    rows = pq.read_table(tmp_path / "out.parquet")["embedding"].to_pylist()
    assert [np.shape(row) for row in rows] == [(3, 128), (5, 128)]


@pytest.mark.parametrize("options", [{"layer": 2}, {"pooling": "first"}])
def test_a_file_does_not_change_the_layer_or_the_pooling_of_an_embedder(tokenizer, tmp_path, options):
    (tmp_path / "p.fasta").write_text(">a\nMKT\n")
    embedder = Embedder(AutoModel.from_pretrained(demo_model_path()), tokenizer, pooling="residues")
    with pytest.raises(ConfigurationError, match="has its own layer and pooling, 'residues'"):
        embed_file(embedder, tmp_path / "p.fasta", tmp_path / "out.parquet", **options)
    with pytest.raises(ConfigurationError, match=r"Write \.parquet or \.jsonl"):
        embed_file(embedder, tmp_path / "p.fasta", tmp_path / "out.csv")
