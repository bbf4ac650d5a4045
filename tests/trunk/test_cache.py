import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer, DataCollatorWithPadding, TrainingArguments

from esm_efficient import (
    ConfigurationError,
    DataError,
    WeightedTrainer,
    apply_lean_encoder,
    demo_model_path,
    lora_config,
    prepare_model,
)
from esm_efficient.data.tokenizing import tokenize_dataset
from esm_efficient.tasks import auto_class
from esm_efficient.trunk import cache
from esm_efficient.trunk.cache import STATES_COLUMN, StateFormat, StatesCollator, cache_states
from esm_efficient.trunk.split import join_model, split_model


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo_model_path())


def load(head="sequence-classification", **options):
    torch.manual_seed(0)
    return auto_class(head).from_pretrained(demo_model_path(), dtype=torch.float32, **options)


def sequences(count, seed=0):
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), rng.integers(5, 40))) for _ in range(count)]


@pytest.fixture(scope="module")
def data(tokenizer):
    rows = Dataset.from_dict({"sequence": sequences(30), "label": [i % 3 for i in range(30)]})
    rows = rows.class_encode_column("label")
    return tokenize_dataset(DatasetDict(train=rows), tokenizer)[0]["train"]


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(cache, "_SHARD_BYTES", 40_000)


def states_of(row, stored, width):
    raw = torch.frombuffer(bytearray(row[STATES_COLUMN]), dtype=torch.uint8).view(stored.torch_dtype)
    return raw.view(-1, width).float()


@pytest.mark.parametrize("pooling", ["tokens", "first"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("bfloat16", 8e-3), ("float16", 1e-3)])
def test_each_row_has_the_states_of_its_own_sequence(data, tmp_path, small_shards, dtype, tolerance, pooling):
    trunk, _ = split_model(load(), 1)
    cached = cache_states(data, trunk, tmp_path, dtype=dtype, pooling=pooling)
    assert len(list(tmp_path.rglob("*.arrow"))) > 1 or pooling == "first"
    assert cached["input_ids"][:] == data["input_ids"][:]
    for row in cached:
        expected = trunk(torch.tensor([row["input_ids"]]))[0]
        expected = expected[:1] if pooling == "first" else expected
        got = states_of(row, StateFormat(dtype), trunk.width)
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


def test_states_are_used_again_and_other_columns_may_change(data, tmp_path, small_shards, monkeypatch):
    trunk, _ = split_model(load(), 1)
    first = cache_states(data, trunk, tmp_path)
    monkeypatch.setattr(cache, "_compute", None)  # a second computation would fail
    again = cache_states(data.remove_columns("labels"), trunk, tmp_path)
    assert again[STATES_COLUMN][:] == first[STATES_COLUMN][:]
    assert "labels" not in again.column_names


def _other_weight():
    model = load()
    with torch.no_grad():
        model.esm.encoder.layer[0].output.dense.weight[0, 0] += 1e-3
    return model


def _other_config():
    model = load()
    model.esm.config.layer_norm_eps = 1e-3
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)):
        norm.eps = 1e-3
    return model


@pytest.mark.parametrize(
    "changed",
    [
        {"model": _other_weight},
        {"model": _other_config},
        {"model": lambda: load().to(torch.bfloat16)},
        {"layers": 2},
        {"rows": [1, 0, *range(2, 30)]},
        {"rows": range(29)},
        {"dtype": "float16"},
        {"pooling": "first"},
    ],
    ids=["weight", "config", "dtype of the weights", "layer", "order", "rows", "dtype on disk", "pooling"],
)
def test_a_change_of_anything_that_the_states_depend_on_makes_new_states(data, tmp_path, changed):
    def run(model=load, layers=1, rows=range(30), **options):
        trunk, _ = split_model(model(), layers)
        return cache_states(data.select(rows), trunk, tmp_path, **options)

    run()
    before = set(tmp_path.iterdir())
    run(**changed)
    assert len(set(tmp_path.iterdir()) - before) == 1


def test_what_does_not_change_the_states_makes_no_new_states(data, tmp_path):
    cache_states(data, split_model(load(), 1)[0], tmp_path)
    before = set(tmp_path.iterdir())
    other_head = load(num_labels=5, id2label=dict(enumerate("abcde")))
    cache_states(data, split_model(other_head, 1)[0], tmp_path)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("damage", ["byte", "short", "checksum"])
def test_a_damaged_file_is_reported_and_made_again(data, tmp_path, small_shards, damage, caplog):
    trunk, _ = split_model(load(), 1)
    expected = cache_states(data, trunk, tmp_path)[STATES_COLUMN][:]
    path = sorted(tmp_path.rglob("*.arrow"))[1]
    whole = path.read_bytes()
    if damage == "checksum":
        path.with_suffix(".sha256").unlink()
    else:
        middle = len(whole) // 2
        path.write_bytes(
            whole[:middle] + (bytes([whole[middle] ^ 1]) + whole[middle + 1 :] if damage == "byte" else b"")
        )
    with caplog.at_level("WARNING"):
        again = cache_states(data, trunk, tmp_path)[STATES_COLUMN][:]
    assert again == expected
    assert ("is damaged" in caplog.text) == (damage != "checksum")


SCRIPT = """
    import sys, time, torch
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from esm_efficient import demo_model_path
    from esm_efficient.trunk import cache
    from esm_efficient.trunk.split import split_model

    cache._SHARD_BYTES = 40_000
    compute = cache._compute
    def slowly(*arguments):
        time.sleep(float(sys.argv[3]))
        return compute(*arguments)
    cache._compute = slowly
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(demo_model_path(), dtype=torch.float32)
    cache.cache_states(Dataset.load_from_disk(sys.argv[1]), split_model(model, 1)[0], sys.argv[2])
"""


