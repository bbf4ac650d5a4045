"""The model that a run begins with is loaded in the dtypes that it is held in, with the numbers of float32."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from conftest import each_value, make_model
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoTokenizer, EsmForSequenceClassification, EsmForTokenClassification, EsmModel

from esm_efficient import (
    RECIPES,
    EsmClassifier,
    demo_model_path,
    finetune,
    load_deeploc,
    prepare_model,
    recipe_adapters,
    sweep_layers,
)
from esm_efficient.errors import ConfigurationError
from esm_efficient.recipes import Recipe
from esm_efficient.tasks import Task
from esm_efficient.training.start import name_of_model, starting_model

TASK = Task("single_label_classification", ("no", "yes"))
TOP = Recipe("top", "full", 1e-4, layers="top-1")
LOWEST = Recipe("lowest", "full", 1e-4, layers=(0,))
KEPT = Recipe("kept", "full", 1e-4, layers="top-1", keep_layers=4)
MEAN = RECIPES["lora"].replace(pooling="mean")


@pytest.fixture(scope="module", params=["new head", "trained head"])
def checkpoint(request, tmp_path_factory):
    """A checkpoint of several shards in float32, with weights that bfloat16 does not have."""
    folder = tmp_path_factory.mktemp("sharded")
    kind = EsmForSequenceClassification if request.param == "trained head" else EsmModel
    model = make_model(kind, num_hidden_layers=6, hidden_size=64, intermediate_size=128)
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def load(folder, recipe, half, held, **options):
    """Load a model with what does not train in a dtype, and prepare it as a run does that holds it in another."""
    torch.manual_seed(3)
    model, _, _ = starting_model(folder, "unused", TASK, recipe, half=half, adapter_options=options)
    dtypes, kind = {parameter.dtype for parameter in model.parameters()}, type(model)
    model = prepare_model(
        model,
        adapters=recipe_adapters(recipe, model, **options),
        head_only=recipe.trains == "head",
        layers=recipe.layers,
        dtype=held,
    )
    return model, dtypes, kind


@pytest.mark.parametrize(
    ("case", "half"),
    each_value(
        [
            (RECIPES["lora"], {"r": 4}, True),
            (RECIPES["lora"], {"use_dora": True}, False),
            (RECIPES["lora"], {"modules_to_save": ["classifier", "word_embeddings"]}, False),
            (RECIPES["frozen"], {}, True),
            (RECIPES["base"], {}, True),  # the contact head alone
            (TOP, {}, True),
            (LOWEST, {}, True),
            (MEAN, {}, True),
            (KEPT, {}, False),  # which layers train is known only after the others are dropped
            (RECIPES["lora"].replace(keep_layers=4), {}, True),
        ],
        [torch.bfloat16, torch.float16],
    ),
)
def test_a_model_loaded_in_half_precision_has_the_numbers_of_one_loaded_in_float32(checkpoint, case, half):
    recipe, options, is_half = case
    expected, _, expected_kind = load(checkpoint, recipe, None, half, **options)
    found, dtypes, kind = load(checkpoint, recipe, half, half, **options)
    assert kind is expected_kind
    assert (half in dtypes) == is_half
    assert found.config.to_dict() == expected.config.to_dict()
    tensors = found.state_dict()
    assert tensors.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert tensors[name].dtype == tensor.dtype, name
        assert torch.equal(tensors[name], tensor), name


def own_memory():
    """Return the bytes of this process that are not pages of a file, such as a checkpoint that is mapped."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_loading_needs_no_more_memory_than_the_model_as_it_is_held(tmp_path):
    sizes = {"num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
    model = make_model(EsmForSequenceClassification, **sizes)
    in_float32 = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(tmp_path, max_shard_size="20MB")
    del model
    before, seen, ended = own_memory(), [0], threading.Event()

    def watch():
        while not ended.wait(0.0005):
            seen.append(own_memory() - before)

    watching = threading.Thread(target=watch)
    watching.start()
    loaded, _, _ = starting_model(tmp_path, "unused", TASK, RECIPES["lora"], half=torch.bfloat16)
    ended.set()
    watching.join()
    held = sum(parameter.untyped_storage().nbytes() for parameter in loaded.parameters())
    assert held < 0.52 * in_float32
    assert max(seen) < held + 0.1 * in_float32


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "8M",
            r"^facebook/esm2_t6_8M_UR50D is not in the cache \(REASON.*\)\. While online, run `hf download "
            r"facebook/esm2_t6_8M_UR50D --local-dir esm2_8M`, then give the folder esm2_8M as the model$",
        ),
        ("someone/absent", r"someone/absent is not in the cache \(REASON"),
        ("35X", r"there is no folder 35X, and it is neither the size of an ESM-2 model \(8M, 35M, 150M"),
    ],
)
def test_a_model_that_is_not_there_is_named_with_what_to_do(tmp_path, monkeypatch, name, message, offline):
    def fail(name, **options):
        raise OSError("We couldn't connect to 'https://huggingface.co'")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    for tool in (AutoConfig, AutoTokenizer):
        monkeypatch.setattr(tool, "from_pretrained", fail)
    message = message.replace("REASON", "HF_HUB_OFFLINE is set" if offline else "the Hub is not reachable")
    with pytest.raises(ConfigurationError, match=message):
        starting_model(name, None, TASK, RECIPES["lora"])
    with pytest.raises(ConfigurationError, match=message):
        EsmClassifier(name).fit(["MKT", "MAL"] * 4, [0, 1] * 4)


