"""examples/predict_with_ray.py predicts what predict_file does, in its order, and computes only what is missing."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import make_model
from sequence_texts import sequences

from esm_efficient import ConfigurationError, DataError, predict_file

SCRIPT = Path(__file__).parents[2] / "examples" / "predict_with_ray.py"
ROWS = 23


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("predict_with_ray", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def fasta(tmp_path) -> Path:
    path = tmp_path / "proteins.fasta"
    path.write_text("".join(f">p{i} of a test\n{s}\n" for i, s in enumerate(sequences(ROWS))))
    return path


def options_for(source: Path) -> Namespace:
    return Namespace(source=source, sequence=None, accession=None, max_tokens=1024, keep=None, block_rows=5)


def changed_files(output: Path, compute) -> list[str]:
    """The files that a function writes."""
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    compute()
    return sorted(path.name for path in output.iterdir() if before.get(path.name) != path.stat().st_mtime_ns)


def test_an_actor_writes_what_predict_file_writes(script, model, fasta, tmp_path):
    output, blocks = tmp_path / "out", tmp_path / "blocks"
    output.mkdir()
    blocks.mkdir()
    paths = script.write_blocks(options_for(fasta), blocks)
    done = script.PredictBlocks(str(model), output, None, 256, 1024)({"block": np.array(list(map(str, paths)))})
    assert (done["rows"], done["computed"]) == ([5, 5, 5, 5, 3], [True] * 5)
    predict_file(model, fasta, tmp_path / "all.parquet", token_budget=256)
    found, expected = pd.read_parquet(output), pd.read_parquet(tmp_path / "all.parquet")
    assert found["accession"].tolist() == [f"p{i}" for i in range(ROWS)]
    pd.testing.assert_frame_equal(found, expected, rtol=1e-5, atol=1e-6)


def test_an_actor_takes_a_block_that_passed_the_check_of_the_whole_file(script, model, tmp_path):
    rows = [f"a{i},MKTAYIAKQRQISFVK" for i in range(5)]
    (tmp_path / "in.csv").write_text("\n".join(["id,sequence", *rows, "nucleotides,GANCTAGAGATACATAGACCAT\n"]))
    output, blocks = tmp_path / "out", tmp_path / "blocks"
    output.mkdir()
    blocks.mkdir()
    paths = script.write_blocks(options_for(tmp_path / "in.csv"), blocks)
    done = script.PredictBlocks(str(model), output, None, 256, 1024)({"block": np.array(list(map(str, paths)))})
    assert done["rows"] == [5, 1]


def test_only_blocks_with_other_sequences_options_or_weights_are_computed_again(script, model, fasta, tmp_path):
    output, blocks = tmp_path / "out", tmp_path / "blocks"
    output.mkdir()
    blocks.mkdir()
    batch = {"block": np.array(list(map(str, script.write_blocks(options_for(fasta), blocks))))}
    names = [Path(path).name for path in batch["block"]]
    actor = script.PredictBlocks(str(model), output, None, 256, 1024)
    assert changed_files(output, lambda: actor(batch)) == names
    assert changed_files(output, lambda: actor(batch)) == []
    (output / names[1]).unlink()
    assert changed_files(output, lambda: actor(batch)) == [names[1]]
    fasta.write_text(fasta.read_text() + ">new\nMKTV\n")
    script.write_blocks(options_for(fasta), blocks)
    assert changed_files(output, lambda: actor(batch)) == [names[4]]
    actor = script.PredictBlocks(str(model), output, "start", 256, 1024)
    assert changed_files(output, lambda: actor(batch)) == names
    make_model(seed=1).save_pretrained(model)
    actor = script.PredictBlocks(str(model), output, "start", 256, 1024)
    assert changed_files(output, lambda: actor(batch)) == names


def test_predictions_of_another_run_are_deleted_only_if_asked_for(script, model, fasta, tmp_path):
    output, blocks = tmp_path / "out", tmp_path / "blocks"
    output.mkdir()
    blocks.mkdir()
    paths = script.write_blocks(options_for(fasta), blocks)
    actor = script.PredictBlocks(str(model), output, None, 256, 1024)
    actor({"block": np.array(list(map(str, paths)))})
    (output / "_block-000001.parquet.77").write_text("of a lost actor")
    script.remove_others(output, paths, actor.identity, replace=False)
    names = [path.name for path in paths]
    assert sorted(path.name for path in output.iterdir()) == names
    with pytest.raises(ConfigurationError, match=r"predictions of another run.* to block-000004.parquet. Give another"):
        script.remove_others(output, paths[:4], actor.identity, replace=False)
    with pytest.raises(ConfigurationError, match=r"block-000000.parquet to block-000004.*--replace to delete them"):
        script.remove_others(output, paths, "another", replace=False)
    assert sorted(path.name for path in output.iterdir()) == names
    script.remove_others(output, paths[:4], actor.identity, replace=True)
    assert sorted(path.name for path in output.iterdir()) == names[:4]


def test_a_wrong_row_is_an_error_before_anything_is_written(script, fasta, tmp_path):
    fasta.write_text(fasta.read_text() + ">long\n" + "M" * 1023 + "\n")
    with pytest.raises(DataError, match="1 of 24 rows cannot be used: record 24"):
        script.write_blocks(options_for(fasta), tmp_path)
    assert list(tmp_path.glob("*.parquet")) == []


@pytest.mark.slow
def test_a_local_cluster_predicts_in_the_order_of_the_file_and_goes_on(model, fasta, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")
    output = tmp_path / "out"

    def run(source: Path, *given: str) -> str:
        options = [*given, "--block-rows", "5", "--token-budget", "256", "--actors", "2"]
        done = subprocess.run(
            [sys.executable, str(SCRIPT), str(model), str(source), str(output), *options],
            capture_output=True,
            text=True,
            timeout=500,
            env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    assert f"{ROWS} rows in 5 files" in run(fasta)
    predict_file(model, fasta, tmp_path / "all.parquet", token_budget=256)
    expected = pd.read_parquet(tmp_path / "all.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(output), expected, rtol=1e-5, atol=1e-6)
    assert sorted(path.name for path in output.iterdir()) == [f"block-{i:06d}.parquet" for i in range(5)]
    table = pd.DataFrame({"accession": [f"p{i}" for i in range(20)], "sequence": sequences(ROWS)[:20]})
    table.to_parquet(tmp_path / "first.parquet")
    (output / "block-000002.parquet").unlink()
    assert "20 rows in 4 files" in (text := run(tmp_path / "first.parquet", "--replace"))
    assert "15 rows were there already" in text
    pd.testing.assert_frame_equal(pd.read_parquet(output), expected[:20], rtol=1e-5, atol=1e-6)
