"""Embedder: the states of transformers' own model, of any layer, pooled over residues alone."""

from __future__ import annotations

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from sequence_texts import sequences
from transformers import AutoModel, AutoModelForSequenceClassification

from esm_efficient import Embedder, demo_model_path, embed_file, lora_config
from esm_efficient.encoder import forward
from esm_efficient.errors import ConfigurationError, DataError
from esm_efficient.inference import files

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


@pytest.mark.parametrize("pooling", ["mean", "first", "residues"])
def test_half_precision_embeds_almost_as_float32(tmp_path, pooling):
    texts = sequences(6)
    exact = Embedder.load(demo_model_path(), pooling=pooling).embed(texts)
    half = Embedder.load(demo_model_path(), pooling=pooling, precision="bf16").embed(texts)
    for one, other in zip(exact, half, strict=True):
        assert other.dtype == np.float32
        assert 0 < np.abs(one - other).max() < 0.03 * np.abs(one).max()
    (tmp_path / "in.fasta").write_text("".join(f">{number}\n{text}\n" for number, text in enumerate(texts)))
    options = {"pooling": pooling, "precision": "bf16"}
    embed_file(demo_model_path(), tmp_path / "in.fasta", tmp_path / "out.jsonl", **options)
    rows = [json.loads(line)["embedding"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for row, embedding in zip(rows, half, strict=True):
        assert np.abs(np.asarray(row) - embedding).max() < 1e-2 * np.abs(embedding).max()


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
        ({"max_tokens": 2}, "max_tokens=2: expected room for a residue"),
    ],
)
def test_a_layer_or_a_pooling_that_does_not_exist_is_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        Embedder.load(demo_model_path(), **options)


def remove(name):
    return lambda weights: {key: value for key, value in weights.items() if name not in key}


INCOMPLETE = {
    "a layer": (remove(".layer.2."), "lacks 16 weights of the encoder|but the files have"),
    "a norm": (remove("layer.2.LayerNorm"), "lacks 2 weights of the encoder.*layer.2.LayerNorm"),
    "another prefix": (
        lambda weights: {f"net.{key}": value for key, value in weights.items()},
        "weights of the encoder",
    ),
}


@pytest.mark.parametrize(("change", "message"), INCOMPLETE.values(), ids=INCOMPLETE)
def test_a_model_without_all_weights_of_its_encoder_is_refused(tmp_path, change, message):
    folder = tmp_path / "model"
    shutil.copytree(demo_model_path(), folder)
    [path] = folder.glob("*.safetensors")
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match=message):
        Embedder.load(folder)


def test_a_config_of_somebody_else_is_checked_as_predictor_checks_it(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(demo_model_path(), folder)
    path, config = folder / "config.json", json.loads((folder / "config.json").read_text())
    path.write_text(json.dumps(config | {"attn_implementation": "stranger/kernel"}))
    assert Embedder.load(folder, device="cpu").config._attn_implementation == "sdpa"
    for changes, message in (
        ({"num_hidden_layers": 3}, "cannot be loaded|same model"),
        ({"num_attention_heads": 3}, "with 3 heads"),
    ):
        path.write_text(json.dumps(config | changes))
        with pytest.raises(ConfigurationError, match=message):
            Embedder.load(folder)


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


@pytest.mark.parametrize("layer", [None, 2])
def test_a_run_that_was_stopped_goes_on_with_the_model_loaded_again(tmp_path, monkeypatch, layer):
    source, output = tmp_path / "p.fasta", tmp_path / "out.jsonl"
    source.write_text(">a\nMKT\n>b\nMALWM\n>c\nMKV\n")
    monkeypatch.setattr(files, "BLOCK_ROWS", 1)
    write = files._write_block

    def stop_after_the_first(file, rows, columns):
        if rows[0].accession == "b":
            raise KeyboardInterrupt
        write(file, rows, columns)

    monkeypatch.setattr(files, "_write_block", stop_after_the_first)
    with pytest.raises(KeyboardInterrupt):
        embed_file(demo_model_path(), source, output, layer=layer)
    monkeypatch.setattr(files, "_write_block", write)
    result = embed_file(demo_model_path(), source, output, layer=layer)
    assert (result.reused, result.computed) == (1, 2)


def test_a_file_of_embeddings_per_residue_needs_lists(tmp_path):
    source = tmp_path / "p.fasta"
    source.write_text(">a\nMKT\n>b\nMALWM\n")
    with pytest.raises(ConfigurationError, match=r"Write \.parquet or \.jsonl"):
        embed_file(demo_model_path(), source, tmp_path / "out.csv", pooling="residues")
    embed_file(demo_model_path(), source, tmp_path / "out.parquet", pooling="residues")
    import pyarrow.parquet as pq

    rows = pq.read_table(tmp_path / "out.parquet")["embedding"].to_pylist()
    assert [np.shape(row) for row in rows] == [(3, 128), (5, 128)]


@pytest.mark.parametrize("options", [{"layer": 2}, {"pooling": "first"}, {"precision": "bf16"}])
def test_a_file_does_not_change_the_settings_of_an_embedder(tokenizer, tmp_path, options):
    (tmp_path / "p.fasta").write_text(">a\nMKT\n")
    embedder = Embedder(AutoModel.from_pretrained(demo_model_path()), tokenizer, pooling="residues")
    with pytest.raises(ConfigurationError, match=r"has its own layer, pooling \('residues'\) and precision"):
        embed_file(embedder, tmp_path / "p.fasta", tmp_path / "out.parquet", **options)
    with pytest.raises(ConfigurationError, match=r"Write \.parquet or \.jsonl"):
        embed_file(embedder, tmp_path / "p.fasta", tmp_path / "out.csv")


def test_a_model_embeds_as_long_sequences_as_it_was_trained_on(tmp_path, tokenizer):
    assert Embedder.load(demo_model_path()).max_tokens == 1024
    shutil.copytree(demo_model_path(), tmp_path / "model")
    short = copy.copy(tokenizer)
    short.model_max_length = 12
    short.save_pretrained(tmp_path / "model")
    embedder = Embedder.load(tmp_path / "model")
    assert embedder.max_tokens == 12
    with pytest.raises(DataError, match="more than 10"):
        embedder.embed(["MKTAYIAKQRQIS"])
