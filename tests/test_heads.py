"""Heads that pool residues: what they read, and that they save, load, train and export like any other."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest
import torch
from conftest import make_model, slow_except, tiny_config
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from peft import AutoPeftModelForSequenceClassification, PeftModel
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, EsmForSequenceClassification

from esm_efficient import (
    RECIPES,
    PooledEsmForSequenceClassification,
    Predictor,
    Task,
    demo_model_path,
    estimate,
    export_model,
    finetune,
    load_deeploc,
    lora_config,
    prepare_model,
    stratified_sample,
)
from esm_efficient.errors import ConfigurationError
from esm_efficient.estimation.inputs import resolve_config
from esm_efficient.heads import find_residues, model_class, pooling_of_model
from esm_efficient.training.standardizing import find_output_layer

POOLINGS = ("mean", "attention")
SEQUENCES = ["MKTAYIAKQR", "MALWMRLLPLLALLALWGPDPAAA", "M", "MKV"]


def make_pooled(pooling, **changes):
    """Return a tiny model whose weights are large enough for every part to change the output."""
    model = make_model(PooledEsmForSequenceClassification, classifier_pooling=pooling, num_labels=3, **changes)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(8)
    return model.eval()


def expected_logits(model, ids):
    """Return the logits of one sequence without padding, and the weights of its residues, by their definition."""
    states = model.esm(ids[None]).last_hidden_state[0, 1:-1]
    head = dict(model.classifier.named_parameters())
    pooling = model.config.classifier_pooling
    weights = torch.full((len(states),), 1 / len(states))
    if pooling == "attention":
        inner = torch.tanh(
            states @ head["attention_pooling.scorer.0.weight"].T + head["attention_pooling.scorer.0.bias"]
        )
        weights = (inner @ head["attention_pooling.scorer.2.weight"][0]).softmax(0)
    hidden, output = (f"{pooling}_pooling.{name}" for name in ("hidden", "output"))
    pooled = torch.tanh(head[f"{hidden}.weight"] @ (weights @ states) + head[f"{hidden}.bias"])
    return head[f"{output}.weight"] @ pooled + head[f"{output}.bias"], weights


def batch_of(tokenizer, side):
    batch = tokenizer(SEQUENCES, return_tensors="pt", padding=True, padding_side=side)
    return batch["input_ids"], batch["attention_mask"]


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_the_head_reads_the_residues_alone_wherever_the_padding_is(tokenizer, pooling, side):
    model = make_pooled(pooling)
    ids, mask = batch_of(tokenizer, side)
    logits, weights = model(ids, mask).logits, model.residue_weights(ids, mask)
    assert (weights[mask == 0] == 0).all()
    for row, tokens in enumerate(mask.bool()):
        alone, shares = expected_logits(model, ids[row][tokens])
        torch.testing.assert_close(logits[row], alone)
        torch.testing.assert_close(weights[row][tokens], F.pad(shares, (1, 1)))


@pytest.mark.parametrize("pooling", POOLINGS)
@torch.no_grad()
def test_states_in_the_place_of_ids_and_a_missing_mask_give_the_same_logits(tokenizer, pooling):
    model = make_pooled(pooling, token_dropout=False)
    ids, mask = batch_of(tokenizer, "right")
    expected = model(ids, mask).logits
    states = model.esm.embeddings.word_embeddings(ids)
    torch.testing.assert_close(model(inputs_embeds=states, attention_mask=mask).logits, expected)
    for row, length in enumerate(mask.sum(1)):
        torch.testing.assert_close(model(ids[row : row + 1, :length]).logits[0], expected[row])
        torch.testing.assert_close(model(inputs_embeds=states[row : row + 1, :length]).logits[0], expected[row])
    one_mask = mask[1:2]
    torch.testing.assert_close(model(ids[[1, 1]], one_mask).logits, expected[[1, 1]])


def test_without_a_mask_the_head_leaves_padding_out(tokenizer):
    ids, mask = batch_of(tokenizer, "right")
    weights = make_pooled("mean").residue_weights(ids)
    torch.testing.assert_close(weights, find_residues(mask.bool()) / (mask.sum(1, keepdim=True) - 2))


@pytest.mark.parametrize(
    ("tokens", "residues"),
    [("1111", "0110"), ("0111", "0010"), ("1110", "0100"), ("1011", "0010"), ("11", "11"), ("01", "01"), ("00", "00")],
)
def test_residues_are_between_the_first_and_the_last_token(tokens, residues):
    row = torch.tensor([[digit == "1" for digit in tokens]])
    assert find_residues(row).tolist() == [[digit == "1" for digit in residues]]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_head_gives_no_nan_for_a_row_without_tokens(pooling):
    head = make_pooled(pooling).classifier
    states, residues = torch.randn(2, 4, 16), torch.tensor([[False] * 4, [False, True, True, False]])
    head(states, residues).sum().backward()
    assert (head.residue_weights(states, residues)[0] == 0).all()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


def test_a_mask_that_does_not_tell_the_padding_is_refused(tokenizer):
    ids, mask = batch_of(tokenizer, "right")
    with pytest.raises(ConfigurationError, match=r"attention mask of shape \(4, 26, 26\)"):
        make_pooled("mean")(ids, mask[:, None, :].expand(-1, ids.shape[1], -1))


@pytest.mark.parametrize(
    ("pooling", "match"), [("first", "expected 'mean' or 'attention'"), ("max", "classifier_pooling='max'")]
)
def test_an_unknown_pooling_is_refused(pooling, match):
    with pytest.raises(ConfigurationError, match=match):
        make_model(PooledEsmForSequenceClassification, classifier_pooling=pooling)


@pytest.mark.parametrize(
    ("problem_type", "labels", "loss"),
    [
        (None, torch.tensor([0, 2, 1, 0]), F.cross_entropy),
        (None, torch.eye(4, 3), F.binary_cross_entropy_with_logits),
        ("regression", torch.ones(4, 3), F.mse_loss),
    ],
)
def test_the_loss_fits_the_labels(tokenizer, problem_type, labels, loss):
    ids, mask = batch_of(tokenizer, "right")
    model = make_pooled("mean", problem_type=problem_type)
    found, logits = model(ids, mask, labels=labels, return_dict=False)
    torch.testing.assert_close(found, loss(logits, labels))


def test_the_config_of_another_encoder_is_refused():
    with pytest.raises(ConfigurationError, match="got a BertConfig: heads that pool residues are for ESM-2"):
        estimate(BertConfig(), recipe=RECIPES["frozen"].replace(pooling="mean"))


# --- files ---


@pytest.fixture
def messages():
    """What transformers logs, which it does not pass on to other loggers."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_saved_model_loads_again_and_plain_transformers_warns_of_a_new_head(tokenizer, tmp_path, pooling, messages):
    ids, mask = batch_of(tokenizer, "right")
    model = make_pooled(pooling)
    model.save_pretrained(tmp_path)
    again = PooledEsmForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(ids, mask).logits, model(ids, mask).logits)
    assert messages == []
    plain, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert type(plain) is EsmForSequenceClassification
    assert {n for n in info["missing_keys"] if "classifier" in n} == {
        f"classifier.{n}" for n in plain.classifier.state_dict()
    }
    assert "classifier.dense.weight" in "".join(messages)
    assert "MISSING" in "".join(messages)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_an_adapter_loads_with_its_own_head_alone(tokenizer, tmp_path, pooling):
    ids, mask = batch_of(tokenizer, "right")

    def base(pooling, seed=0):
        torch.manual_seed(seed)
        kind = model_class("sequence-classification", pooling)
        options = {} if pooling == "first" else {"classifier_pooling": pooling}
        return kind.from_pretrained(demo_model_path(), num_labels=2, **options)

    model = base(pooling)
    adapted = prepare_model(model, adapters=lora_config(model))
    trained = [
        name for name, parameter in adapted.named_parameters() if parameter.requires_grad and "lora_" not in name
    ]
    prefix = "base_model.model.classifier.modules_to_save.default."
    assert sorted(trained) == sorted(prefix + name for name, _ in base(pooling).classifier.named_parameters())
    adapted.eval().save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(demo_model_path()).save_pretrained(tmp_path)
    expected = adapted(ids, mask).logits
    again = PeftModel.from_pretrained(base(pooling, seed=1), tmp_path).eval()
    torch.testing.assert_close(again(ids, mask).logits, expected)
    torch.testing.assert_close(again.residue_weights(ids, mask), adapted.residue_weights(ids, mask))
    for other in {"first", *POOLINGS} - {pooling}:
        with pytest.raises(KeyError, match="classifier"):
            PeftModel.from_pretrained(base(other), tmp_path)
    with pytest.raises(KeyError, match=r"classifier\.dense"):
        AutoPeftModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    # peft saves no config of the base model; the names of the weights tell the head.
    predictor = Predictor.load(tmp_path, task=Task("single_label_classification", ("no", "yes")))
    assert pooling_of_model(predictor.model) == pooling
    torch.testing.assert_close(
        torch.tensor(np.stack(predictor.logits(SEQUENCES))).float(), expected, atol=1e-5, rtol=1e-5
    )


