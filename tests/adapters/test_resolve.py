"""Every preset matches the right layers with every head; a target without a match raises with a suggestion."""

from __future__ import annotations

import pytest
from conftest import make_model
from peft import get_peft_model
from torch import nn
from transformers import EsmForMaskedLM, EsmForSequenceClassification, EsmForTokenClassification, EsmModel

from esm_efficient import RECIPES, lora_config, recipe_adapters, resolve_targets
from esm_efficient.errors import ConfigurationError, TargetModuleError

HEADS = [EsmForSequenceClassification, EsmForTokenClassification, EsmForMaskedLM, EsmModel]
PER_LAYER = {
    "qkv": ["attention.self.query", "attention.self.key", "attention.self.value"],
    "attention": ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"],
    "mlp": ["intermediate.dense", "output.dense"],
    "all-linear": [
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ],
}
TUTORIAL = [
    "query",
    "key",
    "value",
    "EsmSelfOutput.dense",
    "EsmIntermediate.dense",
    "EsmOutput.dense",
    "EsmContactPredictionHead.regression",
    "EsmClassificationHead.dense",
    "EsmClassificationHead.out_proj",
]


def expected(head, preset):
    prefix = "" if head is EsmModel else "esm."
    return {f"{prefix}encoder.layer.{i}.{suffix}" for i in range(2) for suffix in PER_LAYER[preset]}


def wrapped(model) -> set[str]:
    """Return the paths of the layers with an adapter."""
    marker = ".lora_A.default"
    names = [name for name, _ in model.named_modules() if name.endswith(marker)]
    return {name.removeprefix("base_model.model.").removesuffix(marker) for name in names}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("preset", PER_LAYER)
def test_preset_matches_its_layers_and_peft_wraps_the_same(tiny_model, head, preset):
    model = tiny_model(head)
    report = resolve_targets(model, preset)
    assert set(report.modules) == expected(head, preset)
    assert [len(match.modules) for match in report.matches] == [2] * len(PER_LAYER[preset])
    assert wrapped(get_peft_model(model, lora_config(model, preset=preset, r=2))) == expected(head, preset)


def test_the_tutorials_six_targets_without_a_match_are_named_with_advice(tiny_model):
    with pytest.raises(TargetModuleError) as caught:
        resolve_targets(tiny_model(), TUTORIAL)
    message = str(caught.value)
    assert message.startswith("6 of 9 target modules match no linear layer")
    for target, advice in {
        "EsmSelfOutput.dense": "use 'attention.output.dense'",
        "EsmIntermediate.dense": "use 'intermediate.dense'",
        "EsmOutput.dense": "use 'output.dense'",
        "EsmContactPredictionHead.regression": "leave it out, no training loss uses it",
        "EsmClassificationHead.dense": "leave it out, a head needs no adapter",
        "EsmClassificationHead.out_proj": "leave it out, a head needs no adapter",
    }.items():
        line = next(line for line in message.splitlines() if line.strip().startswith(f"{target}:"))
        assert advice in line
    assert "query:" not in message


@pytest.mark.parametrize(
    ("targets", "advice"),
    [
        (["quary"], "did you mean 'query'"),
        (["query", "attention.self.keys"], "attention.self.key"),
        (["zzz"], "no layer of the model has a similar name"),
        (["EsmLayer"], "no layer of the model has a similar name"),
    ],
)
def test_a_target_without_a_match_raises_with_advice(tiny_model, targets, advice):
    with pytest.raises(TargetModuleError, match=r"of \d target modules match no linear layer") as caught:
        lora_config(tiny_model(), target_modules=targets)
    assert advice in str(caught.value)


def test_the_contact_head_is_refused_as_a_target(tiny_model):
    with pytest.raises(TargetModuleError, match="contact_head"):
        resolve_targets(tiny_model(), ["regression"])


def test_a_bare_dense_warns_that_it_matches_the_classifier(tiny_model, caplog):
    report = resolve_targets(tiny_model(), ["dense"])
    assert "classifier.dense" in report.modules
    assert "classifier.dense" in caplog.text


def test_an_unknown_preset_and_an_empty_list_are_refused(tiny_model):
    with pytest.raises(ConfigurationError, match="all-linear"):
        resolve_targets(tiny_model(), "all_linear")
    with pytest.raises(ConfigurationError, match="empty"):
        resolve_targets(tiny_model(), [])
    with pytest.raises(ConfigurationError, match="got 3: expected path suffixes"):
        resolve_targets(tiny_model(), ["query", 3])


