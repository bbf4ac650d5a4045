"""A regressor learns the same whatever the unit of its labels, and what is saved predicts in that unit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import make_model, slow_except
from datasets import Dataset, DatasetDict, Features, List, Value
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainerCallback,
)

from esm_efficient import RECIPES, Predictor, demo_model_path, finetune, load_deeploc, split_model
from esm_efficient.errors import ConfigurationError, DataError
from esm_efficient.heads import model_class
from esm_efficient.tasks import pooling_of
from esm_efficient.training.standardizing import (
    LabelScale,
    StandardizingCollator,
    find_output_layer,
    measure_scale,
    standardize_layer,
    standardized_training,
)

OPTIONS = {"recipe": "lora", "max_steps": 6, "disable_tqdm": True}


@pytest.fixture(scope="module")
def sequences(demo_table):
    splits = load_deeploc(demo_table, max_residues=160)
    return {name: rows["sequence"][:40] for name, rows in splits.items()}


def share(sequence):
    return sum(residue in "AILVFMWG" for residue in sequence) / len(sequence)


def numbers(sequences, unit=lambda value: value):
    features = Features({"sequence": Value("string"), "label": Value("float32")})
    columns = {name: {"sequence": rows, "label": [unit(share(s)) for s in rows]} for name, rows in sequences.items()}
    return DatasetDict({name: Dataset.from_dict(rows, features=features) for name, rows in columns.items()})


def plain_logits(folder, sequences, base=None):
    """Return the logits of a saved model or adapter, loaded with ``from_pretrained`` of its class and of peft."""
    if (folder / "adapter_config.json").exists():
        config = AutoConfig.from_pretrained(folder / "base_config")
        base = AutoModelForSequenceClassification.from_pretrained(base or demo_model_path(), config=config)
        model = PeftModel.from_pretrained(base, folder)
    else:
        pooling = pooling_of(AutoConfig.from_pretrained(folder))
        model = model_class("sequence-classification", pooling).from_pretrained(folder)
    batch = AutoTokenizer.from_pretrained(folder)(sequences, return_tensors="pt", padding=True)
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layers", [None, 1])
def test_the_output_layer_is_found_where_frozen_weights_are_in_half_precision(tokenizer, half, layers):
    model = make_model(num_labels=1, problem_type="regression")
    model.esm.to(half)
    if layers is not None:
        _, model = split_model(model, layers)
    assert find_output_layer(model, tokenizer) is model.classifier.out_proj


def test_a_regression_trains_in_half_precision(tmp_path, sequences):
    result = finetune(
        demo_model_path(), numbers(sequences), output_dir=tmp_path, precision="bf16", **OPTIONS | {"max_steps": 2}
    )
    assert result.model.esm.embeddings.word_embeddings.weight.dtype == torch.bfloat16
    assert result.metrics["rmse"] > 0


def test_the_unit_of_the_labels_changes_no_result_but_the_errors(tmp_path, sequences):
    units = {1.0: lambda v: v, 10.0: lambda v: 50 + 10 * v}
    results = {
        factor: finetune(demo_model_path(), numbers(sequences, unit), output_dir=tmp_path / str(factor), **OPTIONS)
        for factor, unit in units.items()
    }
    for factor, result in results.items():
        assert result.metrics["spearman"] == pytest.approx(results[1.0].metrics["spearman"], abs=1e-6)
        assert result.metrics["rmse"] == pytest.approx(factor * results[1.0].metrics["rmse"], rel=1e-3)
        assert result.metrics["loss"] == pytest.approx(result.metrics["rmse"] ** 2, rel=1e-4)
        assert result.train_loss == pytest.approx(results[1.0].train_loss, rel=1e-4)
    saved = results[10.0]
    test = sequences["test"][:8]
    logits = plain_logits(saved.model_dir, test)
    assert logits.mean() == pytest.approx(55, abs=2)
    predicted = [prediction.values[0] for prediction in Predictor.load(saved.model_dir).predict(test)]
    assert predicted == pytest.approx(logits[:, 0].tolist(), abs=1e-3)
    scale = AutoConfig.from_pretrained(saved.model_dir / "base_config").label_scale
    labels = [50 + 10 * share(sequence) for sequence in sequences["train"]]
    assert scale == {"mean": [pytest.approx(np.mean(labels))], "std": [pytest.approx(np.std(labels), rel=1e-5)]}


@pytest.mark.parametrize("recipe", slow_except(["lora", "frozen", "base"], "lora"))
def test_checkpoints_predict_in_the_unit_and_a_resumed_run_has_the_same_weights(tmp_path, sequences, recipe):
    data = numbers(sequences, lambda value: 50 + 10 * value)
    options = OPTIONS | {"recipe": RECIPES[recipe], "save_strategy": "steps", "save_steps": 3}
    evaluated = {"eval_strategy": "steps", "eval_steps": 3, "callbacks": [history := History()]}
    whole = finetune(demo_model_path(), data, output_dir=tmp_path, **options, **evaluated)
    same = plain_logits(tmp_path / "checkpoint-6", sequences["test"][:8])
    assert torch.allclose(same, plain_logits(whole.model_dir, sequences["test"][:8]), atol=1e-4)
    early = plain_logits(tmp_path / "checkpoint-3", sequences["validation"])[:, 0].numpy()
    # The first evaluation was of the weights of the first checkpoint, and in the unit of the labels.
    error = np.sqrt(np.mean((early - np.array(data["validation"]["label"])) ** 2))
    assert history.values[0]["eval_rmse"] == pytest.approx(error, rel=1e-4)
    resumed = finetune(
        demo_model_path(), data, output_dir=tmp_path / "2", resume_from_checkpoint=tmp_path / "checkpoint-3", **options
    )
    expected = dict(whole.model.named_parameters())
    assert (resumed.steps_resumed, resumed.steps) == (3, whole.steps)
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.named_parameters())
    assert resumed.metrics == whole.metrics


class History(TrainerCallback):
    """Keeps the metrics of every evaluation."""

    def __init__(self):
        self.values = []

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.values.append(metrics)


def test_several_numbers_each_have_a_scale(tmp_path, sequences):
    features = Features({"sequence": Value("string"), "label": List(Value("float32"), length=2)})
    label = {name: [[1e4 * share(s), 1e-3 * len(s)] for s in rows] for name, rows in sequences.items()}
    label["train"][0][1] = None
    data = DatasetDict(
        {
            name: Dataset.from_dict({"sequence": rows, "label": label[name]}, features=features)
            for name, rows in sequences.items()
        }
    )
    result = finetune(demo_model_path(), data, output_dir=tmp_path, **OPTIONS)
    logits = plain_logits(result.model_dir, sequences["test"]).numpy()
    errors = np.sqrt(((logits - np.array(label["test"])) ** 2).mean(0))
    assert result.metrics["rmse"] == pytest.approx(errors.mean(), rel=1e-4)
    assert (np.abs(logits.mean(0) / np.array(label["test"]).mean(0) - 1) < 0.2).all()


def test_a_saved_regressor_continues_in_its_unit(tmp_path, sequences):
    data = numbers(sequences, lambda value: 50 + 10 * value)
    first = finetune(demo_model_path(), data, output_dir=tmp_path / "1", **OPTIONS | {"recipe": "base"})
    still = OPTIONS | {"recipe": RECIPES["frozen"].replace(pooling="first"), "learning_rate": 0.0}
    for number, model in enumerate(
        (first.model_dir, AutoModelForSequenceClassification.from_pretrained(first.model_dir))
    ):
        tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
        again = finetune(model, data, output_dir=tmp_path / f"2{number}", tokenizer=tokenizer, **still)
        assert again.metrics["rmse"] == pytest.approx(first.metrics["rmse"], rel=1e-4)
        assert again.model.config.label_scale == first.model.config.label_scale


# The head of the checkpoint: problem_type, number of labels; and what is then trained on it.
@pytest.mark.parametrize(
    ("problem_type", "labels", "task"),
    slow_except(
        [
            (*head, task)
            for head in (
                ("single_label_classification", 2),
                ("single_label_classification", 3),
                ("multi_label_classification", 2),
                (None, 2),
            )
            for task in ("a number", "classes")
        ],
        ("single_label_classification", 2, "a number"),
        ("single_label_classification", 3, "classes"),
        ("multi_label_classification", 2, "a number"),
        ("multi_label_classification", 2, "classes"),
        (None, 2, "a number"),
    ),
)
def test_a_saved_classifier_is_the_base_of_any_task(tmp_path, sequences, demo_table, problem_type, labels, task):
    model = AutoModelForSequenceClassification.from_pretrained(
        demo_model_path(), num_labels=labels, problem_type=problem_type
    )
    model.config.label_thresholds = {"LABEL_0": 0.9}
    model.save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(demo_model_path()).save_pretrained(tmp_path / "saved")
    data = numbers(sequences) if task == "a number" else load_deeploc(demo_table, max_residues=160)
    result = finetune(tmp_path / "saved", data, output_dir=tmp_path, **OPTIONS | {"recipe": "frozen", "max_steps": 1})
    config = AutoConfig.from_pretrained(result.model_dir)
    assert config.problem_type == ("regression" if task == "a number" else "single_label_classification")
    assert config.num_labels == len(result.task.names)
    assert not hasattr(config, "label_thresholds")
    assert hasattr(config, "label_scale") == (task == "a number")


@pytest.mark.slow
def test_a_real_backbone_learns_a_number_in_its_unit(tmp_path, checkpoint, sequences):
    """The config of the real backbone says that it is a classifier."""
    data = numbers(sequences, lambda value: 50 + 10 * value)
    result = finetune(checkpoint, data, output_dir=tmp_path, **OPTIONS | {"recipe": "frozen", "max_steps": 1})
    assert plain_logits(result.model_dir, sequences["test"][:4]).mean() == pytest.approx(55, abs=2)


def test_an_encoder_that_is_not_whole_is_refused(tmp_path, sequences):
    model = AutoModelForSequenceClassification.from_pretrained(demo_model_path())
    model.config.num_hidden_layers += 1
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(demo_model_path()).save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match=r"lacks 1[0-9] weights of the encoder.*esm.encoder.layer.4"):
        finetune(tmp_path, numbers(sequences), output_dir=tmp_path / "out", **OPTIONS)
    model.config.num_hidden_layers -= 1
    model.config.intermediate_size += 1
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match=r"other shapes.*esm.encoder.layer.0.intermediate"):
        finetune(tmp_path, numbers(sequences), output_dir=tmp_path / "out", **OPTIONS)


ROWS = [float(value) for value in np.random.default_rng(0).normal(5, 2, size=30)]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([*ROWS, 1e30], r"y: the label 1e\+30 in row 30 is so far from the others"),
        ([*ROWS, -1e30], r"y: the label -1e\+30 in row 30 is so far from the others"),
        ([*ROWS, float("inf")], "y: 1 labels are infinite, the first in row 30"),
        ([float("nan")] * 3, "y: no label of the training set is known"),
    ],
)
def test_labels_that_cannot_be_learnt_are_named(labels, message):
    with pytest.raises(DataError, match=message):
        measure_scale(Dataset.from_dict({"labels": labels}), ["y"])


@pytest.mark.parametrize(
    ("labels", "mean", "std"),
    [
        ([1.0, 3.0], 2.0, 1.0),
        ([1.0, 3.0, float("nan")], 2.0, 1.0),
        ([5.0, 5.0], 5.0, 1.0),
        ([7.0], 7.0, 1.0),
        ([0.0] * 30 + [1.0] * 2, 1 / 16, np.sqrt(15) / 16),
        ([1e6 + 1, 1e6 + 3], 1e6 + 2, 1.0),
    ],
)
def test_the_scale_is_mean_and_standard_deviation_of_the_known_labels(labels, mean, std):
    data = Dataset.from_dict({"labels": labels})
    for rows in (data, data.to_iterable_dataset()):
        scale = measure_scale(rows, ["y"])
        assert (scale.mean[0], scale.std[0]) == pytest.approx((mean, std))


def test_a_label_far_from_the_others_is_a_warning(caplog):
    measure_scale(Dataset.from_dict({"labels": ROWS}), ["y"])
    assert not caplog.records
    measure_scale(Dataset.from_dict({"labels": [*ROWS, 1e5]}), ["y"])
    assert "the label 100000 in row 30 is far from the others" in caplog.text


def test_labels_that_float32_rounds_are_a_warning(caplog):
    labels = np.random.default_rng(0).normal(0, 4, 30)
    measure_scale(Dataset.from_dict({"labels": 1e5 + labels}), ["y"])
    assert not caplog.records
    measure_scale(Dataset.from_dict({"labels": 1e8 + labels}), ["y"])
    assert "around 1e+08 has steps of 8" in caplog.text


def test_a_layer_is_written_in_the_unit_and_read_back_bit_for_bit():
    torch.manual_seed(0)
    scale = LabelScale(np.array([50.0, -3.0]), np.array([0.37, 1234.5]))
    model = torch.nn.Sequential(torch.nn.Linear(64, 2))
    layer, x = model[0], torch.randn(5, 64)
    model.config = type("Config", (), {})()
    before = layer.weight.clone(), layer.bias.clone()
    standardized = layer(x).detach()
    with standardized_training(model, layer, scale):
        state = model.state_dict()
        with torch.no_grad():
            layer.weight.zero_()
            layer.bias.zero_()
        model.load_state_dict(state)
        assert torch.equal(layer.weight, before[0])
        assert torch.equal(layer.bias, before[1])
    restored = layer(x).detach()
    assert np.allclose(restored.numpy(), scale.restore(standardized.numpy()), rtol=1e-5)
    assert state["0.weight"].float().equal(model.state_dict()["0.weight"])
    standardize_layer(layer, scale)
    assert torch.allclose(layer(x), standardized, atol=1e-5)


def test_the_output_layer_is_found_or_nothing(tiny_model, tokenizer):
    model = tiny_model(num_labels=1)
    assert find_output_layer(model, tokenizer) is model.classifier.out_proj
    model.classifier.out_proj = torch.nn.Sequential(model.classifier.out_proj, torch.nn.Sigmoid())
    assert find_output_layer(model, tokenizer) is None


def test_batches_have_standardised_labels(tokenizer):
    rows = [{"input_ids": [0, 5, 2], "labels": value} for value in (1.0, 3.0, float("nan"))]
    collate = StandardizingCollator(DataCollatorWithPadding(tokenizer), LabelScale(np.array([1.0]), np.array([4.0])))
    labels = collate(rows)["labels"]
    assert labels.dtype == torch.float32
    assert labels[:2].tolist() == [0.0, 0.5]
    assert labels[2].isnan()


def test_an_adapted_output_layer_is_refused(tmp_path, sequences):
    targets = {"target_modules": ["query", "classifier.out_proj"], "modules_to_save": None, "task_type": None}
    with pytest.raises(ConfigurationError):
        finetune(demo_model_path(), numbers(sequences), output_dir=tmp_path, adapter_options=targets, **OPTIONS)