def test_a_folder_that_asks_for_an_unknown_head_is_refused(tmp_path):
    model = make_pooled("mean")
    model.config.classifier_pooling = ["max"]
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match=r"classifier_pooling=\['max'\]"):
        Predictor.load(tmp_path)


# --- training ---


@pytest.fixture(scope="module")
def data(demo_table):
    splits = load_deeploc(demo_table, max_residues=220, validation_partitions=())
    return DatasetDict({name: stratified_sample(split, 24) for name, split in splits.items()})


def train(data, folder, recipe, model=None, **options):
    return finetune(model or demo_model_path(), data, recipe=recipe, output_dir=folder, disable_tqdm=True, **options)


@pytest.mark.parametrize(
    ("recipe", "pooling"),
    slow_except(itertools.product(["lora", "base", "frozen"], POOLINGS), ("lora", "attention"), ("frozen", "mean")),
)
def test_a_trained_head_is_saved_and_predicts_after_loading(tmp_path, data, recipe, pooling):
    result = train(data, tmp_path, RECIPES[recipe].replace(pooling=pooling))
    assert pooling_of_model(result.model) == pooling
    sequences = data["test"]["sequence"][:5]
    predictor = Predictor.load(result.model_dir)
    tokenizer = AutoTokenizer.from_pretrained(result.model_dir)
    batch = tokenizer(sequences, return_tensors="pt", padding=True)
    with torch.no_grad():
        expected, shares = result.model(**batch).logits, result.model.residue_weights(**batch)
    found = torch.tensor(np.stack(predictor.logits(sequences))).float()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    for sequence, weights, share in zip(sequences, predictor.residue_weights(sequences), shares, strict=True):
        assert weights.shape == (len(sequence),)
        torch.testing.assert_close(torch.tensor(weights).float(), share[1 : len(sequence) + 1], atol=1e-5, rtol=1e-4)
    folder = export_model(result, tmp_path / "out", base_model="someone/demo")
    exported = PooledEsmForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(exported(**batch).logits, expected, atol=1e-4, rtol=1e-4)
    card = (folder / "README.md").read_text()
    assert "from esm_efficient import PooledEsmForSequenceClassification" in card
    assert "library_name: esm_efficient" in card


