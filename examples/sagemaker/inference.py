"""The handler of SageMaker's Hugging Face serving container: protein sequences in, named predictions out.

The file is in ``code/`` beside the model, together with the library. A request is JSON (``{"inputs": "MKT..."}``, or a
list of sequences as ``inputs``), CSV or FASTA; see ``esm_efficient.read_request``. The response is a JSON list with one
entry per sequence. The endpoint's variables ``ESM_EFFICIENT_MAX_SEQUENCES`` (sequences per request),
``ESM_EFFICIENT_MAX_RESIDUES`` (residues per request) and ``ESM_EFFICIENT_MAX_TOKENS`` (tokens per sequence; default: as
many as in training) set limits.
"""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

from esm_efficient import Predictor, Query, RequestError, RequestLimits, read_request
from esm_efficient.tasks import SPECIAL_TOKENS

limits = RequestLimits(
    sequences=int(os.environ.get("ESM_EFFICIENT_MAX_SEQUENCES", RequestLimits.sequences)),
    total_residues=int(os.environ.get("ESM_EFFICIENT_MAX_RESIDUES", RequestLimits.total_residues)),
)


def model_fn(model_dir: str, context: Any = None) -> Predictor:
    """Load the model, from safetensors files only: nothing is unpickled.

    The server starts a worker for each GPU, and tells it the number of its own. The model says how long a sequence of a
    request may be.
    """
    global limits
    gpu = None if context is None else context.system_properties.get("gpu_id")
    device = None if gpu is None else f"cuda:{gpu}"
    most = os.environ.get("ESM_EFFICIENT_MAX_TOKENS")
    predictor = Predictor.load(model_dir, max_tokens=None if most is None else int(most), device=device)
    limits = dataclasses.replace(limits, residues=predictor.max_tokens - SPECIAL_TOKENS)
    return predictor


def input_fn(body: bytes | str, content_type: str | None, context: Any = None) -> list[Query]:
    """Return the sequences of a request; raise `RequestError` for a wrong one."""
    return read_request(body, content_type, limits)


def predict_fn(queries: list[Query], predictor: Predictor, context: Any = None) -> list[dict[str, Any]]:
    """Return one prediction per sequence, in the same order."""
    predictions = predictor.predict([query.sequence for query in queries])
    return [{"name": q.name, **p.to_dict()} for q, p in zip(queries, predictions, strict=True)]


def output_fn(predictions: list[dict[str, Any]], accept: str | None, context: Any = None) -> str:
    """Return the response as JSON text."""
    accepted = {part.partition(";")[0].strip().lower() for part in (accept or "*/*").split(",")}
    if not accepted & {"", "*/*", "application/*", "application/json"}:
        raise RequestError(f"Accept is {(accept or '')[:80]!r}, but responses are application/json", status=406)
    return json.dumps(predictions)