def test_a_model_that_has_adapters_is_named_as_the_reason(tiny_model):
    model = tiny_model()
    wrapped_model = get_peft_model(model, lora_config(model))
    with pytest.raises(TargetModuleError, match=r"query: the model has adapters already.*unload"):
        resolve_targets(wrapped_model, ["query"])
    assert len(resolve_targets(wrapped_model.unload(), ["query"]).modules) == 2


def test_every_peft_option_is_passed_on(tiny_model):
    config = lora_config(
        tiny_model(),
        preset="mlp",
        r=4,
        lora_alpha=3,
        lora_dropout=0.25,
        use_rslora=True,
        use_dora=True,
        bias="lora_only",
        init_lora_weights="gaussian",
        rank_pattern={"output.dense": 2},
        exclude_modules=["layer.0.intermediate.dense"],
    )
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (4, 3, 0.25, "lora_only")
    assert config.use_rslora
    assert config.use_dora
    assert config.init_lora_weights == "gaussian"
    assert config.rank_pattern == {"output.dense": 2}
    assert set(config.exclude_modules) == {"layer.0.intermediate.dense", "attention.output.dense"}


def test_chosen_layers_work_with_every_preset(tiny_model):
    for preset, suffixes in PER_LAYER.items():
        model = tiny_model()
        model = get_peft_model(model, lora_config(model, preset=preset, r=2, layers_to_transform=[1]))
        assert wrapped(model) == {f"esm.encoder.layer.1.{suffix}" for suffix in suffixes}


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"rank_pattern": {"query": 4, "qery": 2}}, "rank_pattern: 'qery' matches no layer.*did you mean 'query'"),
        ({"alpha_pattern": {"attention.self.keys": 2}}, r"alpha_pattern: .*did you mean 'attention\.self\.key'"),
        ({"rank_pattern": {"query(": 2}}, r"rank_pattern: 'query\(' is not a regular expression: missing \)"),
        ({"alpha_pattern": {r"layer\.7\..*": 2}}, "alpha_pattern: .* matches no layer that gets an adapter"),
        (
            {"rank_pattern": {"output.dense": 2}, "preset": "qkv"},
            "matches no layer that gets an adapter",
        ),
        (
            {"modules_to_save": ["clasifier"]},
            "'clasifier' matches no module: did you mean 'classifier'",
        ),
        ({"modules_to_save": ["classifier", "zzz"]}, "modules_to_save: 'zzz' matches no module"),
    ],
    ids=str,
)
def test_a_name_in_an_option_of_peft_that_matches_nothing_is_refused(tiny_model, options, advice):
    with pytest.raises(TargetModuleError, match=advice):
        lora_config(tiny_model(), **options)


def test_a_text_in_place_of_a_list_of_names_is_refused(tiny_model):
    with pytest.raises(ConfigurationError, match=r"modules_to_save='classifier' is a text: .* \['classifier'\]"):
        lora_config(tiny_model(), modules_to_save="classifier")


def test_names_in_options_of_peft_are_matched_as_peft_matches_them(tiny_model):
    model = tiny_model()
    ranks = {r"layer\.1\..*\.query": 4, "key": 3, "esm.encoder.layer.0.attention.self.value": 2}
    options = {"rank_pattern": ranks, "alpha_pattern": {"key": 1}, "modules_to_save": ["classifier", "word_embeddings"]}
    model = get_peft_model(model, lora_config(model, preset="qkv", r=8, **options))
    got = {path: module.r["default"] for path, module in model.base_model.model.named_modules() if hasattr(module, "r")}
    per_layer = [{"query": 8, "key": 3, "value": 2}, {"query": 4, "key": 3, "value": 8}]
    paths = "esm.encoder.layer.{}.attention.self.{}".format
    assert got == {paths(number, role): r for number, layer in enumerate(per_layer) for role, r in layer.items()}


@pytest.mark.parametrize("preset", ["qkv", "all-linear"])
def test_two_choices_of_layers_are_refused(tiny_model, preset):
    with pytest.raises(ConfigurationError, match=r"layers='top-1' and layers_to_transform=\[0\] both choose layers"):
        lora_config(tiny_model(), preset=preset, layers="top-1", layers_to_transform=[0])
    with pytest.raises(ConfigurationError, match="both choose layers"):
        recipe_adapters("top", tiny_model(), layers_to_transform=[0])