def test_the_weights_of_a_first_token_head_are_refused(tokenizer):
    with pytest.raises(ConfigurationError, match="does not pool residues"):
        Predictor(make_model(), tokenizer).residue_weights(SEQUENCES)


def test_a_regressor_standardises_the_last_layer_of_its_head(tokenizer):
    model = make_pooled("attention")
    assert find_output_layer(model, tokenizer) is model.classifier.get_submodule("attention_pooling.output")


def test_a_float32_head_reads_the_states_of_a_bfloat16_encoder(tokenizer):
    ids, mask = batch_of(tokenizer, "right")
    for pooling in POOLINGS:
        model = make_pooled(pooling)
        expected = model(ids, mask).logits
        prepared = prepare_model(model, head_only=True, dtype=torch.bfloat16)
        found = prepared(ids, mask).logits
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, atol=0.1, rtol=0.1)


def test_a_loaded_model_must_have_the_head_of_the_recipe(tmp_path, data, tokenizer):
    model = make_model()
    with pytest.raises(ConfigurationError, match="has the pooling 'first', and the recipe has 'mean'"):
        train(data, tmp_path, RECIPES["frozen"].replace(pooling="mean"), model, tokenizer=tokenizer)
    with pytest.raises(ConfigurationError, match="has the pooling 'mean', and the recipe has 'first'"):
        train(data, tmp_path, RECIPES["frozen"].replace(pooling="first"), make_pooled("mean"), tokenizer=tokenizer)


