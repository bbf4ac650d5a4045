import ctypes
import os
import re
import resource
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import each_value, slow_except
from copies import Copy
from datasets import Dataset, DatasetDict
from transformers import AutoConfig, AutoTokenizer, DataCollatorWithPadding, EsmModel, TrainingArguments

from esm_efficient import (
    ConfigurationError,
    DataError,
    OutOfMemoryError,
    PooledEsmForSequenceClassification,
    WeightedTrainer,
    apply_lean_encoder,
    demo_model_path,
    lora_config,
    prepare_model,
)
from esm_efficient.data.tokenizing import tokenize_dataset
from esm_efficient.heads import model_class
from esm_efficient.tasks import auto_class, set_pooling
from esm_efficient.trunk import settings, shards
from esm_efficient.trunk.cache import cache_states
from esm_efficient.trunk.split import join_model, split_model
from esm_efficient.trunk.states import STATES_COLUMN, StateFormat, StatesCollator


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
    monkeypatch.setattr(shards, "_SHARD_BYTES", 40_000)


def states_of(row, stored, width):
    raw = torch.frombuffer(bytearray(row[STATES_COLUMN][:-1]), dtype=torch.uint8).view(stored.torch_dtype)
    return raw.view(-1, width).float()


POOLINGS = {
    "tokens": lambda states: states,
    "first": lambda states: states[:1],
    "mean": lambda states: states[1:-1].mean(0, keepdim=True),
    "both": lambda states: torch.stack([states[0], states[1:-1].mean(0)]),
}


@pytest.mark.parametrize(
    ("read", "held"),
    each_value(
        [("tokens", 1), *((pooling, 0) for pooling in POOLINGS)],
        [("float32", 2e-5), ("bfloat16", 8e-3), ("float16", 1e-3)],
    ),
)
def test_each_row_has_the_states_of_its_own_sequence(data, tmp_path, monkeypatch, read, held):
    (pooling, layers), (dtype, tolerance) = read, held
    monkeypatch.setattr(shards, "_SHARD_BYTES" if pooling == "tokens" else "_SHARD_TOKENS", 500)
    trunk, _ = split_model(load(), layers)
    cached = cache_states(data, trunk, tmp_path, dtype=dtype, pooling=pooling)
    assert len(list(tmp_path.rglob("*.arrow"))) > 1
    assert cached["input_ids"][:] == data["input_ids"][:]
    for row in cached:
        expected = POOLINGS[pooling](trunk(torch.tensor([row["input_ids"]]))[0])
        got = states_of(row, StateFormat(dtype), trunk.width)
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize(
    ("head", "pooling"), [("first", "first"), ("first", "both"), ("mean", "mean"), ("mean", "both")]
)
def test_the_head_computes_from_pooled_states_what_the_model_computes(tokenizer, data, tmp_path, head, pooling, lean):
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(demo_model_path(), num_labels=3)
    set_pooling(config, head)
    model = model_class("sequence-classification", head).from_pretrained(demo_model_path(), config=config)
    collator = DataCollatorWithPadding(tokenizer)
    rows = data.remove_columns("tokens")
    batch = collator([rows[number] for number in range(8)])
    labels = batch.pop("labels")
    with torch.no_grad():
        expected = model(**batch, labels=labels)
    trunk, rest = split_model(model, 0)
    cached = cache_states(rows, trunk, tmp_path, pooling=pooling)
    if lean:
        apply_lean_encoder(rest)
    got = rest(**StatesCollator(collator, trunk)([cached[number] for number in range(8)]))
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got.loss, expected.loss)


def test_states_are_used_again_and_other_columns_may_change(data, tmp_path, small_shards, monkeypatch):
    trunk, _ = split_model(load(), 1)
    first = cache_states(data, trunk, tmp_path)
    monkeypatch.setattr(shards, "compute_states", None)  # a second computation would fail
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


def _changed(change):
    model = load()
    change(model.esm)
    return model


def _no_token_dropout(esm):
    esm.embeddings.token_dropout = False


def _hooked(esm):
    esm.encoder.layer[0].register_forward_hook(lambda module, given, out: out)


