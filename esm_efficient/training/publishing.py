"""Upload an exported model to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from esm_efficient.errors import ConfigurationError
from esm_efficient.published import is_repository
from esm_efficient.training.card import CARD


def push_to_hub(folder: str | Path, repository: str, *, private: bool = True) -> str:
    """Upload the folder that `export_model` wrote, with its model card, to the Hugging Face Hub.

    The repository is made if it is not there. ``hf auth login`` or ``HF_TOKEN`` says who uploads.

    Args:
        folder: the folder.
        repository: the repository, such as ``"me/membrane"``.
        private: whether a new repository can be read by its owner alone. One that is there stays as it is.

    Returns:
        The address of the repository.

    Raises:
        ConfigurationError: the folder has no model card or no model, or the repository is no name.
        OSError: the Hub cannot be reached or refuses the upload.

    Example:
        >>> push_to_hub(export_model("output", "membrane"), "me/membrane")  # doctest: +SKIP
    """
    from huggingface_hub import HfApi

    folder = Path(folder).expanduser()
    if not is_repository(repository):
        raise ConfigurationError(f"{repository!r}: expected a repository of the Hub, of the form owner/name")
    if missing := [name for name in (CARD, "config.json") if not (folder / name).is_file()]:
        raise ConfigurationError(f"{folder} has no {missing[0]}: expected a folder that export_model wrote")
    hub = HfApi()
    url = hub.create_repo(repository, private=private, exist_ok=True)
    hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload the model and its card")
    return str(url)