def test_a_loaded_model_with_a_pooled_head_trains_it_with_any_recipe(tmp_path, data, tokenizer):
    model = make_model(PooledEsmForSequenceClassification, classifier_pooling="mean")
    result = train(data, tmp_path, "frozen", model, tokenizer=tokenizer, max_steps=2)
    assert pooling_of_model(Predictor.load(result.model_dir).model) == "mean"


def test_a_new_head_in_the_place_of_a_trained_one_is_announced(tmp_path, data, tokenizer, caplog):
    model = make_pooled("mean")
    model.save_pretrained(tmp_path / "mean")
    tokenizer.save_pretrained(tmp_path / "mean")
    with caplog.at_level(logging.WARNING):
        first = RECIPES["frozen"].replace(pooling="first")
        result = train(data, tmp_path, first, tmp_path / "mean", max_steps=2)
    assert "has the pooling 'mean', and the recipe has 'first': a new head is trained" in caplog.text
    plain = AutoModelForSequenceClassification.from_pretrained(result.model_dir)
    assert not hasattr(plain.config, "classifier_pooling")
    with caplog.at_level(logging.WARNING):
        result = train(data, tmp_path / "again", "frozen", result.model_dir, max_steps=2)
    assert "has the pooling 'first', and the recipe has 'attention': a new head is trained" in caplog.text
    assert pooling_of_model(Predictor.load(result.model_dir).model) == "attention"


def test_the_pretrained_model_has_no_head_that_a_new_one_replaces(tmp_path, data, caplog):
    with caplog.at_level(logging.WARNING):
        train(data, tmp_path, "frozen", max_steps=1)
    assert "a new head is trained" not in caplog.text


def test_the_usual_pooling_of_a_recipe_gives_way_to_the_head_that_there_is():
    """Of labels of residues and of a loaded model; test_other_encoders.py has other encoders, in training too."""
    frozen = RECIPES["frozen"].replace(cache=False)
    found = {
        what: estimate(model, recipe=frozen, device="cpu", tokens=9, **options).recipe.pooling
        for what, model, options in [
            ("ESM-2", tiny_config(), {}),
            ("residues", tiny_config(), {"head": "token-classification"}),
            ("first token", make_model(), {}),
            ("mean", make_pooled("mean"), {}),
        ]
    }
    assert found == {"ESM-2": "attention", "residues": "first", "first token": "first", "mean": "mean"}


def test_a_head_for_residues_cannot_pool_them(tmp_path):
    data = Dataset.from_dict(
        {"sequence": ["MKTV"] * 4, "label": [[0, 1, 0, 1]] * 4},
        features=Features({"sequence": Value("string"), "label": List(ClassLabel(names=["a", "b"]))}),
    )
    recipe = RECIPES["frozen"].replace(pooling="mean")
    with pytest.raises(ConfigurationError, match="pooling='mean' with a token-classification head"):
        train(DatasetDict(train=data, test=data), tmp_path, recipe)
    with pytest.raises(ConfigurationError, match="pooling='mean' with a token-classification head"):
        estimate("8M", recipe=recipe, head="token-classification")


@pytest.mark.parametrize("pooling", POOLINGS)
def test_an_estimate_counts_the_heads_parameters(pooling):
    recipe = RECIPES["frozen"].replace(pooling=pooling)
    head = PooledEsmForSequenceClassification(resolve_config("8M")[1], classifier_pooling=pooling).classifier
    found = estimate("8M", recipe=recipe, device="cpu", tokens=64)
    assert found.trainable_parameters == sum(parameter.numel() for parameter in head.parameters())
