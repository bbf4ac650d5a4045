"""prepare_data.py writes splits to S3 and to a folder, and they load unchanged."""

from __future__ import annotations

import json

from aws_on_loopback import BUCKET
from datasets import load_from_disk
from sequence_files import frame

from esm_efficient import load_deeploc, tokenize_dataset, write_demo_table


def expected_splits(tmp_path, tokenizer):
    data = load_deeploc(write_demo_table(tmp_path / "demo.csv"), max_residues=180)
    return tokenize_dataset(data, tokenizer)[0]


def test_splits_load_unchanged_from_s3(aws, place, tmp_path, tokenizer):
    folder = aws.download("work/dataset", tmp_path / "dataset")
    loaded, data = load_from_disk(str(folder)), expected_splits(tmp_path, tokenizer)
    assert loaded.keys() == data.keys()
    for name, split in data.items():
        assert loaded[name].features == split.features
        assert loaded[name][:] == split[:]
    record = json.loads((folder / "task.json").read_text())
    assert record["kind"] == "single_label_classification"
    assert record["names"] == ["non-membrane", "membrane"]
    assert record["sequences"] == {name: len(split) for name, split in data.items()}
    assert record["longest_tokens"] == max(max(split["tokens"]) for split in data.values())
    assert "work/created-by-esm-efficient.json" in aws.keys("work/created")


def test_ten_locations_are_written_to_a_folder(aws, tmp_path):
    done = aws.run(
        "prepare_data.py", "--place", tmp_path / "out", "--data", "demo", "--task", "location", "--limit", 30,
        AWS_ENDPOINT_URL="http://127.0.0.1:9",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = load_from_disk(str(tmp_path / "out" / "dataset"))
    assert len(loaded["train"]) == 30
    assert len(loaded["test"]) == 10
    record = json.loads((tmp_path / "out" / "dataset" / "task.json").read_text())
    assert record["kind"] == "multi_label_classification"
    assert len(record["names"]) == len(loaded["train"][0]["labels"]) == 10


def test_an_error_of_the_user_is_one_line(aws):
    done = aws.run("prepare_data.py", "--place", "s3://no-such-bucket/x", "--data", "demo")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "no-such-bucket" in done.stderr or "NoSuchBucket" in done.stderr
    assert "Traceback" not in done.stderr
    done = aws.run("prepare_data.py", "--place", f"s3://{BUCKET}", "--data", "demo")
    assert "expected s3://bucket/prefix" in done.stderr


def test_a_table_of_ones_own_is_read_with_its_column_of_labels(aws, tmp_path):
    frame(60).rename(columns={"label": "binds"}).to_csv(tmp_path / "t.csv", index=False)
    done = aws.run(
        "prepare_data.py", "--place", tmp_path / "out", "--data", tmp_path / "t.csv", "--label", "binds",
        AWS_ENDPOINT_URL="http://127.0.0.1:9",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "out" / "dataset" / "task.json").read_text())
    assert record["names"] == ["membrane", "soluble"]
    assert sum(record["sequences"].values()) == 60
    assert record["dataset"] == "t.csv"