def trained(folder, names, *, kind=EsmForSequenceClassification, problem="single_label_classification"):
    """A checkpoint with a head for some labels, and the numbers of its output layer by label."""
    ids = dict(enumerate(names))
    model = make_model(
        kind, num_labels=len(names), id2label=ids, label2id={name: i for i, name in ids.items()}, problem_type=problem
    )
    layer = output_layer_of(model)
    torch.nn.init.normal_(layer.bias)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo_model_path()).save_pretrained(folder)
    return rows_of(layer, names)


def output_layer_of(model):
    return model.classifier if isinstance(model.classifier, torch.nn.Linear) else model.classifier.out_proj


def rows_of(layer, names):
    numbers = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
    return {name: row.tolist() for name, row in zip(names, numbers, strict=True)}


ORDERS = {
    "classes": ("single_label_classification", EsmForSequenceClassification),
    "several labels": ("multi_label_classification", EsmForSequenceClassification),
    "numbers": ("regression", EsmForSequenceClassification),
    "residues": ("token_classification", EsmForTokenClassification),
}


@pytest.mark.parametrize("given", ["a folder", "a model"])
@pytest.mark.parametrize(("kind", "model_class"), ORDERS.values(), ids=ORDERS)
def test_the_output_layer_follows_labels_in_another_order(tmp_path, kind, model_class, given, caplog):
    task = Task(kind, ("c", "a", "b"))
    before = trained(tmp_path, ("a", "b", "c"), kind=model_class, problem=task.problem_type)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = tmp_path if given == "a folder" else model_class.from_pretrained(tmp_path)
    loaded, _, _ = starting_model(model, tokenizer, task, RECIPES["lora"])
    assert rows_of(output_layer_of(loaded), task.names) == before
    assert "a new" not in caplog.text


OTHERS = {
    "other names": ("single_label_classification", ("yes", "no"), True),
    "another number of labels": ("single_label_classification", ("a", "b", "c"), True),
    "another kind of task": ("multi_label_classification", ("x", "y"), True),
    "numbers": ("regression", ("x", "y"), True),
    "the same": ("single_label_classification", ("a", "b"), False),
}
"""Tasks for a model that predicts the classes a and b."""


@pytest.mark.parametrize(("kind", "names", "is_new"), OTHERS.values(), ids=OTHERS)
def test_an_output_layer_for_other_labels_is_a_new_one_and_is_announced(tmp_path, kind, names, is_new, caplog):
    before = trained(tmp_path, ("a", "b"))
    loaded, _, _ = starting_model(tmp_path, None, Task(kind, names), RECIPES["lora"])
    layer = output_layer_of(loaded)
    after = rows_of(layer, names)
    announced = f"predicts a, b, and the labels are {', '.join(names)}: a new output layer is trained"
    assert (announced in caplog.text) == is_new
    assert (list(after.values()) != list(before.values())) == is_new
    if is_new:
        assert not layer.bias.any()
        assert 0 < layer.weight.std() < 0.1