def test_the_head_is_trained_in_full_and_saved_with_the_adapter(tiny_model):
    for head in (EsmForSequenceClassification, EsmForTokenClassification):
        model = tiny_model(head)
        model = get_peft_model(model, lora_config(model, r=2))
        assert any("classifier" in name and p.requires_grad for name, p in model.named_parameters())
        assert all("lora" in name or "classifier" in name for name, p in model.named_parameters() if p.requires_grad)


def test_the_heads_of_a_subclass_and_of_a_custom_model_are_trained_in_full_too(tiny_model):
    class Mine(EsmForSequenceClassification):
        pass

    class Custom(EsmModel):
        def __init__(self, config):
            super().__init__(config)
            self.classifier = nn.Linear(config.hidden_size, 2)

    for head in (Mine, Custom):
        model = tiny_model(head)
        model = get_peft_model(model, lora_config(model, r=2))
        assert any("classifier" in name for name, p in model.named_parameters() if p.requires_grad)


def test_an_unknown_architecture_lists_its_linear_layers():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(2, 2), nn.Linear(2, 2)

    with pytest.raises(TargetModuleError, match=r"up \(1\), down \(1\)"):
        resolve_targets(Other())
    assert resolve_targets(Other(), ["up"]).modules == ("up",)


def test_adapter_options_override_those_of_the_recipe(tiny_model):
    model = tiny_model()
    assert recipe_adapters("all", model, r=3, preset="qkv").r == 3
    assert recipe_adapters("base", model) is None
    with pytest.raises(ConfigurationError, match="has no adapters"):
        recipe_adapters("base", model, r=3)


def test_the_report_counts_each_target(tiny_model):
    text = str(resolve_targets(tiny_model(), "mlp"))
    assert "intermediate.dense    2 layers" in text
    assert text.endswith("4 layers in all")


@pytest.mark.parametrize(("layers", "numbers"), [("top-1", [1]), ("top-1/2", [1]), ([0], [0]), ("all", [0, 1])])
@pytest.mark.parametrize("preset", PER_LAYER)
def test_adapters_go_into_the_chosen_layers_alone(tiny_model, preset, layers, numbers):
    model = tiny_model(EsmForSequenceClassification)
    paths = {f"esm.encoder.layer.{i}.{suffix}" for i in numbers for suffix in PER_LAYER[preset]}
    assert set(resolve_targets(model, preset, layers=layers).modules) == paths
    config = lora_config(model, preset=preset, r=2, layers=layers)
    assert wrapped(get_peft_model(model, config)) == paths


def test_a_target_that_the_chosen_layers_lack_is_refused(tiny_model):
    model = tiny_model(EsmForSequenceClassification)
    model.esm.encoder.layer[1].intermediate = nn.Identity()
    with pytest.raises(TargetModuleError, match=r"intermediate\.dense"):
        resolve_targets(model, "mlp", layers="top-1")


def test_the_layers_of_a_recipe_are_those_of_its_adapters(tiny_model):
    model = tiny_model(EsmForSequenceClassification)
    recipe = RECIPES["lora"].replace(layers="top-1")
    assert recipe_adapters(recipe, model).layers_to_transform == [1]
    assert recipe_adapters(recipe, model, layers=[0]).layers_to_transform == [0]
    assert recipe_adapters("lora", model).layers_to_transform is None


def test_the_names_that_peft_adds_may_be_given_and_a_list_stays_as_it_was():
    model, names = make_model(), ["classifier", "contact_head"]
    get_peft_model(model, lora_config(model, modules_to_save=names))
    assert names == ["classifier", "contact_head"]
    assert lora_config(make_model(), modules_to_save=["classifier", "score"]).modules_to_save == ["classifier", "score"]


@pytest.mark.parametrize("numbers", [[0, 99], -1, [0, -1]])
def test_numbers_of_layers_that_the_model_lacks_are_refused(tiny_model, numbers):
    with pytest.raises(ConfigurationError, match=r"layers_to_transform has (99|-1): the model has the layers 0 to"):
        lora_config(tiny_model(), layers_to_transform=numbers)
