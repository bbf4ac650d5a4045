"""push_to_hub(): an exported folder reaches the Hub with its card, or nothing is sent."""

from __future__ import annotations

import json

import huggingface_hub
import pytest
from conftest import make_model

from esm_efficient import export_model
from esm_efficient.cli import main
from esm_efficient.errors import ConfigurationError
from esm_efficient.training.publishing import push_to_hub


@pytest.fixture
def exported(tmp_path, tokenizer):
    return export_model(make_model(), tmp_path / "membrane", base_model="tiny", tokenizer=tokenizer)


@pytest.fixture
def hub(monkeypatch):
    """What is asked of the Hub."""
    asked = []

    class Api:
        def create_repo(self, repo_id, **options):
            asked.append(("create", repo_id, options))
            return f"https://huggingface.co/{repo_id}"

        def upload_folder(self, *, repo_id, folder_path, **options):
            asked.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir())))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return asked


@pytest.mark.parametrize("private", [True, False])
def test_the_folder_is_uploaded_whole_to_a_repository_that_is_made(exported, hub, private):
    assert push_to_hub(exported, "me/membrane", private=private) == "https://huggingface.co/me/membrane"
    (_, made, options), (_, repository, files) = hub
    assert (made, options) == ("me/membrane", {"private": private, "exist_ok": True})
    assert repository == "me/membrane"
    assert {"README.md", "config.json", "model.safetensors", "metrics.json"} <= set(files)


def test_what_is_no_exported_folder_or_no_name_is_refused_before_anything_is_sent(exported, hub, tmp_path):
    with pytest.raises(ConfigurationError, match="of the form owner/name"):
        push_to_hub(exported, "membrane")
    with pytest.raises(ConfigurationError, match=r"has no README.md: expected a folder that export_model wrote"):
        push_to_hub(tmp_path, "me/membrane")
    assert not hub


def test_a_hub_that_is_not_reached_is_one_line(exported, monkeypatch, capsys):
    monkeypatch.setattr("esm_efficient.training.export.export_model", lambda *_, **__: exported)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert main(["export", str(exported), str(exported.parent / "out"), "--push", "me/membrane"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "offline" in error


def test_the_command_prints_the_address(exported, monkeypatch, capsys, hub):
    monkeypatch.setattr("esm_efficient.training.export.export_model", lambda *_, **__: exported)
    command = ["export", str(exported), str(exported.parent / "out"), "--push", "me/membrane"]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["repository"] == "https://huggingface.co/me/membrane"
    assert main([*command, "--public"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "https://huggingface.co/me/membrane"
    assert [options["private"] for kind, _, options in hub if kind == "create"] == [True, False]
