"""The registry: suffixes match whole path components, and some parts never get adapters."""

from __future__ import annotations

import pytest
import torch
import transformers
from conftest import make_dataset, make_model
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import DataCollatorWithPadding, EsmForSequenceClassification, EsmModel, Trainer, TrainingArguments

from esm_efficient import AuditCallback, lora_config, prepare_model, register_architecture, resolve_targets
from esm_efficient.adapters.registry import (
    ARCHITECTURES,
    PRESETS,
    ROLES,
    Architecture,
    ends_with,
    find_architecture,
    is_in_head,
    is_unread,
)
from esm_efficient.errors import ConfigurationError, TargetModuleError


@pytest.mark.parametrize(
    ("path", "suffix", "matches"),
    [
        ("esm.encoder.layer.0.attention.self.query", "query", True),
        ("esm.encoder.layer.0.attention.self.query", "self.query", True),
        ("query", "query", True),
        ("my_query", "query", False),
        ("esm.encoder.layer.0.attention.output.dense", "output.dense", True),
        ("layer.query.base_layer", "query", False),
    ],
)
def test_ends_with(path, suffix, matches):
    assert ends_with(path, suffix) is matches


def test_every_architecture_has_every_role_of_every_preset():
    for architecture in ARCHITECTURES:
        assert set(architecture.roles) == set(ROLES)
    assert all(set(roles) <= set(ROLES) for roles in PRESETS.values())


def test_no_role_touches_the_contact_head_or_the_classifier(tiny_model):
    model = tiny_model(EsmForSequenceClassification)
    architecture = find_architecture(model)
    for path, _ in model.named_modules():
        if "contact_head" in path or path.startswith("classifier"):
            assert not any(ends_with(path, suffix) for suffix in architecture.suffixes())


def test_unread_parts_are_found_by_whole_components():
    esm = ARCHITECTURES[0]
    assert is_unread(esm, "esm.contact_head.regression.weight")
    assert not is_unread(esm, "esm.my_contact_head.weight")


@pytest.mark.parametrize(
    ("path", "inside"),
    [
        ("classifier.dense.weight", True),
        ("base_model.model.classifier.dense", True),
        ("classifier", True),
        ("my_classifier.dense.weight", False),
        ("esm.encoder.layer.0.output.dense", False),
    ],
)
def test_parts_of_a_head_are_found_by_whole_components(path, inside):
    assert is_in_head(ARCHITECTURES[0], path) is inside


def esm_1b():
    """ESM-1b and ESM-1v in transformers: learnt positions, and a layer norm before the first layer."""
    return make_model(EsmModel, position_embedding_type="absolute", emb_layer_norm_before=True)


def esmc_of_transformers():
    if not hasattr(transformers, "EsmcModel"):
        pytest.skip("this version of transformers has no ESM C")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.EsmcModel(transformers.EsmcConfig(**sizes))


def fair_esm():
    esm = pytest.importorskip("esm", reason="fair-esm is not installed")
    if not hasattr(esm, "ESM2"):
        pytest.skip("another package named esm is installed instead of fair-esm")
    return esm.ESM2(num_layers=2, embed_dim=16, attention_heads=2)


def esm_c():
    esmc = pytest.importorskip("esm.models.esmc", reason="EvolutionaryScale's esm is not installed")
    from esm.tokenization import EsmSequenceTokenizer

    model = esmc.ESMC(d_model=64, n_heads=4, n_layers=2, tokenizer=EsmSequenceTokenizer(), use_flash_attn=False)
    model.sequence_head.requires_grad_(False)
    return model


def fa_esm():
    # FAESM derives its classes from EsmModel; it cannot be imported with every supported version of transformers.
    faesm = pytest.importorskip("faesm.esm", reason="FAESM cannot be imported", exc_type=ImportError)
    return faesm.FAEsmModel(make_model(EsmModel).config)


# Number of layers that each preset adapts in an encoder of two layers.
ENCODERS = {
    "esmc": (esmc_of_transformers, {"qkv": 6, "attention": 8, "mlp": 6, "all-linear": 14}),
    "esm-1b": (esm_1b, {"qkv": 6, "attention": 8, "mlp": 4, "all-linear": 12}),
    "fair-esm": (fair_esm, {"qkv": 6, "attention": 8, "mlp": 4, "all-linear": 12}),
    "esm-c": (esm_c, {"qkv": 2, "attention": 4, "mlp": 4, "all-linear": 8}),
    "faesm": (fa_esm, {"qkv": 6, "attention": 8, "mlp": 4, "all-linear": 12}),
}


