import copy

import pytest
import torch
from peft import get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    EsmConfig,
    EsmForMaskedLM,
    EsmForProteinFolding,
    EsmForSequenceClassification,
    EsmForTokenClassification,
    EsmModel,
)

from esm_efficient import ConfigurationError, apply_lean_encoder, has_lean_encoder, lora_config
from esm_efficient.trunk.split import join_model, split_model, truncate

LAYERS = 4


def make_model(kind=EsmForSequenceClassification, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 64}
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "position_embedding_type": "rotary"}
    config = EsmConfig(
        vocab_size=33,
        pad_token_id=1,
        mask_token_id=32,
        token_dropout=True,
        **(rates | sizes | options),
    )
    return kind(config).eval()


def folding_model():
    """A tiny model of the kind of ESMFold, on the meta device."""
    sizes = {"sequence_state_dim": 32, "pairwise_state_dim": 32, "num_blocks": 1, "max_recycles": 1}
    sizes |= {"sequence_head_width": 32, "pairwise_head_width": 32, "position_bins": 4}
    config = EsmConfig(
        vocab_size=33,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        is_folding_model=True,
        esmfold_config={"trunk": sizes, "fp16_esm": False},
    )
    with torch.device("meta"):
        return EsmForProteinFolding(config)


@pytest.fixture
def batch():
    ids = torch.tensor([[0, 20, 15, 11, 32, 2, 1, 1], [0, 4, 5, 6, 7, 8, 9, 2]])
    return {"input_ids": ids, "attention_mask": (ids != 1).long()}


def output(model, **inputs):
    with torch.no_grad():
        return next(iter(model(**inputs).values()))


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("layers", range(LAYERS + 1))
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (EsmForSequenceClassification, {}),
        (EsmForSequenceClassification, {"position_embedding_type": "absolute", "emb_layer_norm_before": True}),
        (EsmForTokenClassification, {}),
        (EsmForMaskedLM, {}),
        (EsmModel, {}),
    ],
    ids=["sequences", "sequences, ESM-1b", "residues", "masked", "no head"],
)
def test_the_rest_on_the_states_of_the_trunk_computes_what_the_model_computes(
    kind, options, layers, lean, batch, caplog
):
    caplog.set_level("INFO", logger="esm_efficient")
    model = make_model(kind, **options)
    expected = output(model, **batch)
    trunk, rest = split_model(model, layers)
    states = trunk(**batch)
    if lean:
        apply_lean_encoder(rest)
    got = output(rest, inputs_embeds=states, attention_mask=batch["attention_mask"])
    assert "the lean encoder is not used" not in caplog.text
    kept = batch["attention_mask"].bool() if got.dim() == 3 else slice(None)
    torch.testing.assert_close(got[kept], expected[kept], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(output(model, **batch), expected)  # the model itself still works
    assert "the lean encoder is not used" not in caplog.text


def test_trunk_and_rest_share_the_parameters_of_the_model_under_their_own_names():
    model = make_model()
    parameters = dict(model.named_parameters())
    trunk, rest = split_model(model, 1)
    for name, parameter in rest.named_parameters():
        assert parameter is parameters[name]
    missing = set(parameters) - set(dict(rest.named_parameters()))
    of_trunk = ("esm.embeddings.", *(f"esm.encoder.layer.{number}." for number in range(3)))
    assert missing == {name for name in parameters if name.startswith(of_trunk)}
    for name, parameter in trunk.named_parameters():
        assert parameter is parameters[name]
        assert not parameter.requires_grad
    assert all(p.requires_grad for name, p in rest.named_parameters() if ".layer.3." in name or "classifier" in name)


def test_the_last_layer_norm_is_in_the_trunk_if_no_layer_is_in_the_rest(batch):
    model = make_model()
    trunk, rest = split_model(model, 0)
    states = trunk(**batch)
    torch.testing.assert_close(model.classifier(states), output(model, **batch))
    assert "esm.encoder.emb_layer_norm_after.weight" not in dict(rest.named_parameters())
    joined = join_model(rest, trunk)
    assert joined.esm.encoder.emb_layer_norm_after.weight is model.esm.encoder.emb_layer_norm_after.weight


def test_a_trunk_of_which_only_first_tokens_are_read_computes_no_others(batch):
    trunk, _ = split_model(make_model(), 0)
    expected, got = trunk(**batch), trunk(**batch, first_only=True)
    torch.testing.assert_close(got[:, 0], expected[:, 0], atol=1e-6, rtol=1e-5)
    assert not got[:, 1:].any()
    torch.testing.assert_close(trunk(**batch), expected)  # the next call is an ordinary one


def test_a_trunk_stays_in_evaluation_mode():
    trunk, _ = split_model(make_model(), 1)
    trunk.train()
    assert not any(module.training for module in trunk.modules())


@pytest.mark.parametrize("lean", [False, True])
def test_a_trained_rest_with_adapters_joins_to_an_ordinary_model(lean, batch, caplog):
    model = make_model()
    plain = copy.deepcopy(model)
    trunk, rest = split_model(model, 2)
    rest = get_peft_model(rest, lora_config(rest, layers_to_transform=[2, 3]))
    if lean:
        apply_lean_encoder(rest)
    with torch.no_grad():
        for name, parameter in rest.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    expected = output(rest, inputs_embeds=trunk(**batch), attention_mask=batch["attention_mask"])
    assert "the lean encoder is not used" not in caplog.text
    joined = join_model(rest, trunk)
    assert has_lean_encoder(joined) is lean
    torch.testing.assert_close(output(joined, **batch), expected, atol=1e-6, rtol=1e-5)
    whole = get_peft_model(plain, lora_config(plain, layers_to_transform=[2, 3]))
    assert set(joined.state_dict()) == set(whole.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: split_model(make_model(), 5), "layers=5: expected 0 to 4"),
        (lambda: split_model(make_model(), -1), "layers=-1"),
        (lambda: split_model(make_model(hidden_dropout_prob=0.1), 1), "has dropout"),
        (lambda: split_model(torch.nn.Linear(2, 2), 1), "0 modules of transformers' classes EsmModel"),
        (lambda: split_model(get_peft_model(m := make_model(), lora_config(m)), 1), "has adapters"),
        (lambda: truncate(get_peft_model(m := make_model(), lora_config(m)), 1), "has adapters"),
        (lambda: truncate(make_model(), 0), "layers=0: expected 1 to 4"),
        (lambda: truncate(folding_model(), 1), "EsmForProteinFolding reads the states of all layers"),
        (lambda: split_model(folding_model(), 1), "EsmForProteinFolding reads the states of all layers"),
        (lambda: join_model(split_model(make_model(), 1)[1], split_model(make_model(), 2)[0]), "lacks 3 layers"),
    ],
)
def test_what_cannot_be_split_is_refused(change, message):
    with pytest.raises(ConfigurationError, match=message):
        change()