def test_the_output_layer_of_a_regressor_predicts_no_classes(tmp_path, caplog):
    before = trained(tmp_path, ("y", "z"), problem="regression")
    loaded, _, _ = starting_model(tmp_path, None, TASK, RECIPES["lora"])
    assert list(rows_of(output_layer_of(loaded), TASK.names).values()) != list(before.values())
    assert "predicts y, z, and the labels are no, yes: a new output layer is trained" in caplog.text


def test_a_number_has_the_name_of_its_column_and_labels_without_names_are_taken_in_their_order(tmp_path, caplog):
    before = trained(tmp_path / "number", ("y",), problem="regression")
    loaded, _, _ = starting_model(tmp_path / "number", None, Task("regression", ("z",)), RECIPES["lora"])
    assert list(rows_of(output_layer_of(loaded), "z").values()) == list(before.values())
    before = trained(tmp_path / "unnamed", ("LABEL_0", "LABEL_1"))
    loaded, _, _ = starting_model(tmp_path / "unnamed", None, TASK, RECIPES["lora"])
    assert list(rows_of(output_layer_of(loaded), TASK.names).values()) == list(before.values())
    assert "output layer" not in caplog.text


def test_a_loaded_model_with_other_labels_is_kept_with_a_warning(tmp_path, caplog):
    before = trained(tmp_path, ("a", "b"))
    model = EsmForSequenceClassification.from_pretrained(tmp_path)
    starting_model(model, AutoTokenizer.from_pretrained(tmp_path), TASK, RECIPES["lora"])
    assert rows_of(output_layer_of(model), ("a", "b")) == before
    assert "predicts a, b, and the labels are no, yes: they are taken in this order" in caplog.text


def test_a_head_for_residues_in_the_place_of_one_for_sequences_is_announced(tmp_path, caplog):
    trained(tmp_path, ("H", "E"))
    starting_model(tmp_path, None, Task("token_classification", ("H", "E")), RECIPES["frozen"])
    assert "is for sequences, and the labels are for residues: a new head is trained" in caplog.text
    assert "pooling" not in caplog.text


def test_a_damaged_folder_is_one_sentence(tmp_path):
    trained(tmp_path, ("no", "yes"))
    for file in ("tokenizer_config.json", "tokenizer.json", "vocab.txt"):
        (tmp_path / file).unlink(missing_ok=True)
    with pytest.raises(ConfigurationError, match=r"has no tokenizer: expected tokenizer_config\.json, tokenizer"):
        starting_model(tmp_path, None, TASK, RECIPES["lora"])
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigurationError, match=r"the safetensors of the model .* cannot be loaded: .*incomplete"):
        starting_model(tmp_path, None, TASK, RECIPES["lora"])


def test_a_folder_is_named_by_its_whole_path(tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "models" / "mine" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert name_of_model("models/mine") == str(tmp_path / "models" / "mine")
    assert name_of_model("8M") == "facebook/esm2_t6_8M_UR50D"
    assert name_of_model("someone/model") == "someone/model"
    assert name_of_model(object()) == ""


@pytest.mark.parametrize("name", ["demo", "8M"])
def test_a_run_in_a_folder_with_the_name_of_a_model_hides_no_model(tmp_path, monkeypatch, name):
    get_peft_model(make_model(), LoraConfig(target_modules=["query"])).save_pretrained(tmp_path / name / "adapter")
    monkeypatch.chdir(tmp_path)
    assert not name_of_model(name).startswith(str(tmp_path))


@pytest.mark.parametrize("inside", ["adapter", ""], ids=["adapter", "run"])
@pytest.mark.parametrize("begin", [finetune, sweep_layers])
def test_the_folder_of_an_adapter_is_refused_with_the_way_to_merge_it(tmp_path, demo_table, begin, inside):
    get_peft_model(make_model(), LoraConfig(target_modules=["query"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigurationError, match=r"merge it first with `esm-efficient export .*adapter MERGED`"):
        begin(tmp_path / inside, load_deeploc(demo_table))
