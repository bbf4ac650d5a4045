"""export_model(): plain transformers and peft load the folder, and its card contains the metrics."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.utils import extract_model_from_parallel
from conftest import make_dataset, make_model, slow_except
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EsmForMaskedLM,
    TrainingArguments,
)

from esm_efficient import Predictor, WeightedTrainer, demo_model_path, export_model, finetune, load_deeploc, load_result
from esm_efficient.errors import ConfigurationError
from esm_efficient.training.card import run_settings
from esm_efficient.training.outcome import cost_rows

SEQUENCES = ["MKTAYIAKQR", "MALWMRLLPLLALLALWGPDPAAA"]


@pytest.fixture(
    scope="module", params=slow_except(["lora", "base", "several labels", "bf16"], "lora", "several labels")
)
def run(request, tmp_path_factory, demo_table):
    folder = tmp_path_factory.mktemp("run")
    several = request.param == "several labels"
    data = load_deeploc(demo_table, task="location" if several else "membrane", max_residues=180)
    result = finetune(
        demo_model_path(),
        data,
        recipe="base" if request.param == "base" else "lora",
        output_dir=folder,
        class_weights=None,
        precision="bf16" if request.param == "bf16" else "float32",
        max_steps=3,
        learning_rate=1e-2,
        disable_tqdm=True,
    )
    return result, export_model(result, folder / "out", base_model="someone/demo", dataset="the demo's table")


def logits_of(model, tokenizer):
    with torch.no_grad():
        return model.eval()(**tokenizer(SEQUENCES, return_tensors="pt", padding=True)).logits


def adapted(name, seed):
    """A model with an adapter of some name, whose values are not zero."""
    torch.manual_seed(seed)
    model = get_peft_model(make_model(), lora_options(), adapter_name=name)
    randomize(model, name)
    return model


def lora_options():
    return LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])


def randomize(model, name):
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                parameter.normal_()


@pytest.mark.parametrize("names", [["default"], ["mine"], ["default", "second"], ["first", "second"]])
def test_the_active_adapter_is_exported_whatever_its_name(tmp_path, tokenizer, names):
    model = adapted(names[0], 1)
    for name in names[1:]:
        model.add_adapter(name, lora_options())
        model.set_adapter(name)
        randomize(model, name)
    folder = export_model(model, tmp_path / "out", base_model=str(tmp_path / "base"), tokenizer=tokenizer)
    expected = logits_of(model, tokenizer)
    with torch.no_grad():
        merged = np.stack(Predictor.load(folder).logits(SEQUENCES))
    np.testing.assert_allclose(merged, expected, atol=1e-4)
    base = make_model()
    base.load_state_dict({key: value for key, value in model.unload().state_dict().items() if key in base.state_dict()})
    alone = PeftModel.from_pretrained(base, folder / "adapter")
    torch.testing.assert_close(logits_of(alone, tokenizer), expected)
    assert not [path for path in (folder / "adapter").iterdir() if path.is_dir() and path.name != "base_config"]


def test_a_model_is_copied_to_the_cpu_and_not_beside_itself(tmp_path, tokenizer):
    """A GPU may have no memory for a second model: here each parameter refuses to be copied where it is."""

    class Fixed(torch.nn.Parameter):
        def __deepcopy__(self, memo):
            raise AssertionError("a parameter is copied where it is")

    model = make_model()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, Fixed(parameter.data))
    folder = export_model(model, tmp_path / "out", base_model="someone/demo", tokenizer=tokenizer)
    np.testing.assert_allclose(
        np.stack(Predictor.load(folder).logits(SEQUENCES)), logits_of(model, tokenizer), atol=1e-4
    )


def test_several_active_adapters_are_refused(tmp_path, tokenizer):
    config = LoraConfig(r=2, target_modules=["query"])  # with a head, peft activates one alone
    model = get_peft_model(make_model(), config, adapter_name="first")
    model.add_adapter("second", config)
    model.base_model.set_adapter(["first", "second"])
    with pytest.raises(ConfigurationError, match=r"active adapters first, second: expected one"):
        export_model(model, tmp_path / "out", base_model="someone/demo", tokenizer=tokenizer)


def test_plain_transformers_and_peft_load_it_and_compute_the_same(run):
    result, folder = run
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Weights that were bfloat16 during training are exported with their rounding; accelerate's autocast is removed.
    trained = extract_model_from_parallel(copy.deepcopy(result.model), keep_fp32_wrapper=False)
    expected = logits_of(trained.float(), tokenizer)
    merged = AutoModelForSequenceClassification.from_pretrained(folder)
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    assert torch.allclose(logits_of(merged, tokenizer), expected, atol=1e-5)
    assert merged.config.id2label == dict(enumerate(result.task.names))
    assert getattr(merged.config, "label_thresholds", None) == result.thresholds
    if (folder / "adapter").exists():
        torch.manual_seed(5)
        base = AutoModelForSequenceClassification.from_pretrained(demo_model_path(), num_labels=len(result.task.names))
        adapted = logits_of(PeftModel.from_pretrained(base, folder / "adapter"), tokenizer)
        rounded = result.model.get_base_model().dtype == torch.bfloat16  # those of the base model are not, here
        assert torch.allclose(adapted, expected, atol=0.1 if rounded else 1e-5)
    else:
        assert result.recipe == "base"


def test_no_file_is_pickled_or_contains_a_path_of_the_machine(run):
    result, folder = run
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    adapter = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/base_config/config.json"}
    if result.recipe == "base":
        adapter = set()
    wanted = {
        "config.json",
        "model.safetensors",
        "metrics.json",
        "README.md",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert wanted | adapter <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl", ".pth"))]
    weights = [path for place in (folder, result.model_dir) for path in place.rglob("*.safetensors")]
    assert len(weights) == (2 if result.recipe == "base" else 3)
    permissions = {path.stat().st_mode for path in (*weights, folder / "config.json")}
    assert len(permissions) == 1  # whoever can read the config can read the weights
    for name in names:
        if not name.endswith(".safetensors"):
            text = (folder / name).read_text()
            assert str(result.model_dir) not in text, name
            assert str(demo_model_path()) not in text, name


def test_the_card_loads_with_the_hubs_library_and_contains_the_metrics(run):
    result, folder = run
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "someone/demo"
    metrics = {e.metric_type: e.metric_value for e in card.data.eval_results}
    finite = {name: value for name, value in result.metrics.items() if value == value}
    assert metrics == pytest.approx(finite, abs=1e-6)
    assert {e.dataset_name for e in card.data.eval_results} == {"the demo's table"}
    for name in result.task.names:
        assert name in card.content
    assert ("A label is positive from this probability on:" in card.content) == (result.thresholds is not None)
    assert "Predictions are estimates: they do not replace an experiment." in card.content
    record = json.loads((folder / "metrics.json").read_text())
    assert record["metrics"] == result.to_dict()["metrics"]


def test_metrics_of_other_data_are_published_without_those_of_the_run(run, tmp_path):
    result, folder = run
    own = json.loads((folder / "metrics.json").read_text())
    assert {"intervals", "baselines", "gains"} <= own.keys()
    assert not {"probe_words", "warnings", "model_dir", "history"} & own.keys()
    with pytest.raises(ConfigurationError, match="give evaluated_on"):
        export_model(result, tmp_path / "out", base_model="someone/demo", metrics={"mcc": 0.25})
    options = {"metrics": {"mcc": 0.25}, "evaluated_on": "cohort B"}
    other = export_model(result, tmp_path / "out", base_model="someone/demo", **options)
    record = json.loads((other / "metrics.json").read_text())
    assert (record["metrics"], record["evaluated_on"]) == ({"mcc": 0.25}, "cohort B")
    assert not {"intervals", "baselines", "gains", "probe"} & record.keys()


def test_a_result_that_was_loaded_again_is_exported_with_its_model(run, tmp_path):
    loaded = load_result(run[0].result_path.parent)
    assert loaded.model is None
    folder = export_model(loaded, tmp_path / "out", base_model="someone/demo")
    assert Predictor.load(folder).task == loaded.task


def test_a_metric_that_is_undefined_is_left_out(run, tmp_path):
    metrics = {"mcc": 0.5, "auroc": None}
    folder = export_model(run[0], tmp_path / "out", base_model="someone/demo", metrics=metrics, evaluated_on="test")
    assert json.loads((folder / "metrics.json").read_text())["metrics"] == {"mcc": 0.5, "auroc": None}


def test_a_file_in_place_of_the_folder_is_refused(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="is a file"):
        export_model(run[0], tmp_path / "file", base_model="someone/demo")


def test_the_card_and_the_table_of_a_run_have_the_same_times(run):
    result = dataclasses.replace(run[0], seconds=1200.0, states_seconds=7.0)
    card, table = run_settings(result), dict(cost_rows(result))
    assert card["time of the cached states"] == table["time of the cached states"] == "7 s"
    assert card["time of the training loop"] == table["time of the training loop"].split(" (")[0] == "1,200 s"


@pytest.mark.parametrize("name", ["result.json", "run.yaml", "checkpoint-3"])
def test_nothing_is_exported_into_the_folder_of_a_run(tokenizer, tmp_path, name):
    (tmp_path / name).mkdir()
    model = AutoModelForSequenceClassification.from_pretrained(demo_model_path())
    with pytest.raises(ConfigurationError, match=rf"is the folder of a run \({name}\)"):
        export_model(model, tmp_path, base_model="someone/demo", tokenizer=tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.pt"])
def test_nothing_is_exported_beside_a_pickled_file(tokenizer, tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    model = AutoModelForSequenceClassification.from_pretrained(demo_model_path())
    with pytest.raises(ConfigurationError, match=rf"has pickled files \({name}\).*give another folder"):
        export_model(model, tmp_path, base_model="someone/demo", tokenizer=tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_adapter_and_merged_weights_do_not_share_a_folder(run, tmp_path, tokenizer):
    result, folder = run
    if (folder / "adapter").exists():
        with pytest.raises(ConfigurationError, match=r"has an adapter in it, which would be applied .* again"):
            export_model(result, result.model_dir, base_model="someone/demo")
    model = AutoModelForSequenceClassification.from_pretrained(demo_model_path())
    for _ in range(2):
        export_model(result, tmp_path / "out", base_model="someone/demo")
    if (folder / "adapter").exists():
        with pytest.raises(ConfigurationError, match="is an adapter of another model"):
            export_model(model, tmp_path / "out", base_model="someone/demo", tokenizer=tokenizer)
        assert (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()


def test_the_licence_of_a_folder_is_not_that_of_the_model_whose_name_it_has(run, tmp_path):
    for base, licence in (("facebook/esm2_t6_8M_UR50D", "mit"), (str(tmp_path / "esm2_t6_8M"), None)):
        card = ModelCard.load(export_model(run[0], tmp_path / "out", base_model=base) / "README.md")
        assert card.data.license == licence
        assert ("has the MIT licence" in card.content) == (licence == "mit")


# --- models of one's own ---


def own_model(kind, tokenizer, tmp_path):
    """Return what people have after training without finetune, and its model."""
    names = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    model = AutoModelForSequenceClassification.from_pretrained(demo_model_path(), **names)
    if kind != "transformers":
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
        model = get_peft_model(model, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    if kind != "trainer":
        return model, model
    args = TrainingArguments(tmp_path / "run", report_to="none", use_cpu=True, max_steps=2, seed=7, disable_tqdm=True)
    trainer = WeightedTrainer(
        model,
        args,
        train_dataset=make_dataset(8),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        class_weights="balanced",
    )
    trainer.train()
    return trainer, model


@pytest.mark.parametrize("kind", ["transformers", "peft", "trainer"])
def test_a_model_of_ones_own_is_exported(tmp_path, tokenizer, kind):
    trained, model = own_model(kind, tokenizer, tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = {} if kind == "trainer" else {"tokenizer": tokenizer}
    folder = export_model(
        trained,
        tmp_path / "out",
        base_model=str(demo_model_path()),
        metrics={"eval_mcc": 0.5, "eval_runtime": 1.0, "epoch": 2.0},
        **options,
    )
    assert {name: value.tolist() for name, value in model.state_dict().items()} == {
        name: value.tolist() for name, value in before.items()
    }
    expected = logits_of(model, tokenizer).softmax(-1).double().numpy()
    for path in (folder, *([] if kind == "transformers" else [folder / "adapter"])):
        predictor = Predictor.load(path, device="cpu")
        assert predictor.task.names == ("no", "yes")
        np.testing.assert_allclose([p.values for p in predictor.predict(SEQUENCES)], expected, atol=1e-5)
    card = ModelCard.load(folder / "README.md")
    assert "| mcc | 0.5000 |" in card.content
    assert ("| optimizer steps | 2 |" in card.content) == (kind == "trainer")
    assert {e.dataset_split for e in card.data.eval_results} == {"validation"}  # of what Trainer.evaluate returns
    record = json.loads((folder / "metrics.json").read_text())
    assert (record["metrics"], record["evaluated_on"]) == ({"mcc": 0.5}, "validation")
    assert record["base_model"] == Path(demo_model_path()).name
    assert record["task"] == {"kind": "single_label_classification", "names": ["no", "yes"]}


@pytest.mark.parametrize(
    ("problem", "labels"), [("single_label_classification", 3), ("multi_label_classification", 3), ("regression", 2)]
)
def test_the_line_of_the_card_gives_what_the_library_gives(tmp_path, tokenizer, problem, labels):
    model = make_model(num_labels=labels, problem_type=problem, initializer_range=0.5)
    folder = export_model(model, tmp_path / "out", base_model="someone/demo", tokenizer=tokenizer)
    [code] = re.findall(
        r"With transformers alone:\n\n```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL
    )
    *before, line = code.replace("FOLDER", str(folder)).strip().splitlines()
    names: dict = {}
    exec("\n".join(before), names)
    for sequence in ("MKTAYIAKQR", "MKTAYIAKQR" * 200):
        found = eval(line.replace("MKTAYIAKQR", sequence), names)
        [expected] = Predictor.load(folder, device="cpu").predict([sequence], keep="start")
        scores = {entry["label"]: entry["score"] for entry in found}
        values = dict(zip(model.config.id2label.values(), expected.values, strict=True))
        shown = values if problem != "single_label_classification" else {expected.labels[0]: max(expected.values)}
        assert scores == pytest.approx(shown, abs=1e-5)


def test_what_cannot_be_exported_is_refused(tmp_path, tokenizer):
    model = AutoModelForSequenceClassification.from_pretrained(demo_model_path())
    prompt = get_peft_model(copy.deepcopy(model), PrefixTuningConfig(num_virtual_tokens=2, task_type="SEQ_CLS"))
    added = copy.deepcopy(model)
    added.peft_config = {"default": LoraConfig()}  # add_adapter() sets it, but does not take every version of peft
    cases = [
        (model, None, "has no tokenizer beside it: give tokenizer too"),
        (torch.nn.Linear(2, 2), tokenizer, "got a Linear: expected the result of finetune"),
        (EsmForMaskedLM.from_pretrained(demo_model_path()), tokenizer, "has no classification head"),
        (prompt, tokenizer, "PrefixTuningConfig cannot be merged"),
        (added, tokenizer, r"adapters of add_adapter\(\), which cannot be merged"),
    ]
    for trained, given, message in cases:
        with pytest.raises(ConfigurationError, match=message):
            export_model(trained, tmp_path / "out", base_model="someone/demo", tokenizer=given)
    assert not (tmp_path / "out").exists()


BAD_NAMES = ["<script>alert(1)</script>", "two\nlines\n# heading", "=cmd|' /C calc'!A0", "../../x", "![x](http://a/b)"]


def test_names_cannot_change_the_card(tmp_path, tokenizer):
    model = make_model(
        num_labels=5,
        id2label=dict(enumerate(BAD_NAMES)),
        label2id={name: index for index, name in enumerate(BAD_NAMES)},
        problem_type="multi_label_classification",
        label_thresholds=dict.fromkeys(BAD_NAMES, 0.25),
    )
    metrics = {f"f1_{name}": 0.5 for name in BAD_NAMES}
    folder = export_model(
        model,
        tmp_path / "out",
        base_model="a/<b>",
        tokenizer=tokenizer,
        metrics=metrics,
        evaluated_on="test",
        dataset="x\n---\ny: <i>",
    )
    text = (folder / "README.md").read_text()
    body = text.split("\n---\n", 1)[1]
    for bad in ("<script", "<b>", "<i>", "![x]", "\n# heading", "\n---"):
        assert bad not in body
    assert [line for line in body.splitlines() if line.startswith("#")] == [
        next(line for line in body.splitlines() if line.startswith("# ")),
        *("## Metrics", "## Training", "## Usage", "## Licence"),
    ]
    data = ModelCard.load(folder / "README.md").data
    assert len(data.eval_results) == len(BAD_NAMES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert Predictor.load(folder, device="cpu").task.names == tuple(BAD_NAMES)
