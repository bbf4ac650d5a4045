"""The published ESM-2 models, and their names as people type them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from esm_efficient.errors import ConfigurationError, listing

ESM2_SIZES: dict[str, tuple[int, int, int]] = {
    "8M": (6, 320, 20),
    "35M": (12, 480, 20),
    "150M": (30, 640, 20),
    "650M": (33, 1280, 20),
    "3B": (36, 2560, 40),
    "15B": (48, 5120, 40),
}
"""Layers, width and attention heads by size (Lin et al. 2023, "Evolutionary-scale prediction...")."""

BASE_CONFIG = "base_config"
"""The folder beside an adapter with the config of its base model."""

_NAME = re.compile(r"(?:facebook/)?(?:esm-?2[ _-]?)?(?:t\d+[ _-])?(\d+) ?([mb])(?:[ _-]ur50d)?", re.IGNORECASE)


def size_of(name: str) -> str | None:
    """Return the size of a published ESM-2 model from its name; None for any other name.

    Example:
        >>> size_of("650m"), size_of("facebook/esm2_t33_650M_UR50D"), size_of("esm2_t6_8M"), size_of("my-model")
        ('650M', '650M', '8M', None)
    """
    match = _NAME.fullmatch(name.strip())
    size = f"{match[1]}{match[2].upper()}" if match else None
    return size if size in ESM2_SIZES else None


def is_repository(name: str) -> bool:
    """Return whether a name may be that of a repository of the Hub.

    Example:
        >>> is_repository("me/membrane"), is_repository("membrane")
        (True, False)
    """
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def no_model_in(folder: Path) -> str:
    """Return the message for a folder that is not the folder of a model; that of a run has one in it."""
    for inner, config in (("adapter", "adapter_config.json"), ("model", "config.json")):
        if (folder / inner / config).is_file():
            return f"{folder} is the folder of a run: give {folder / inner}"
    return f"the folder {folder} has no config.json: expected the folder of a saved model"


def models_beside(folder: Path) -> str:
    """Return what a message adds to a folder that does not exist: the models beside it; empty if there are none."""
    paths = [path for name in ("config.json", "adapter_config.json") for path in folder.parent.glob(f"*/{name}")]
    return f" ({folder.parent} has {listing(sorted({path.parent.name for path in paths}))})" if paths else ""


def missing_model(name: str, reason: str, *, revision: str | None = None, trained: bool = False) -> str:
    """Return the message for a name that is neither a folder nor a model in the cache, with what to do.

    Args:
        name: what was given, or the Hub name that it stands for.
        reason: why the Hub did not give it.
        revision: the branch, tag or commit that was asked for; None for the main branch.
        trained: whether a model with a trained head is needed, which no size of ESM-2 has.

    Example:
        >>> missing_model("someone/membrane", "HF_HUB_OFFLINE is set")[68:111]
        'is not in the cache (HF_HUB_OFFLINE is set)'
    """
    missing = f"there is no folder {name}{models_beside(Path(name))}, and"
    if not is_repository(name):
        if trained:
            return f"{missing} it is not a Hub name of the form owner/name"
        sizes = ", ".join(ESM2_SIZES)
        return f"{missing} it is neither the size of an ESM-2 model ({sizes}) nor a Hub name of the form owner/name"
    if models_beside(Path(name)):
        return f"{missing} the cache has no model of this name ({reason})"
    size = size_of(name)
    folder = name.split("/")[1] if size is None else f"esm2_{size}"
    start = f"{missing} the model " if size is None else ""
    download = f"hf download {name}{f' --revision {revision}' if revision else ''} --local-dir {folder}"
    advice = f"While online, run `{download}`, then give the folder {folder} as the model"
    return f"{start}{name} is not in the cache ({reason}). {advice}"


@contextmanager
def available(name: str | Path) -> Iterator[None]:
    """Say in a ``with`` block that loads a model what to do where there is none: transformers' error does not name it.

    Raises:
        ConfigurationError: the name is not a folder, and a file of the model could not be read.
    """
    try:
        yield
    except OSError as error:
        if Path(name).is_dir():
            raise
        from huggingface_hub import constants

        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub is not reachable or does not have it"
        raise ConfigurationError(missing_model(str(name), reason)) from error


def hub_name(name: str) -> str:
    """Return the Hub name of a published ESM-2 model, or the folder of the demo model; any other name as it is.

    A folder with a model comes before a published model of the same name.

    Raises:
        ConfigurationError: it is a folder without a model.

    Example:
        >>> hub_name("8M"), hub_name("output/model")
        ('facebook/esm2_t6_8M_UR50D', 'output/model')
    """
    if any((Path(name) / file).is_file() for file in ("config.json", "adapter_config.json")):
        return name
    if name == "demo":
        return str(Path(__file__).parent / "demo" / "model")
    if (size := size_of(name)) is not None:
        return f"facebook/esm2_t{ESM2_SIZES[size][0]}_{size}_UR50D"
    if Path(name).is_dir():
        raise ConfigurationError(no_model_in(Path(name)))
    return name


def refuse_adapter(name: str) -> None:
    """Refuse the folder of an adapter, or of a run that has one, where a whole model is needed.

    Raises:
        ConfigurationError: as above.
    """
    is_model = name == "demo" or size_of(name) is not None or (Path(name) / "config.json").is_file()
    for folder in (Path(name), *([] if is_model else [Path(name) / "adapter"])):
        if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
            raise ConfigurationError(
                f"the folder {folder} has an adapter, not a whole model: merge it first with `esm-efficient export "
                f"{folder} MERGED` (in Python, export_model), and give the folder MERGED"
            )


def check_name(name: str, *, trained: bool = False) -> str:
    """Return the name of a model, unless it can be seen without the Hub that there is no such model.

    Args:
        name: a folder, the size of an ESM-2 model or a Hub name.
        trained: whether a model with a trained head is needed, which no size of ESM-2 has.

    Raises:
        ConfigurationError: it is the size of no ESM-2 model, or the path of a folder that does not exist.

    Example:
        >>> check_name("650m"), check_name("someone/model")
        ('650m', 'someone/model')
    """
    if Path(name).is_dir() or size_of(name) is not None:
        return name
    if not trained and (_NAME.fullmatch(name.strip()) or not name.strip()):
        raise ConfigurationError(f"no ESM-2 model has the size {name!r}: expected one of {', '.join(ESM2_SIZES)}")
    if name.startswith(("/", ".", "~")) or name.endswith("/") or name.count("/") > 1 or not name.strip():
        beside = models_beside(Path(name))
        sizes = ", an ESM-2 size such as 650M, or a Hub name"
        expected = f"a folder{' of finetune or export or a Hub name' if trained else sizes}"
        raise ConfigurationError(f"no folder at {name if name.strip() else repr(name)}{beside}: expected {expected}")
    return name
