"""Names of models as people type them: folders come first, and a folder without a model is refused."""

from __future__ import annotations

import pytest

from esm_efficient import Embedder, Predictor, demo_model_path
from esm_efficient.errors import ConfigurationError
from esm_efficient.published import hub_name


@pytest.mark.parametrize("name", ["8M", "demo", "my-model"])
def test_a_folder_with_a_model_comes_before_a_published_model(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text("{}")
    assert hub_name(name) == name


def test_a_folder_without_a_model_is_passed_over_or_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "8M", "proteins"):
        (tmp_path / name).mkdir()
    assert hub_name("demo") == str(demo_model_path())
    assert hub_name("8M") == "facebook/esm2_t6_8M_UR50D"
    with pytest.raises(ConfigurationError, match=r"the folder proteins has no config.json"):
        hub_name("proteins")


@pytest.mark.parametrize(("inner", "config"), [("adapter", "adapter_config.json"), ("model", "config.json")])
def test_the_folder_of_a_run_is_refused_with_the_folder_of_its_model(tmp_path, inner, config):
    (tmp_path / inner).mkdir()
    (tmp_path / inner / config).write_text("{}")
    for load in (hub_name, Predictor.load, Embedder.load):
        with pytest.raises(ConfigurationError, match="is the folder of a run: give") as raised:
            load(str(tmp_path))
        assert str(raised.value).endswith(str(tmp_path / inner))
