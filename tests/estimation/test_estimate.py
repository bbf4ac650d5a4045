"""estimate(): categories add up, savings are predicted, and invalid options are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import make_model, slow_except, tiny_config
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from transformers import (
    EsmForMaskedLM,
    EsmForProteinFolding,
    EsmForSequenceClassification,
    EsmForTokenClassification,
    EsmModel,
)

from esm_efficient import (
    RECIPES,
    Device,
    demo_model_path,
    estimate,
    lora_config,
    peak_memory,
    prepare_model,
    recipe_adapters,
    recommend,
)
from esm_efficient.errors import ConfigurationError, TargetModuleError
from esm_efficient.estimation.inputs import batch_lengths, data_lengths, resolve_config, resolve_head, token_lengths
from esm_efficient.published import ESM2_SIZES


def test_parameters_are_those_of_the_real_model():
    model = make_model(num_hidden_layers=5)
    prepared = prepare_model(model, adapters=lora_config(model))
    result = estimate(tiny_config(num_hidden_layers=5), recipe="lora", device="cpu", tokens=16)
    assert result.trainable_parameters == sum(p.numel() for p in prepared.parameters() if p.requires_grad)
    assert result.total_parameters == sum(p.numel() for p in prepared.parameters())
    weights = sum(t.numel() * t.element_size() for t in [*prepared.parameters(), *prepared.buffers()])
    assert result.peak.weights == weights


@pytest.mark.parametrize("size", ["8M", "650M", "15B"])
def test_known_sizes_have_about_the_parameters_in_their_names(size):
    result = estimate(size, recipe=RECIPES["frozen"].replace(cache=False), tokens=8, micro_batch=1)
    expected = float(size[:-1]) * {"M": 1e6, "B": 1e9}[size[-1]]
    assert result.total_parameters == pytest.approx(expected, rel=0.07)
    layers, width, heads = ESM2_SIZES[size]
    assert (width % heads, len({p.part for p in result.timeline if p.part.startswith("layer")})) == (0, layers)


def test_estimating_15_billion_parameters_needs_little_memory():
    with peak_memory() as resident:
        result = estimate("15B", recipe="base", device="A100-80", tokens=1024)
    assert result.peak.weights > 60e9
    assert resident.bytes < 6e9
    assert not result.fits()


def test_size_hub_name_and_config_give_the_same_estimate(tmp_path):
    names = ["8M", "esm2_t6_8M", "esm2_t6_8M_UR50D", "facebook/esm2_t6_8M_UR50D", resolve_config("8M")[1]]
    resolve_config("8M")[1].save_pretrained(tmp_path)
    head = RECIPES["frozen"].replace(cache=False)
    peaks = {estimate(name, recipe=head, tokens=32).peak for name in [*names, tmp_path]}
    assert len(peaks) == 1
    wrapped = make_model()
    wrapped = prepare_model(wrapped, adapters=lora_config(wrapped))
    assert resolve_config(wrapped)[1].hidden_size == 16
    assert estimate(demo_model_path(), recipe=head, tokens=32).total_parameters > 800_000


@pytest.mark.parametrize("recipe", slow_except(RECIPES, "top"))
def test_the_peak_is_the_highest_point_of_the_timeline(recipe):
    result = estimate(tiny_config(num_hidden_layers=6), recipe=recipe, tokens=40)
    highest = max(point.memory.total for point in result.timeline)
    assert highest == max(cost.peak.total for cost in result.phases.values())
    assert result.peak.total == max(highest, 0 if result.cache is None else result.cache.peak.total)


@pytest.mark.slow
def test_memory_savings_are_predicted():
    def peak(**options):
        return estimate("8M", device="A10G", tokens=256, **({"recipe": "base"} | options)).peak

    base = peak()
    assert peak(recipe="gc").activations < 0.2 * base.activations
    assert peak(recipe="ga").total < base.total
    assert peak(recipe="lora").optimizer < 0.2 * base.optimizer
    assert 1.8 * base.activations < peak(micro_batch=16).activations < 2.1 * base.activations
    assert peak(attention="eager").activations > base.activations
    assert peak(precision="float32").activations > 1.3 * base.activations
    assert peak(padding="padding-free").activations <= base.activations
    assert peak(recipe="frozen").total < peak(recipe="lora").total


def test_accumulated_gradients_stay_through_every_phase():
    once, twice = (estimate(tiny_config(), recipe="base", tokens=32, accumulation=n) for n in (1, 2))
    assert once.phases["forward"].peak.gradients == 0
    assert twice.phases["forward"].peak.gradients == twice.phases["optimizer"].peak.gradients
    assert twice.phases["forward"].peak.gradients >= 4 * twice.trainable_parameters
    assert twice.phases["forward"].flops == 2 * once.phases["forward"].flops
    assert twice.phases["optimizer"].flops == once.phases["optimizer"].flops


@pytest.mark.slow
def test_time_follows_the_roofline_of_the_device():
    options = {"recipe": "base", "tokens": 256, "precision": "float32"}
    slow = Device("slow", "cuda", 2**34, {"float32": 1e12}, 1e11)
    fast = Device("fast", "cuda", 2**34, {"float32": 2e12}, 2e11)
    one, two = (estimate("150M", device=device, **options) for device in (slow, fast))
    assert one.seconds == pytest.approx(2 * two.seconds)
    flops = sum(cost.flops for cost in one.phases.values())
    moved = sum(cost.bytes_moved for cost in one.phases.values())
    assert not one.is_host_bound
    assert max(flops / 1e12, moved / 1e11) <= one.seconds <= flops / 1e12 + moved / 1e11
    assert one.residues_per_second == pytest.approx(8 * 254 / one.seconds)
    assert math.isnan(estimate("8M", device="cpu", **options).seconds)


def test_flops_are_six_per_weight_and_token():
    result = estimate("150M", recipe="base", tokens=128, micro_batch=4, padding="equal-length")
    linear = 30 * 12 * 640 * 640
    attention = 30 * 2 * 128 * 640
    forward = 2 * 4 * 128 * (linear + attention)
    assert result.phases["forward"].flops == pytest.approx(forward, rel=0.01)
    assert result.phases["backward"].flops == pytest.approx(2 * forward, rel=0.03)


@pytest.mark.slow
def test_lengths_of_a_dataset_decide_memory_and_time():
    lengths = [100] * 50 + [400] * 2
    mixed, longest = (
        estimate("8M", device="A10G", recipe="lora", tokens=length, padding="padded") for length in (lengths, 400)
    )
    assert mixed.peak == longest.peak
    assert mixed.seconds < longest.seconds
    assert mixed.residues == pytest.approx(8 * np.mean(np.array(lengths) - 2))
    packed = estimate("8M", device="A10G", recipe="lora", tokens=lengths)
    assert packed == estimate("8M", device="A10G", recipe="lora", tokens=lengths, padding="padding-free")
    assert packed.peak.total < mixed.peak.total


def test_token_lengths_reads_every_known_column():
    sequences = Dataset.from_dict({"sequence": ["M" * 10, "M" * 30]})
    assert token_lengths(sequences) == token_lengths(DatasetDict(train=sequences)) == [12, 32]
    assert token_lengths(sequences.add_column("tokens", [5, 6])) == [5, 6]
    assert token_lengths(Dataset.from_dict({"residues": [5, 6]})) == [7, 8]
    assert token_lengths(Dataset.from_dict({"input_ids": [[0, 5, 2], [0, 5, 5, 2]]})) == [3, 4]
    assert token_lengths(np.int64(7)) == 7
    long = Dataset.from_dict({"residues": [5, 30_000], "sequence": ["MKT", "M" * 30_000]})
    assert token_lengths(long) == [7, 1024]
    assert token_lengths(long, max_tokens=50_000) == [7, 30_002]
    assert token_lengths(long.remove_columns("residues")) == [5, 1024]
    with pytest.raises(ConfigurationError, match="expected one of tokens, input_ids, residues, sequence"):
        token_lengths(Dataset.from_dict({"length": [5]}))  # the unit is unknown


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (Dataset.from_dict({"tokens": [["M", "K"], ["M"]]}), r"row 0 of the column 'tokens' is \['M', 'K'\]"),
        (Dataset.from_dict({"sequence": ["MKT", None]}), "row 1 of the column 'sequence' is None: expected a text"),
        (Dataset.from_dict({"residues": [5, None]}), "row 1 of the column 'residues' is None: expected a number"),
        (Dataset.from_dict({"input_ids": [[1], None]}), "row 1 of the column 'input_ids' is None: expected a list"),
        (DatasetDict(test=Dataset.from_dict({"residues": [5]})), "got the splits test: expected a split train"),
        ({"train": [5], "validation": []}, "the split validation: .*got no sequence"),
    ],
)
def test_a_dataset_without_a_length_in_each_row_is_refused(tokens, message):
    with pytest.raises(ConfigurationError, match=message):
        data_lengths(tokens)


def test_a_model_of_the_hub_that_is_not_there_is_named_with_what_to_do(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConfigurationError, match=r"no folder nobody/there, .* is set\). While online, run `hf download"
    ):
        estimate("nobody/there")


def test_the_validation_split_may_be_one_number():
    assert data_lengths({"train": [5, 6], "validation": 7}).validation == (7,)


@pytest.mark.parametrize("tokens", ["512", Path("t.csv"), 512.0, ["MKT", "MAL"], pd.DataFrame({"residues": [5]}), None])
def test_what_has_no_lengths_is_refused(tokens):
    with pytest.raises(ConfigurationError, match=r"tokens: got .*expected a whole number"):
        estimate("8M", tokens=tokens)


def test_the_folder_of_an_adapter_is_estimated_by_the_config_of_its_base(tmp_path):
    resolve_config("8M")[1].save_pretrained(tmp_path / "adapter" / "base_config")
    assert resolve_config(tmp_path / "adapter")[0] == "adapter"
    assert resolve_config(tmp_path / "adapter")[1].num_hidden_layers == 6


def test_the_folder_of_a_plain_peft_adapter_is_estimated_by_its_base(tmp_path):
    model = make_model(num_hidden_layers=3)
    model.config.save_pretrained(tmp_path / "base")
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], base_model_name_or_path=str(tmp_path / "base"))
    config.save_pretrained(tmp_path / "adapter")
    name, found = resolve_config(tmp_path / "adapter")
    assert (name, found.num_hidden_layers) == ("adapter", 3)
    LoraConfig(target_modules=["query"]).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigurationError, match="base_model_name_or_path=None: expected the base model"):
        resolve_config(tmp_path / "adapter")


def test_the_demo_is_named_as_it_is_typed():
    assert resolve_config("demo")[0] == "demo"


def test_a_quantised_checkpoint_is_estimated_as_one():
    config = tiny_config(num_hidden_layers=1, hidden_size=64, intermediate_size=256)
    whole = estimate(config, recipe="lora", tokens=50, device="cpu")
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    held = estimate(config, recipe="lora", tokens=50, device="cpu")
    assert held.peak.weights < whole.peak.weights
    assert held.recipe.quantization == "4bit"
    with pytest.raises(ConfigurationError, match="only adapters train on a quantised base"):
        estimate(config, recipe="base", tokens=50, device="cpu")
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ConfigurationError, match="quantised with gptq: expected bitsandbytes"):
        estimate(config, recipe="lora", tokens=50, device="cpu")


def test_a_device_with_unknown_rates_has_memory_and_no_time():
    config = tiny_config(num_hidden_layers=1)
    for rates, bandwidth in (({"float32": 1e13}, 0.0), ({"float16": 1e13}, 1e11), ({}, 1e11)):
        device = Device("mine", "cuda", 6 * 2**30, rates, bandwidth)
        precision = "fp16" if "float16" in rates else "float32"
        found = estimate(config, recipe="lora", tokens=50, device=device, precision=precision)
        assert found.peak.total > 0
        assert np.isnan(found.seconds) == (not (rates and bandwidth))
    named = estimate(config, recipe="lora", tokens=50, device="12GB")
    assert (named.precision, named.fits()) == ("bf16", True)
    assert "fits 12GB with 12.0 GiB" in str(named)
    assert "optimizer step:" not in str(named)
    with pytest.raises(ConfigurationError, match="memory and rates of device 'mine' are unknown"):
        recommend(config, Device("mine", "cuda", 2**33, {"float32": 1e13}, 0.0), 50)


def test_lengths_of_the_largest_and_the_average_batch():
    assert batch_lengths([10], 4, "padded") == (10, 10, 8.0)
    longest, typical, residues = batch_lengths([10, 30], 2, "padded")
    assert (longest, residues) == (30, 18.0)
    assert typical == pytest.approx(25, abs=1)  # three of four pairs have the long sequence
    assert batch_lengths([10, 30], 2, "padding-free") == (20, 20, 18.0)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("9M", {}, "ESM-2 sizes 8M, 35M"),
        ("/nowhere", {}, "expected a folder with a config.json"),
        ("8M", {"recipe": "al"}, "no recipe is named 'al'"),
        ("8M", {"device": "A11"}, "no device or instance type"),
        ("8M", {"precision": "int4"}, "precision='int4': expected one of float32"),
        (
            "8M",
            {"device": "T4", "precision": "bf16"},
            "cannot multiply bfloat16.*Use precision='float32' or 'fp16'",
        ),
        ("8M", {"optimizer": "lion"}, "optimizer='lion'"),
        ("8M", {"attention": "flash"}, "attention='flash'"),
        ("8M", {"padding": "some"}, "padding='some'"),
        ("8M", {"padding": "padding-free", "attention": "eager"}, "the lean encoder computes attention itself"),
        ("8M", {"head": "regression"}, "head='regression'"),
        ("8M", {"num_labels": 0}, "num_labels=0: expected at least 1"),
        (EsmForProteinFolding, {}, "EsmForProteinFolding has no head that can be estimated: give head="),
        (EsmModel, {}, "EsmModel has no head that can be estimated: give head="),
        ("8M", {"adapter_options": {"target_modules": ["query", 3]}}, "target modules: got 3"),
        ("8M", {"adapter_options": {"lora_alfa": 3}}, "no option 'lora_alfa': did you mean 'lora_alpha'"),
        ("8M", {"tokens": 0}, "tokens=0: expected at least 1"),
        ("8M", {"tokens": []}, "got no sequence"),
        ("8M", {"micro_batch": 0}, "at least 1"),
        ("8M", {"recipe": "base", "adapter_options": {"r": 4}}, "has no adapters: leave out r"),
        ("8M", {"recipe": "base", "preset": "qkv"}, "expected a preset and a rank with trains='adapters'"),
    ],
)
def test_invalid_options_are_refused(model, options, message):
    if not isinstance(model, str):
        model = model.__new__(model)  # its class is all that is read
        model.config = tiny_config()
    with pytest.raises(ConfigurationError, match=message):
        estimate(model, **options)


def test_options_of_adapters_may_be_mappings_and_lists():
    options = {"adapter_options": {"rank_pattern": {"query": 4}, "modules_to_save": ["classifier"]}, "recipe": "lora"}
    less = estimate(tiny_config(), device="cpu", tokens=20, **options)
    more = estimate(tiny_config(), device="cpu", tokens=20, recipe="lora")
    # The rank of the queries is 4 in place of 8: A of (r, 16) and B of (16, r) in each of two layers.
    assert more.trainable_parameters - less.trainable_parameters == 2 * 4 * (16 + 16)


DAMAGED = {
    "config.json": ["{", "[]", '{"model_type": "evil"}', '{"model_type": 5}'],
    "adapter_config.json": ["{", "[]", '{"base_model_name_or_path": 5}', '{"base_model_name_or_path": "other"}'],
}


@pytest.mark.parametrize(("name", "content"), [(name, text) for name, texts in DAMAGED.items() for text in texts])
def test_a_damaged_folder_is_an_error_of_ours(tmp_path, monkeypatch, name, content):
    monkeypatch.chdir(tmp_path)
    for folder, base in (("given", content), ("other", '{"base_model_name_or_path": "given"}')):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(base)
    with pytest.raises(ConfigurationError):
        estimate(str(tmp_path / "given"))


def test_an_unknown_target_is_refused():
    with pytest.raises(TargetModuleError, match="query_projection"):
        estimate("8M", adapter_options={"target_modules": ["query_projection"]})


def test_fits_needs_a_device_with_known_memory():
    with pytest.raises(ConfigurationError, match="name a GPU"):
        estimate(tiny_config(num_hidden_layers=1), recipe="base", device="cpu", tokens=16).fits()


def test_to_dict_survives_json():
    for device in ("cpu", "A10G"):
        result = estimate(tiny_config(num_hidden_layers=1), recipe="base", device=device, tokens=64)
        record = json.loads(json.dumps(result.to_dict()))
        assert record["peak_bytes"] == result.peak.total == sum(record["peak"].values()) - record["peak"]["total"]
        assert record["seconds"] == (None if device == "cpu" else result.seconds)
        assert ("fits A10G" in str(result)) == (device == "A10G")
        assert f"{result.total_parameters:,}" in str(result)


def test_a_model_object_is_estimated_by_its_config():
    model = make_model(EsmForTokenClassification, num_hidden_layers=3)
    name, config = resolve_config(model)
    assert (name, config.num_hidden_layers) == ("EsmForTokenClassification", 3)


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        (EsmForTokenClassification, {}, ("token-classification", 5, None)),
        (EsmForSequenceClassification, {}, ("sequence-classification", 5, "first")),
        (EsmForMaskedLM, {}, ("masked-lm", 5, None)),
        (EsmForTokenClassification, {"head": "masked-lm"}, ("masked-lm", 5, None)),
        (EsmModel, {"head": "token-classification", "num_labels": 3}, ("token-classification", 3, None)),
        (None, {}, ("sequence-classification", 2, None)),
    ],
)
def test_the_head_is_that_of_a_model_object(kind, given, expected):
    model = tiny_config(num_labels=5) if kind is None else make_model(kind, num_labels=5)
    assert resolve_head(model, given.get("head"), given.get("num_labels")) == expected


def test_a_model_object_is_estimated_with_its_head():
    model = make_model(EsmForTokenClassification, num_labels=5)
    found = estimate(model, recipe=RECIPES["frozen"].replace(cache=False), tokens=9, device="cpu")
    assert found.trainable_parameters == sum(p.numel() for p in model.classifier.parameters())


def test_the_8_bit_optimizer_has_a_quarter_of_the_state():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    full, eight = (
        estimate("35M", recipe="base", device="A10G", tokens=64, optimizer=name)
        for name in ("adamw_fused", "adamw_8bit")
    )
    assert 0.25 <= eight.peak.optimizer / full.peak.optimizer < 0.27


def test_without_bitsandbytes_the_8_bit_optimizer_names_the_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigurationError, match="pip install bitsandbytes"):
        estimate("8M", recipe="base", device="A10G", tokens=24, optimizer="adamw_8bit")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["base", "lora"])
def test_a_recipe_for_the_top_layers_is_estimated_as_the_model_that_it_trains(name):
    recipe = RECIPES[name].replace(layers="top-1/3")
    model = EsmForSequenceClassification(resolve_config("8M")[1])
    prepared = prepare_model(model, adapters=recipe_adapters(recipe, model), layers=recipe.layers)
    top, every = (estimate("8M", recipe=changed, device="cpu") for changed in (recipe, RECIPES[name]))
    assert top.trainable_parameters == sum(p.numel() for p in prepared.parameters() if p.requires_grad)
    # Two of six layers keep activations, and the layers below them keep nothing.
    assert top.peak.activations < 0.45 * every.peak.activations
    assert top.phases["backward"].flops < 0.45 * every.phases["backward"].flops