class Classifier(nn.Module):
    """A custom head on any encoder."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.LazyLinear(2)

    def forward(self, input_ids, attention_mask):
        if type(self.encoder).__name__ == "ESM2":
            states = self.encoder(input_ids, repr_layers=[2])["representations"][2]
        elif type(self.encoder).__name__ == "ESMC":
            states = self.encoder(input_ids).embeddings
        else:
            states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return {"logits": self.classifier(states[:, 0])}


def adapted(model):
    """Return the paths of the layers with an adapter."""
    marker = ".lora_A.default"
    names = [name.removesuffix(marker) for name, _ in model.named_modules() if name.endswith(marker)]
    return {name.removeprefix("base_model.model.") for name in names}


@pytest.mark.parametrize("layers", ["all", "top-1", [0]])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", ENCODERS)
def test_peft_adapts_the_resolved_layers_of_an_encoder_alone_and_inside_a_model(name, inside, preset, layers):
    encoder = ENCODERS[name][0]()
    model = nn.ModuleDict({"encoder": encoder}) if inside else encoder
    paths = resolve_targets(model, preset, layers=layers).modules
    assert len(paths) == ENCODERS[name][1][preset] / (1 if layers == "all" else 2)
    assert adapted(get_peft_model(model, lora_config(model, preset=preset, r=2, layers=layers))) == set(paths)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_resolves_every_preset_and_trains(tmp_path, tokenizer, name, preset):
    build, layers = ENCODERS[name]
    torch.manual_seed(0)
    model = Classifier(build())
    model(torch.tensor([[0, 5, 6, 2]]), torch.ones(1, 4, dtype=torch.long))  # the lazy head takes its width
    assert len(resolve_targets(model, preset).modules) == layers[preset]
    assert len(resolve_targets(model.encoder, preset).modules) == layers[preset]
    # LoRA's B is not zero here, so that every adapter has a gradient at the first step.
    model = prepare_model(model, adapters=lora_config(model, preset=preset, r=2, init_lora_weights=False))
    others = [n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    assert others
    assert all("classifier.modules_to_save" in name for name in others)
    audit = AuditCallback(patience=1)
    args = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )

    def loss(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs["logits"], labels)

    Trainer(
        model,
        args,
        train_dataset=make_dataset(16),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_loss_func=loss,
        callbacks=[audit],
    ).train()
    moved = [path for path in audit.report.moved if "lora_" in path]
    assert len(moved) == 2 * layers[preset]
    assert not audit.report.pending


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o, self.up, self.down = (nn.Linear(4, 4) for _ in range(6))


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(4, 2)


def test_an_unknown_encoder_is_refused_with_its_layers_and_can_be_registered(monkeypatch):
    monkeypatch.setattr("esm_efficient.adapters.registry.ARCHITECTURES", list(ARCHITECTURES))
    with pytest.raises(TargetModuleError, match=r"q \(3\), k \(3\).*head \(1\).*register_architecture\(Architecture"):
        resolve_targets(Unknown(), "qkv")
    roles = dict(zip(ROLES, ("q", "k", "v", "o", "up", "down"), strict=True))
    register_architecture(Architecture(name="mine", encoder="Unknown", layers="blocks", roles=roles))
    assert len(resolve_targets(Unknown(), "all-linear").modules) == 18
    register_architecture(Architecture(name="mine", encoder="Unknown", layers="blocks", roles=roles | {"output": "up"}))
    assert len(resolve_targets(Unknown(), "all-linear").modules) == 15
    gated = roles | {"intermediate": ("up", "o")}
    register_architecture(Architecture(name="mine", encoder="Unknown", layers="blocks", roles=gated))
    assert resolve_targets(Unknown(), "mlp").modules == tuple(
        f"blocks.{number}.{suffix}" for suffix in ("up", "o", "down") for number in range(3)
    )


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({"query": "q"}, "expected query, key, value"),
        (dict.fromkeys(ROLES, "q") | {"output": ()}, "no suffix for output"),
        (dict.fromkeys(ROLES, "q") | {"output": ("down", "")}, "no suffix for output"),
        (dict.fromkeys(ROLES, ""), "no suffix for query, key"),
    ],
)
def test_an_architecture_without_all_roles_is_refused(roles, message):
    with pytest.raises(ConfigurationError, match=message):
        Architecture(name="mine", encoder="Unknown", layers="blocks", roles=roles)


def test_the_entry_of_a_class_wins_over_that_of_its_parent(monkeypatch, tiny_model):
    monkeypatch.setattr("esm_efficient.adapters.registry.ARCHITECTURES", list(ARCHITECTURES))
    model = tiny_model(type("MyEncoder", (EsmModel,), {}))
    assert find_architecture(model).name == "esm"
    register_architecture(Architecture(name="mine", encoder="MyEncoder", layers="layer", roles=ARCHITECTURES[0].roles))
    assert find_architecture(model).name == "mine"


def test_a_class_of_the_same_name_in_another_package_is_not_matched():
    stranger = type("ESM2", (Unknown,), {"__module__": "esme.esm"})()
    with pytest.raises(TargetModuleError, match="ESM2 contains no known encoder"):
        find_architecture(stranger)
