"""The model that a run begins with is loaded in the dtypes that it is held in, with the numbers of float32."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from conftest import each_value, make_model
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoTokenizer, EsmForSequenceClassification, EsmModel

from esm_efficient import RECIPES, EsmClassifier, finetune, load_deeploc, prepare_model, recipe_adapters, sweep_layers
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
            r'facebook/esm2_t6_8M_UR50D --local-dir esm2_8M`, then give model="esm2_8M"$',
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