@pytest.mark.parametrize("layers", [1, 3, LAYERS])
def test_a_truncated_model_is_an_ordinary_checkpoint_of_the_lowest_layers(layers, batch, tmp_path):
    model = make_model()
    shorter = truncate(model, layers)
    shorter.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert loaded.config.num_hidden_layers == layers
    assert len(loaded.esm.encoder.layer) == layers
    assert model.config.num_hidden_layers == LAYERS
    trunk, _ = split_model(model, LAYERS - layers)
    expected = model.classifier(model.esm.encoder.emb_layer_norm_after(trunk(**batch)))
    torch.testing.assert_close(output(loaded, **batch), expected, atol=1e-6, rtol=1e-5)


def test_truncating_leaves_the_lean_encoder_on_the_model_that_is_given():
    model = apply_lean_encoder(make_model())
    assert not has_lean_encoder(truncate(model, 2))
    assert has_lean_encoder(model)


def test_a_truncated_contact_head_reads_the_attentions_of_the_layers_that_are_left(batch):
    model = make_model(EsmModel)
    model.set_attn_implementation("eager")
    shorter = truncate(model, 2)
    with torch.no_grad():
        model.contact_head.regression.weight[:, 4:] = 0  # two layers of two heads
        got, expected = (m.predict_contacts(batch["input_ids"], batch["attention_mask"]) for m in (shorter, model))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", [EsmForSequenceClassification, EsmForMaskedLM])
@pytest.mark.parametrize("layers", [0, 2])
def test_the_rest_is_saved_and_loaded_as_an_ordinary_model(kind, layers, batch, tmp_path):
    model = make_model(kind)
    expected = output(model, **batch)
    _, rest = split_model(model, layers)
    assert rest.state_dict().keys() == model.state_dict().keys()
    rest.save_pretrained(tmp_path)
    torch.testing.assert_close(output(kind.from_pretrained(tmp_path).eval(), **batch), expected)


def test_the_rest_refuses_token_ids(batch):
    for layers in (0, 1):
        with pytest.raises(ConfigurationError, match="got token ids, but the model is the rest"):
            split_model(make_model(), layers)[1](**batch)


@pytest.mark.parametrize("layers", [0, 2])
def test_a_loaded_state_dict_fits_the_rest(layers):
    model = make_model()
    other = split_model(make_model(), layers)[1]
    assert not any(other.load_state_dict(model.state_dict()))


def test_a_loaded_state_dict_leaves_the_layers_of_the_trunk_as_they_are():
    trunk, rest = split_model(make_model(), 1)
    before = copy.deepcopy(trunk.esm.encoder.state_dict())
    rest.load_state_dict({name: torch.ones_like(value) for name, value in rest.state_dict().items()})
    for name, value in trunk.esm.encoder.state_dict().items():
        torch.testing.assert_close(value, before[name])
    assert all(bool((parameter == 1).all()) for parameter in rest.parameters())