def _replaced(esm):
    first = esm.encoder.layer[0].intermediate
    first.forward = lambda states: 2 * type(first).forward(first, states)


@pytest.mark.parametrize(
    "changed",
    [
        {"model": _other_weight},
        {"model": _other_config},
        {"model": lambda: _changed(_no_token_dropout)},
        {"model": lambda: _changed(_hooked)},
        {"model": lambda: _changed(_replaced)},
        {"model": lambda: load().to(torch.bfloat16)},
        {"layers": 2},
        {"rows": [1, 0, *range(2, 30)]},
        {"rows": range(29)},
        {"dtype": "float16"},
        {"pooling": "tokens"},
        {"pooling": "mean"},
        {"pooling": "both"},
    ],
    ids=lambda changed: " ".join(changed),
)
def test_a_change_of_anything_that_the_states_depend_on_makes_new_states(data, tmp_path, changed):
    def run(model=load, layers=0, rows=range(30), pooling="first", **options):
        trunk, _ = split_model(model(), layers)
        pooling = "tokens" if layers else pooling
        return cache_states(data.select(rows), trunk, tmp_path, pooling=pooling, **options)

    run()
    before = set(tmp_path.iterdir())
    run(**changed)
    assert len(set(tmp_path.iterdir()) - before) == 1


def _scaling(factor):
    return lambda module, given, output: factor * output


def _scaling_by(held):
    return lambda module, given, output: held["factor"] * output


def _scaling_by_default(value):
    def hook(module, given, output, *, factor=value):
        return factor * output

    return hook


def _scaling_beside(factor):
    """A hook with a set, an ellipsis and a dtype among its constants and defaults."""

    def hook(module, given, output, *, dtype=torch.float32):
        return output if output.shape[-1] in {2, 3} else (factor * output[..., :]).to(dtype)

    return hook


def _scaling_unset(factor):
    """A hook with a variable that has no value yet."""

    def hook(module, given, output):
        return later if factor is None else factor * output

    if factor is None:
        later = 0
    return hook


@dataclass(slots=True)
class SlottedScales:
    factor: float

    def hook(self, module, given, output):
        return self.factor * output


class Scales:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, module, given, output):
        return self.factor * output

    def hook(self, module, given, output):
        return self.factor * output


@pytest.mark.parametrize(
    ("make", "is_known"),
    [
        (_scaling, True),
        (lambda factor: partial(lambda factor, module, given, output: factor * output, factor), True),
        (lambda factor: _scaling(torch.tensor(factor)), True),
        (lambda factor: Scales(factor).hook, True),
        (_scaling_by_default, True),
        (_scaling_beside, True),
        (_scaling_unset, True),
        (Scales, True),
        (lambda factor: _scaling_by({"factor": factor}), True),
        (lambda factor: _scaling_by({"factor": factor, "other": object()}), False),
        (lambda factor: SlottedScales(factor).hook, False),
    ],
    ids=[
        "closure",
        "partial",
        "tensor",
        "method",
        "default",
        "constants",
        "unset",
        "object",
        "dict",
        "unknown",
        "slots",
    ],
)
def test_hooks_that_hold_other_values_have_other_states(data, tmp_path, make, is_known, caplog):
    """What holds values that cannot be compared never has the states of an earlier call, and a warning says so."""
    settings._warn_of.cache_clear()

    def folders(factor):
        model = load()
        model.esm.embeddings.register_forward_hook(make(factor))
        cache_states(data.select(range(3)), split_model(model, 1)[0], tmp_path)
        return len(list(tmp_path.iterdir()))

    assert [folders(factor) for factor in (1.0, 3.0)] == [1, 2]
    assert folders(3.0) == (2 if is_known else 3)
    told = [record.getMessage() for record in caplog.records if "cannot be compared" in record.getMessage()]
    assert len(told) == (0 if is_known else 1)


