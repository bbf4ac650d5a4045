"""Write a saved model as an ONNX file, which onnxruntime computes without torch and without transformers."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from esm_efficient.errors import ConfigurationError
from esm_efficient.inference.loading import load_model

ONNX_FILE = "model.onnx"
"""The file in the folder of a model. Weights of more than about 2 GB are in ``model.onnx.data``."""

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_INPUTS, _OUTPUT = ("input_ids", "attention_mask"), "logits"
_TRACED = ("MKTAYIAKQR", "MALWMR")
"""Two sequences of different lengths. Their number and their length are variables in the file."""
_CHECKED = ("MKTAYIAKQRQISFVKSHFSRQ", "MALWMRLLPLL", "M")
_TOLERANCE = 1e-4
"""The largest difference of a logit, for logits of at most 1; as a share of the largest logit above that."""


def require_onnx() -> None:
    """Refuse to go on without the packages that write and check ONNX files.

    Raises:
        ConfigurationError: one of them is not installed.
    """
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise ConfigurationError(
            f"onnx=True needs {' and '.join(missing)}, not installed here: pip install 'esm-efficient-finetuning[onnx]'"
        )


def remove_onnx(folder: Path) -> bool:
    """Remove the ONNX file of a model that was in the folder before; return whether there was one."""
    was_there = (folder / ONNX_FILE).is_file()
    for name in (ONNX_FILE, f"{ONNX_FILE}.data"):
        (folder / name).unlink(missing_ok=True)
    return was_there


def write_onnx(folder: Path) -> Path:
    """Write ``model.onnx`` beside the weights of a model.

    Its inputs are those of the model in transformers: ``input_ids`` and ``attention_mask``, int64 of shape (sequences,
    tokens). Its output is ``logits``, float32 of shape (sequences, labels), or (sequences, tokens, labels) for one
    class per residue. The numbers of sequences and of tokens are free. The file is loaded with onnxruntime and
    compared with the model before this function returns.

    Args:
        folder: the folder of a model, with its weights and its tokenizer, as `export_model` writes it.

    Returns:
        The file.

    Raises:
        ConfigurationError: torch cannot translate the model, or onnxruntime computes other logits.

    Example:
        >>> write_onnx(Path("membrane"))  # doctest: +SKIP
    """
    model, tokenizer = load_model(folder, revision=None, cache_dir=None, task=None)
    network = _Logits(model).eval().requires_grad_(False)
    file = folder / ONNX_FILE
    sequences, tokens = torch.export.Dim("sequences"), torch.export.Dim("tokens")
    try:
        with _silent():
            program: Any = torch.onnx.export(
                network,
                _batch(tokenizer, _TRACED),
                dynamo=True,
                input_names=list(_INPUTS),
                output_names=[_OUTPUT],
                dynamic_shapes={name: {0: sequences, 1: tokens} for name in _INPUTS},
                verbose=False,
            )
            program.save(file)
        _check(network, _batch(tokenizer, _CHECKED), file)
    except BaseException:
        remove_onnx(folder)
        raise
    return file


class _Logits(nn.Module):
    """A model that takes tokens and mask by position and returns its logits alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def _batch(tokenizer: Any, sequences: tuple[str, ...]) -> tuple[Tensor, ...]:
    batch = tokenizer(list(sequences), padding=True, return_tensors="pt")
    return tuple(batch[name] for name in _INPUTS)


@contextmanager
def _silent() -> Iterator[None]:
    """Keep the notes of torch's exporter from the user, and turn its errors into one line."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except torch.onnx.errors.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ConfigurationError(
            f"torch {torch.__version__} cannot translate this model of transformers {transformers.__version__} into "
            f"ONNX ({type(cause).__name__}: {' '.join(str(cause).split())[:200]}). Use newer versions of both, or "
            "export without onnx=True"
        ) from error
    finally:
        exporter.setLevel(level)


def _check(network: nn.Module, batch: tuple[Tensor, ...], file: Path) -> None:
    """Compare the logits of onnxruntime with those of the model, for another batch than the one that was traced.

    Raises:
        ConfigurationError: they differ.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    found = session.run([_OUTPUT], {name: given.numpy() for name, given in zip(_INPUTS, batch, strict=True)})[0]
    with torch.inference_mode():
        expected = network(*batch).numpy()
    read = batch[1].bool().numpy() if expected.ndim == 3 else slice(None)  # not the tokens of padding
    most = float(np.abs(found[read] - expected[read]).max()) if found.shape == expected.shape else float("inf")
    if not most <= _TOLERANCE * max(1.0, float(np.abs(expected[read]).max())):
        raise ConfigurationError(
            f"the logits of onnxruntime {onnxruntime.__version__} differ from those of the model by {most:.2g}: "
            f"expected at most {_TOLERANCE}. Use other versions of torch, onnxscript or onnxruntime, or export "
            "without onnx=True"
        )
