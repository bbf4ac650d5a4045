"""Encoders other than ESM-2: ESM C of transformers does all that ESM-2 does, except for the lean encoder."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest
import torch
import transformers
from conftest import slow_except
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from peft import AutoPeftModelForSequenceClassification, AutoPeftModelForTokenClassification, get_peft_model
from torch import nn

from esm_efficient import (
    RECIPES,
    Predictor,
    Profiler,
    ProfilerCallback,
    apply_lean_encoder,
    estimate,
    export_model,
    finetune,
    has_lean_encoder,
    lora_config,
    prepare_model,
)
from esm_efficient.costs.memory import CATEGORIES
from esm_efficient.errors import ConfigurationError
from esm_efficient.tasks import auto_class
from esm_efficient.trunk.cache import cache_states
from esm_efficient.trunk.split import join_model, split_model, truncate

LAYERS = 3
HEADS = ["EsmcForSequenceClassification", "EsmcForTokenClassification", "EsmcForMaskedLM", "EsmcModel"]


def make_config(**options):
    if not hasattr(transformers, "EsmcConfig"):
        pytest.skip("this version of transformers has no ESM C")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    return transformers.EsmcConfig(**(sizes | options))


def make_model(head=HEADS[0], **options):
    torch.manual_seed(0)
    config = make_config(**options)
    return getattr(transformers, head)(config).eval()


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """The folder of a tiny ESM C with random weights, as its pretrained checkpoints are: with the masked-LM head."""
    folder = tmp_path_factory.mktemp("esmc")
    make_model("EsmcForMaskedLM").save_pretrained(folder)
    transformers.EsmcTokenizer().save_pretrained(folder)
    return folder


def make_data(kind):
    """Return random proteins whose label is the share of tryptophan, or where it is."""
    rng = np.random.default_rng(0)
    names = ["no", "yes"]
    features = {
        "class": ClassLabel(names=names),
        "labels": {"few": Value("float32"), "many": Value("float32")},
        "number": Value("float32"),
        "residues": List(ClassLabel(names=names)),
    }
    splits = {}
    for split, size in (("train", 24), ("validation", 8), ("test", 8)):
        proteins = ["".join(rng.choice(list("AKLW"), rng.integers(8, 30))) for _ in range(size)]
        shares = [protein.count("W") / len(protein) for protein in proteins]
        labels = {
            "class": [int(share > 0.25) for share in shares],
            "labels": [{"few": float(share < 0.2), "many": float(share > 0.3)} for share in shares],
            "number": shares,
            "residues": [[int(letter == "W") for letter in protein] for protein in proteins],
        }
        rows = {"sequence": proteins, "label": labels[kind]}
        splits[split] = Dataset.from_dict(rows, Features(sequence=Value("string"), label=features[kind]))
    return DatasetDict(splits)


@pytest.fixture(scope="module")
def data():
    return {kind: make_data(kind) for kind in ("class", "labels", "number", "residues")}


def run(model, data, recipe, folder, **options):
    return finetune(model, data, recipe=recipe, output_dir=folder, disable_tqdm=True, **options)


@pytest.fixture
def batch():
    ids = torch.tensor([[0, 20, 15, 11, 32, 2, 1, 1], [0, 4, 5, 6, 7, 8, 9, 2]])
    return {"input_ids": ids, "attention_mask": (ids != 1).long()}


def output(model, **inputs):
    with torch.no_grad():
        return next(iter(model(**inputs).values()))


def assert_same_weights(got, expected, tolerance=1e-5):
    assert got.keys() == expected.keys()
    difference = sum(float((got[name] - value).pow(2).sum()) for name, value in expected.items())
    assert (difference / sum(float(value.pow(2).sum()) for value in expected.values())) ** 0.5 <= tolerance


@pytest.mark.parametrize(
    ("kind", "recipe"),
    slow_except(
        [
            ("class", "base"),
            ("class", "gc"),
            ("class", "lora"),
            ("class", "all"),
            ("class", "frozen"),
            ("labels", "all"),
            ("number", "lora"),
            ("residues", "base"),
            ("residues", "lora"),
            ("residues", "all"),
            ("residues", "frozen"),
        ],
        ("class", "base"),
        ("labels", "all"),
        ("number", "lora"),
        ("residues", "frozen"),
    ),
)
def test_every_recipe_trains_and_saves_what_plain_transformers_and_peft_load(
    tmp_path, pretrained, data, kind, recipe, caplog
):
    caplog.set_level(logging.INFO, logger="esm_efficient")
    result = run(pretrained, data[kind], recipe, tmp_path, max_steps=3)
    assert result.trained_layers == (() if recipe == "frozen" else tuple(range(LAYERS)))
    assert not has_lean_encoder(result.model)
    assert sum("the lean encoder supports" in record.message for record in caplog.records) == 1
    sequences = data[kind]["test"]["sequence"][:4]
    residues = kind == "residues"
    if RECIPES[recipe].trains == "adapters":
        auto = AutoPeftModelForTokenClassification if residues else AutoPeftModelForSequenceClassification
        labels = 1 if kind == "number" else 2
        plain = auto.from_pretrained(result.model_dir, num_labels=labels)
    else:
        auto = auto_class("token-classification" if residues else "sequence-classification")
        plain = auto.from_pretrained(result.model_dir)
    tokenizer = transformers.AutoTokenizer.from_pretrained(result.model_dir)
    predictor = Predictor.load(result.model_dir)
    for sequence, logits in zip(sequences, predictor.logits(sequences), strict=True):
        expected = output(plain.eval(), **tokenizer(sequence, return_tensors="pt"))[0].double().numpy()
        np.testing.assert_allclose(logits, expected[1:-1] if residues else expected, atol=1e-5)
    exported = export_model(result, tmp_path / "exported", base_model="esmc")
    for one, other in zip(predictor.logits(sequences), Predictor.load(exported).logits(sequences), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("head", HEADS[:2])
def test_every_adapter_gets_a_gradient_under_gradient_checkpointing(head, use_reentrant, batch):
    model = make_model(head, classifier_dropout=0.0)
    adapters = lora_config(model, r=2, init_lora_weights=False)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        prepared = prepare_model(
            make_model(head, classifier_dropout=0.0),
            adapters=adapters,
            gradient_checkpointing=checkpointing,
            use_reentrant=use_reentrant,
        ).train()
        prepared(**batch).logits.sum().backward()
        gradients.append({name: p.grad for name, p in prepared.named_parameters() if p.requires_grad})
    assert sum("lora_" in name for name in gradients[0]) == 2 * 7 * LAYERS
    assert all(gradient.abs().sum() > 0 for gradient in gradients[1].values())
    assert_same_weights(gradients[1], gradients[0])


@pytest.mark.parametrize("layers", range(LAYERS + 1))
@pytest.mark.parametrize("head", HEADS)
def test_the_rest_on_the_states_of_the_trunk_computes_what_the_model_computes(head, layers, batch, tmp_path):
    model = make_model(head)
    expected = output(model, **batch)
    kept = batch["attention_mask"].bool() if expected.dim() == 3 else slice(None)
    trunk, rest = split_model(model, layers)
    got = output(rest, inputs_embeds=trunk(**batch), attention_mask=batch["attention_mask"])
    torch.testing.assert_close(got[kept], expected[kept], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(output(model, **batch), expected)  # the model itself still works
    with pytest.raises(ConfigurationError, match="got token ids, but the model is the rest"):
        rest(**batch)
    if (head, layers) != ("EsmcModel", 0):  # it has no parameter, and so transformers does not save it
        rest.save_pretrained(tmp_path)
        torch.testing.assert_close(output(type(model).from_pretrained(tmp_path).eval(), **batch), expected)
    joined = join_model(rest, trunk)
    torch.testing.assert_close(output(joined, **batch), expected)
    assert joined.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("layers", range(1, LAYERS + 1))
@pytest.mark.parametrize("bias", [False, True])
def test_a_truncated_model_is_an_ordinary_checkpoint_of_the_lowest_layers(layers, bias, batch, tmp_path):
    model = make_model(attention_bias=bias, mlp_bias=bias)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    truncate(model, layers).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert len(loaded.esmc.layers) == loaded.config.num_hidden_layers == layers
    states = model.esmc(**batch, output_hidden_states=True).hidden_states
    expected = states[layers] if layers == LAYERS else model.esmc.norm(states[layers])
    kept = batch["attention_mask"].bool()
    torch.testing.assert_close(output(loaded.esmc, **batch)[kept], expected[kept], atol=1e-5, rtol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


CACHED = {
    "k = 0": ("class", RECIPES["frozen"]),
    "k = 0, residues": ("residues", RECIPES["frozen"]),
    "k = 1, adapters": ("class", RECIPES["lora"].replace(layers="top-1", cache=True)),
    "k = 1, full": ("class", RECIPES["base"].replace(layers="top-1", cache=True)),
    "k = 1, residues, checkpointing": ("residues", RECIPES["all"].replace(layers="top-1", cache=True)),
}


@pytest.mark.parametrize("name", slow_except(CACHED, "k = 0, residues"))
def test_fifty_steps_on_the_cache_give_the_weights_of_fifty_steps_without_it(tmp_path, pretrained, data, name):
    kind, recipe = CACHED[name]
    plain, cached = (
        run(pretrained, data[kind], recipe.replace(cache=cache), tmp_path / str(cache), max_steps=50)
        for cache in (False, True)
    )
    assert (cached.states_seconds > 0, plain.states_seconds) == (True, 0)
    assert_same_weights(cached.model.state_dict(), plain.model.state_dict())
    assert cached.metrics == pytest.approx(plain.metrics, rel=1e-4, abs=1e-5)
    sequences = data[kind]["test"]["sequence"][:2]
    one, other = (Predictor.load(result.model_dir).logits(sequences) for result in (cached, plain))
    for got, expected in zip(one, other, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-4)


def test_states_of_the_same_weights_in_a_deeper_model_are_others(tmp_path):
    rows = Dataset.from_dict({"input_ids": [[0, 5, 6, 2]]})
    keys = []
    for depth in (LAYERS, LAYERS + 1):
        trunk, _ = split_model(make_model(num_hidden_layers=depth), depth - 1)
        cache_states(rows, trunk, tmp_path / str(depth))
        keys += [path.name for path in (tmp_path / str(depth)).iterdir()]
    assert len(set(keys)) == 2


def test_with_dropout_in_the_encoder_there_is_no_cache(tmp_path, data, caplog):
    model = make_model(attention_dropout=0.1, num_labels=2)
    with pytest.raises(ConfigurationError, match=r"has dropout.*set attention_dropout to 0"):
        split_model(model, 1)
    result = run(model, data["class"], "frozen", tmp_path, tokenizer=transformers.EsmcTokenizer(), max_steps=2)
    assert "the model has dropout" in caplog.text
    assert result.states_seconds == 0


def test_a_head_that_pools_residues_is_refused_by_name(tmp_path, pretrained, data):
    for use in (
        lambda recipe: run(pretrained, data["class"], recipe, tmp_path),
        lambda recipe: estimate(pretrained, recipe=recipe, device="cpu"),
    ):
        with pytest.raises(ConfigurationError, match="got a EsmcConfig: heads that pool residues are for ESM-2"):
            use(RECIPES["lora"].replace(pooling="mean"))


def test_the_lean_encoder_and_its_layout_are_refused_by_name():
    model = make_model()
    message = "EsmcForSequenceClassification has no EsmModel of transformers: the lean encoder supports ESM-1b"
    for refused in (model, get_peft_model(make_model(), lora_config(model, r=2))):
        with pytest.raises(ConfigurationError, match=message):
            apply_lean_encoder(refused)
    with pytest.raises(ConfigurationError, match=message):
        estimate(model, padding="padding-free", device="cpu", tokens=16)


@pytest.mark.parametrize(
    ("recipe", "head"),
    slow_except(
        itertools.product(["base", "gc", "lora", "all", "frozen"], ["sequence-classification", "token-classification"]),
        ("all", "sequence-classification"),
        ("frozen", "token-classification"),
    ),
)
def test_the_estimate_is_what_the_profiler_measures(recipe, head, pretrained, data, tmp_path):
    kind = "class" if head == "sequence-classification" else "residues"
    splits = data[kind].map(lambda row, index: resized(row, 39 + index % 2), with_indices=True)
    chosen = RECIPES[recipe].replace(cache=False)
    profiler = ProfilerCallback(compare_with_matmul=False)
    run(
        pretrained,
        splits,
        chosen,
        tmp_path,
        callbacks=[profiler],
        max_steps=4,
        precision="float32",
        early_stopping=None,  # a batch of the evaluation is larger than the micro-batch
    )
    measured = profiler.report
    expected = estimate(
        pretrained, recipe=chosen, device="cpu", tokens=42, head=head, optimizer="adamw_fused", extrapolate=False
    )
    assert expected.padding == "padded"
    for category in CATEGORIES:
        ours, theirs = getattr(expected.peak, category), getattr(measured.peak, category)
        assert ours == pytest.approx(theirs, rel=0.03, abs=30_000), category
    assert expected.peak.total == pytest.approx(measured.peak.total, rel=0.02)
    assert measured.peak.activations > 0


def resized(row, length):
    """Repeat a protein, and its labels if they are those of residues, up to a length."""
    repeated = {"sequence": (row["sequence"] * 40)[:length]}
    return repeated | ({"label": (row["label"] * 40)[:length]} if isinstance(row["label"], list) else {})


@pytest.mark.parametrize(
    ("recipe", "device"), slow_except(itertools.product(["base", "all"], ["cpu", "A10G"]), ("base", "A10G"))
)
def test_the_extrapolated_estimate_is_that_of_all_layers(recipe, device):
    config = make_config(num_hidden_layers=6)
    short, full = (
        estimate(config, recipe=recipe, device=device, tokens=40, extrapolate=flag) for flag in (True, False)
    )
    assert short.peak.total == pytest.approx(full.peak.total, abs=512)
    assert short.trainable_parameters == full.trainable_parameters
    assert {name: cost.flops for name, cost in short.phases.items()} == {
        name: cost.flops for name, cost in full.phases.items()
    }


class Classifier(nn.Module):
    """A head on an encoder that is not one of transformers, as a user writes it."""

    def __init__(self, encoder, width, states):
        super().__init__()
        self.encoder, self.states = encoder, states
        self.classifier = nn.Linear(width, 2)

    def forward(self, input_ids, attention_mask=None):
        return {"logits": self.classifier(self.states(self.encoder, input_ids)[:, 0])}


def fair_esm():
    esm = pytest.importorskip("esm", reason="fair-esm is not installed")
    if not hasattr(esm, "ESM2"):
        pytest.skip("another package named esm is installed instead of fair-esm")
    encoder = esm.ESM2(num_layers=2, embed_dim=16, attention_heads=2)
    return Classifier(encoder, 16, lambda encoder, ids: encoder(ids, repr_layers=[2])["representations"][2])


def esm_c_of_esm():
    esmc = pytest.importorskip("esm.models.esmc", reason="EvolutionaryScale's esm is not installed")
    from esm.tokenization import EsmSequenceTokenizer

    tokenizer = EsmSequenceTokenizer()
    encoder = esmc.ESMC(d_model=64, n_heads=4, n_layers=2, tokenizer=tokenizer, use_flash_attn=False)
    return Classifier(encoder, 64, lambda encoder, ids: encoder(ids).embeddings)


OTHERS = {"fair-esm": fair_esm, "esm": esm_c_of_esm}
REFUSED = {
    "lean encoder": (apply_lean_encoder, "Classifier has no EsmModel of transformers"),
    "cache": (lambda model: split_model(model, 1), "0 modules of transformers' classes EsmModel and EsmcModel"),
    "truncate": (lambda model: truncate(model, 1), "0 modules of transformers' classes EsmModel and EsmcModel"),
    "estimate": (estimate, "model is a Classifier, which has no config of transformers"),
    "finetune": (lambda model: finetune(model, make_data("class")), "model is a Classifier: expected a folder"),
    "predict": (lambda model: Predictor(model, None), "Classifier has no classification head"),
    "export": (lambda model: export_model(model, "folder", base_model="x"), "Classifier"),
}


@pytest.mark.parametrize("use", REFUSED)
@pytest.mark.parametrize("name", OTHERS)
def test_what_needs_a_model_of_transformers_refuses_another_by_name(name, use):
    call, message = REFUSED[use]
    with pytest.raises(ConfigurationError, match=message):
        call(OTHERS[name]())


@pytest.mark.parametrize("name", OTHERS)
def test_the_memory_of_an_encoder_of_another_package_is_measured_by_category(name, batch):
    model = OTHERS[name]()
    model = prepare_model(model, adapters=lora_config(model, r=2))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with Profiler(model, optimizer, compare_with_matmul=False) as profiler:
        for _ in range(4):
            model(**batch)["logits"].sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    peak = profiler.report().peak
    trained = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    assert peak.weights == sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    assert peak.gradients <= trained
    assert peak.optimizer == pytest.approx(2 * trained, rel=0.05)
    assert peak.activations > 0