def test_caching_that_was_killed_goes_on_without_losing_or_repeating_a_protein(
    data, tmp_path, small_shards, monkeypatch
):
    data.save_to_disk(tmp_path / "data")
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path / "data"), str(tmp_path / "states"), "0.3"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (done := list((tmp_path / "states").rglob("*.arrow"))):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    times = {path: path.stat().st_mtime_ns for path in done}
    computed = []
    compute = cache._compute
    monkeypatch.setattr(
        cache, "_compute", lambda s, t, rows, f: computed.extend(rows.tolist()) or compute(s, t, rows, f)
    )
    trunk, _ = split_model(load(), 1)
    cached = cache_states(data, trunk, tmp_path / "states")
    assert {path: path.stat().st_mtime_ns for path in done} == times
    assert len(computed) == len(set(computed)) < len(data)
    for row in cached:
        expected = trunk(torch.tensor([row["input_ids"]]))[0]
        torch.testing.assert_close(states_of(row, StateFormat(), trunk.width), expected, atol=2e-5, rtol=2e-5)


def test_a_disk_without_room_is_refused_before_anything_is_computed(data, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(cache, "_compute", None)
    with pytest.raises(DataError, match=r"could not be written.*1000 B are free.*used again"):
        cache_states(data, split_model(load(), 1)[0], tmp_path)


def test_a_write_that_fails_leaves_whole_files_and_no_part(data, tmp_path, small_shards):
    data.save_to_disk(tmp_path / "data")
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path / "data"), str(tmp_path / "states"), "0"]

    def limit_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = subprocess.run(command, preexec_fn=limit_files, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.search("DataError: the states could not be written to .*Free space or give another folder", done.stderr)
    assert not list((tmp_path / "states").rglob("*.part"))
    assert not list((tmp_path / "states").rglob("*.arrow"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda rows: rows.remove_columns("input_ids"), DataError, "call tokenize_dataset first"),
        (lambda rows: rows.select([]), DataError, "has 0 rows"),
    ],
)
def test_a_dataset_that_is_not_tokenised_is_refused(data, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        cache_states(change(data), split_model(load(), 1)[0], tmp_path)


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"pooling": "mean"}])
def test_an_unknown_option_is_refused(data, tmp_path, options):
    with pytest.raises(ConfigurationError, match="expected one of"):
        cache_states(data, split_model(load(), 1)[0], tmp_path, **options)


def train(tokenizer, rows, folder, *, layers, adapters, head, steps=50, cached=None, **options):
    """Train the top layers with states from the cache, or without a cache, and return the weights that trained."""
    trunk, model = split_model(load(head, **options), layers)
    collator = DataCollatorWithPadding(tokenizer) if head == "sequence-classification" else _token_collator(tokenizer)
    if cached is None:
        model = join_model(model, trunk)
    else:
        rows = cache_states(rows, trunk, folder, dtype=cached)
        collator = StatesCollator(collator, StateFormat(cached), trunk.width)
    count = model.config.num_hidden_layers
    apply_lean_encoder(model)
    trained = tuple(f".layer.{number}." for number in range(count - layers, count))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("classifier" in name or any(part in name for part in trained))
    torch.manual_seed(1)
    if adapters:
        places = list(range(count - layers, count))
        model = prepare_model(model, adapters=lora_config(model, layers_to_transform=places))
    arguments = TrainingArguments(
        str(folder / "run"),
        max_steps=steps,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
    )
    WeightedTrainer(model, arguments, train_dataset=rows, data_collator=collator).train()
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def _token_collator(tokenizer):
    from transformers import DataCollatorForTokenClassification

    return DataCollatorForTokenClassification(tokenizer)


def relative_difference(one, other):
    assert set(one) == set(other)
    squares = sum(float((one[name] - other[name]).pow(2).sum()) for name in one)
    return (squares / sum(float(one[name].pow(2).sum()) for name in one)) ** 0.5


TASKS = {
    "class": ("sequence-classification", {"num_labels": 3, "problem_type": "single_label_classification"}, int),
    "labels": ("sequence-classification", {"num_labels": 2, "problem_type": "multi_label_classification"}, list),
    "number": ("sequence-classification", {"num_labels": 1, "problem_type": "regression"}, float),
    "residues": ("token-classification", {"num_labels": 3}, None),
}


def with_labels(data, kind):
    rng = np.random.default_rng(1)
    if kind == "residues":
        labels = [[-100, *rng.integers(0, 3, len(ids) - 2).tolist(), -100] for ids in data["input_ids"][:]]
    elif kind == "labels":
        labels = rng.integers(0, 2, (len(data), 2)).astype("float32").tolist()
    elif kind == "number":
        labels = rng.normal(size=len(data)).astype("float32").tolist()
    else:
        labels = rng.integers(0, 3, len(data)).tolist()
    return data.remove_columns("labels").add_column("labels", labels)


@pytest.mark.parametrize(
    ("kind", "layers", "adapters"),
    [
        ("class", 0, False),
        ("class", 1, True),
        ("class", 1, False),
        ("labels", 2, True),
        ("number", 2, False),
        ("number", 0, False),
        ("residues", 1, True),
        ("residues", 0, False),
        ("class", 4, True),
        ("class", 4, False),
    ],
)
def test_training_on_the_cache_gives_the_weights_of_training_without_it(
    tokenizer, data, tmp_path, kind, layers, adapters
):
    head, options, _ = TASKS[kind]
    rows = with_labels(data, kind)
    settings = {"layers": layers, "adapters": adapters, "head": head, **options}
    expected = train(tokenizer, rows, tmp_path, **settings)
    got = train(tokenizer, rows, tmp_path, cached="float32", **settings)
    assert relative_difference(expected, got) <= 1e-5