def test_the_free_space_is_that_for_the_files_of_all_ranks(data, tmp_path, small_shards, monkeypatch):
    trunk, _ = split_model(load(), 1)
    cache_states(data, trunk, tmp_path / "whole")
    needed = sum(path.stat().st_size for path in (tmp_path / "whole").rglob("*.arrow"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: usage._replace(free=needed // 2))
    monkeypatch.setattr(shards, "rank_and_ranks", lambda: (0, 4))
    monkeypatch.setattr(shards, "_all_agree", lambda fine: fine)
    with pytest.raises(DataError, match=r"could not be written.*are free there"):
        cache_states(data, trunk, tmp_path / "shared")


def _of_all_backends(value):
    torch.backends.fp32_precision = value  # transformers does this for tf32=True


def _of_cuda(value):
    torch.backends.cuda.matmul.fp32_precision = value


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch has one setting for all backends")
@pytest.mark.parametrize("set_precision", [_of_all_backends, _of_cuda])
def test_another_precision_of_products_gives_other_states(data, tmp_path, set_precision):
    def folders():
        cache_states(data.select(range(3)), split_model(load(), 1)[0], tmp_path)
        return len(list(tmp_path.iterdir()))

    before = folders()
    try:
        set_precision("tf32")
        assert (before, folders(), folders()) == (1, 2, 2)
    finally:
        set_precision("none")
    assert folders() == 2


def test_what_does_not_change_the_states_makes_no_new_states(data, tmp_path):
    cache_states(data, split_model(load(), 1)[0], tmp_path)
    before = set(tmp_path.iterdir())
    pooled = PooledEsmForSequenceClassification.from_pretrained(demo_model_path(), classifier_pooling="mean")
    moved = load()
    moved.esm = EsmModel.from_pretrained(shutil.copytree(demo_model_path(), tmp_path.parent / "moved"))
    for other_head in (load(num_labels=5, id2label=dict(enumerate("abcde"))), pooled, load().train(), moved):
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
    from esm_efficient.trunk import cache_states, shards
    from esm_efficient.trunk.split import split_model

    shards._SHARD_BYTES = 40_000
    compute = shards.compute_states
    def slowly(*arguments):
        time.sleep(float(sys.argv[3]))
        return compute(*arguments)
    shards.compute_states = slowly
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(demo_model_path(), dtype=torch.float32)
    cache_states(Dataset.load_from_disk(sys.argv[1]), split_model(model, 1)[0], sys.argv[2])
"""


def test_caching_that_was_killed_goes_on_without_losing_or_repeating_a_protein(
    data, tmp_path, small_shards, monkeypatch
):
    data.save_to_disk(tmp_path / "data")
    process = Copy(SCRIPT, tmp_path / "data", tmp_path / "states", 0.3, folder=tmp_path)
    deadline = time.monotonic() + 120
    while not (done := list((tmp_path / "states").rglob("*.arrow"))):
        assert process.is_running
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    (abandoned,) = (tmp_path / "states").rglob("*.part")
    times = {path: path.stat().st_mtime_ns for path in done}
    computed = []
    compute = shards.compute_states
    monkeypatch.setattr(
        shards, "compute_states", lambda s, t, rows, f: computed.extend(rows.tolist()) or compute(s, t, rows, f)
    )
    trunk, _ = split_model(load(), 1)
    cached = cache_states(data, trunk, tmp_path / "states")
    assert {path: path.stat().st_mtime_ns for path in done} == times
    assert not abandoned.exists()
    assert len(computed) == len(set(computed)) < len(data)
    for row in cached:
        expected = trunk(torch.tensor([row["input_ids"]]))[0]
        torch.testing.assert_close(states_of(row, StateFormat(), trunk.width), expected, atol=2e-5, rtol=2e-5)


def test_the_unfinished_file_of_a_living_process_stays(data, tmp_path, small_shards):
    data.save_to_disk(tmp_path / "data")
    process = Copy(SCRIPT, tmp_path / "data", tmp_path / "states", 0.1, folder=tmp_path)
    deadline = time.monotonic() + 120
    while not (parts := list((tmp_path / "states").rglob("states-*.part"))):
        assert process.is_running
        assert time.monotonic() < deadline
        time.sleep(0.02)
    shards.remove_abandoned_parts(parts[0].parent)
    assert parts[0].exists()
    done = process.wait()
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "states").rglob("states-*.part"))


def test_a_file_is_closed_before_it_is_renamed_where_there_are_no_locks(data, tmp_path, monkeypatch):
    """Windows has no locks of this kind, and renames no open file."""
    renamed, rename = [], os.replace

    def replace(source, target):
        held = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
        assert str(Path(source).resolve()) not in held
        renamed.append(Path(target).suffix)
        rename(source, target)

    monkeypatch.setattr(shards, "_lock", lambda descriptor, wait: False)
    monkeypatch.setattr(shards.os, "replace", replace)
    cache_states(data, split_model(load(), 1)[0], tmp_path)
    assert ".arrow" in renamed


def test_a_disk_without_room_is_refused_before_anything_is_computed(data, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(shards, "compute_states", None)
    with pytest.raises(DataError, match=r"could not be written.*1000 B are free.*used again"):
        cache_states(data, split_model(load(), 1)[0], tmp_path)


def test_a_write_that_fails_leaves_whole_files_and_no_part(data, tmp_path, small_shards):
    data.save_to_disk(tmp_path / "data")

    def limit_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = Copy(SCRIPT, tmp_path / "data", tmp_path / "states", 0, folder=tmp_path, before=limit_files).wait()
    assert done.returncode == 1
    assert re.search("DataError: the states could not be written to .*File too large.*Give another folder", done.stderr)
    assert not list((tmp_path / "states").rglob("*.part"))
    assert not list((tmp_path / "states").rglob("*.arrow"))


LIST_FILES = """
    import os
    print([name for _, _, names in os.walk(sys.argv[2]) for name in names])
"""


CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
"""Flags of unshare, from linux/sched.h."""
NO_MOUNT = 77
"""The exit status of a copy that may not mount a disk."""


def mount_a_small_disk(folder):
    """Mount a disk of 100 kB for this process alone, and hide from it that there is no more room."""
    user, group, libc = os.getuid(), os.getgid(), ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS):
        os._exit(NO_MOUNT)
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        Path("/proc/self", name).write_text(text)
    if libc.mount(b"none", os.fsencode(folder), b"tmpfs", 0, b"size=100k"):
        os._exit(NO_MOUNT)
    # As if another process filled the disk meanwhile.
    shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**9, 0, 10**9)


def test_a_disk_that_fills_up_leaves_whole_files_and_no_part(data, tmp_path):
    data.save_to_disk(tmp_path / "data")
    states = tmp_path / "states"
    states.mkdir()
    script = "try:\n" + SCRIPT + "finally:\n" + LIST_FILES
    arguments = tmp_path / "data", states, 0
    done = Copy(script, *arguments, folder=tmp_path, before=lambda: mount_a_small_disk(states)).wait()
    if done.returncode == NO_MOUNT:
        pytest.skip("needs the right to mount a small disk")
    assert done.returncode == 1
    assert re.search("DataError: the states could not be written .*No space left on device.*run again", done.stderr)
    assert ".arrow" in done.stdout
    assert ".part" not in done.stdout


def padded(rows):
    longest = max(map(len, rows["input_ids"]))
    values = {"input_ids": 1, "attention_mask": 0}
    return rows.map(lambda row: {name: row[name] + [v] * (longest - len(row[name])) for name, v in values.items()})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda rows: rows.remove_columns("input_ids"), DataError, "call tokenize_dataset first"),
        (lambda rows: rows.select([]), DataError, "has 0 rows"),
        (lambda rows: padded(rows), DataError, "has padding"),
        (lambda rows: rows.rename_column("labels", STATES_COLUMN), DataError, "that is not of cached states"),
    ],
)
def test_a_dataset_that_is_not_tokenised_is_refused(data, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        cache_states(change(data), split_model(load(), 1)[0], tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype='int8': expected one of"),
        ({"pooling": "max"}, "pooling='max': expected one of"),
        *(({"pooling": pooling}, "layers above the trunk train") for pooling in ("first", "mean", "both")),
    ],
)
def test_an_option_that_is_unknown_or_does_not_fit_the_trunk_is_refused(data, tmp_path, options, message):
    with pytest.raises(ConfigurationError, match=message):
        cache_states(data, split_model(load(), 1)[0], tmp_path, **options)


def test_states_are_read_as_they_were_written_or_refused(data, tokenizer, tmp_path):
    trunk, _ = split_model(load(), 0)
    rows = data.select(range(4)).remove_columns(["labels", "tokens"])
    collate = StatesCollator(DataCollatorWithPadding(tokenizer), trunk)
    exact = collate(cache_states(rows, trunk, tmp_path).to_list())["inputs_embeds"]
    for dtype in ("bfloat16", "float16"):
        got = collate(cache_states(rows, trunk, tmp_path, dtype=dtype).to_list())["inputs_embeds"]
        torch.testing.assert_close(got, exact, atol=0.03, rtol=0.01)
    first, mean = (cache_states(rows, trunk, tmp_path, pooling=pooling).to_list() for pooling in ("first", "mean"))
    torch.testing.assert_close(collate(first)["inputs_embeds"][:, 0], exact[:, 0])
    with pytest.raises(DataError, match="states of 2 formats"):
        collate([first[0], mean[1]])
    with pytest.raises(DataError, match=r"no column states.*WeightedTrainer, or .*remove_unused_columns=False"):
        collate(rows.to_list())
    for mark in (b"\x00", b"\xff", b""):
        with pytest.raises(DataError, match="states end with the byte"):
            collate([first[0] | {STATES_COLUMN: first[0][STATES_COLUMN][:-1] * bool(mark) + mark}])
    row = cache_states(rows, trunk, tmp_path)[0]
    with pytest.raises(DataError, match="of other tokens or of another model"):
        collate([row | {"input_ids": row["input_ids"][:-1], "attention_mask": row["attention_mask"][:-1]}])


@pytest.mark.parametrize("layout", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("pooling", list(POOLINGS))
def test_states_are_read_in_every_format_of_a_dataset(data, tokenizer, tmp_path, layout, dtype, pooling):
    trunk, _ = split_model(load(), 0)
    with torch.no_grad():
        trunk.esm.encoder.emb_layer_norm_after.weight[-1] = 0  # so that the bytes of the states end with zeros
        trunk.esm.encoder.emb_layer_norm_after.bias[-1] = 0
    rows = data.select(range(4)).remove_columns(["labels", "tokens"])
    rows = cache_states(rows, trunk, tmp_path, dtype=dtype, pooling=pooling)
    collate = StatesCollator(DataCollatorWithPadding(tokenizer), trunk)
    formatted = rows.with_format(layout)
    got, expected = collate(formatted.__getitems__([0, 1, 2, 3])), collate(rows.to_list())
    torch.testing.assert_close(got["inputs_embeds"], expected["inputs_embeds"], rtol=0, atol=0)
    assert not got["inputs_embeds"][..., -1].any()
    one = collate([formatted[2]])["inputs_embeds"][0]
    torch.testing.assert_close(one, expected["inputs_embeds"][2, : len(one)], rtol=0, atol=0)


def test_padding_on_the_left_moves_the_states_with_the_tokens(data, tmp_path):
    trunk, rest = split_model(load("token-classification"), 1)
    left = AutoTokenizer.from_pretrained(demo_model_path(), padding_side="left")
    rows = data.select(range(3)).remove_columns(["labels", "tokens"])
    batch = StatesCollator(DataCollatorWithPadding(left), trunk)(cache_states(rows, trunk, tmp_path).to_list())
    got = rest(**batch).logits[batch["attention_mask"].bool()]
    expected = [load("token-classification")(torch.tensor([ids])).logits[0] for ids in rows["input_ids"]]
    torch.testing.assert_close(got, torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_a_batch_without_a_mask_has_no_padding(data, tmp_path):
    trunk, _ = split_model(load(), 1)
    [row] = cache_states(data.select([0]), trunk, tmp_path).to_list()

    def collate(rows):
        return {"input_ids": torch.tensor([row["input_ids"] for row in rows])}

    batch = StatesCollator(collate, trunk)([row, row])
    assert batch.keys() == {"inputs_embeds"}
    torch.testing.assert_close(batch["inputs_embeds"][1:], trunk(torch.tensor([row["input_ids"]])))


@pytest.mark.parametrize(
    ("bias", "dtype", "message"),
    [
        (1e5, "float16", "float16 are the states of row .*: use bf16 or float32"),
        (float("inf"), "float16", "not finite in float16"),
        (float("nan"), "float32", "not finite in float32 .*: the weights of the model are damaged"),
    ],
)
def test_states_that_are_not_finite_are_refused(data, tmp_path, bias, dtype, message):
    model = load()
    with torch.no_grad():
        model.esm.encoder.layer[0].output.dense.bias[0] = bias
    with pytest.raises(DataError, match=message):
        cache_states(data, split_model(model, 1)[0], tmp_path, dtype=dtype)


def test_too_little_memory_is_an_error_and_leaves_no_states(data, tmp_path):
    trunk, _ = split_model(load(), layers=1)

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    hook = trunk.esm.encoder.layer[1].register_forward_pre_hook(fail)
    with pytest.raises(
        OutOfMemoryError, match=r"\d+ sequence\(s\) of up to \d+ tokens. To cache states, use a smaller"
    ):
        cache_states(data, trunk, tmp_path)
    hook.remove()
    assert not list(tmp_path.rglob("*.arrow"))


def test_two_writers_of_one_process_number_share_a_folder(data, tmp_path, small_shards):
    """Two containers may give their processes the same number."""
    trunk, _ = split_model(load(), 1)
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda _: cache_states(data, trunk, tmp_path)[STATES_COLUMN][:], range(2))
    assert one == two == cache_states(data, trunk, tmp_path / "alone")[STATES_COLUMN][:]
    assert not list(tmp_path.rglob("*.part"))


def test_whole_states_can_be_read_where_nothing_can_be_written(data, tmp_path, monkeypatch):
    trunk, _ = split_model(load(), 1)
    expected = cache_states(data, trunk, tmp_path)[STATES_COLUMN][:]

    def refuse(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "touch", refuse)
    assert cache_states(data, trunk, tmp_path)[STATES_COLUMN][:] == expected


def test_a_folder_that_cannot_be_written_is_not_called_full(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"could not be written to .*file.*Give another folder") as caught:
        cache_states(data, split_model(load(), 1)[0], tmp_path / "file")
    assert "Free space" not in str(caught.value)


def test_a_mean_over_no_residue_is_refused(data, tmp_path):
    empty = Dataset.from_dict({"input_ids": [[0, 2]]}, features=data.select_columns("input_ids").features)
    trunk, _ = split_model(load(), 0)
    with pytest.raises(DataError, match="a sequence has 2 tokens"):
        cache_states(empty, trunk, tmp_path, pooling="mean")


def train(tokenizer, rows, folder, *, layers, adapters, head, steps=50, cached=None, pooling="tokens", **options):
    """Train the top layers with states from the cache, or without a cache, and return the weights that trained."""
    if pooling == "mean":
        torch.manual_seed(0)
        whole = PooledEsmForSequenceClassification.from_pretrained(
            demo_model_path(), classifier_pooling=pooling, **options
        )
    else:
        whole = load(head, **options)
    trunk, model = split_model(whole, layers)
    collator = DataCollatorWithPadding(tokenizer) if head == "sequence-classification" else _token_collator(tokenizer)
    if cached is None:
        model = join_model(model, trunk)
    else:
        rows = cache_states(rows, trunk, folder, dtype=cached, pooling=pooling)
        collator = StatesCollator(collator, trunk)
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
    slow_except(
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
        ("class", 1, True),
    ),
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


@pytest.mark.parametrize(
    ("pooling", "kind"),
    slow_except(
        [("first", "class"), ("first", "number"), ("mean", "class"), ("mean", "number")],
        ("mean", "number"),
    ),
)
def test_training_a_head_on_pooled_states_gives_the_weights_of_training_without_a_cache(
    tokenizer, data, tmp_path, kind, pooling
):
    head, options, _ = TASKS[kind]
    rows = with_labels(data, kind)
    settings = {"layers": 0, "adapters": False, "head": head, "pooling": pooling, **options}
    expected = train(tokenizer, rows, tmp_path, **settings)
    got = train(tokenizer, rows, tmp_path, cached="float32", **settings)
    assert relative_difference(expected, got) <= 1e-5
