"""The handler of SageMaker's Hugging Face serving container: proteins in, predictions with the label names out.

It lies in ``code/`` beside the model, with the library. The request is JSON (``{"inputs": "MKT..."}`` or a list), CSV
or FASTA, as ``esm_efficient.inference.read_request`` has it; the response is a JSON list with one entry a sequence.
Limits are set with the endpoint's variables ``ESM_EFFICIENT_MAX_SEQUENCES`` and ``ESM_EFFICIENT_MAX_TOKENS`` (tokens).
"""

from __future__ import annotations

import json
import os
from typing import Any

from esm_efficient import Predictor, RequestError
from esm_efficient.inference import Query, RequestLimits, read_request

MAX_TOKENS = int(os.environ.get("ESM_EFFICIENT_MAX_TOKENS", 1024))
LIMITS = RequestLimits(
    sequences=int(os.environ.get("ESM_EFFICIENT_MAX_SEQUENCES", RequestLimits.sequences)), residues=MAX_TOKENS - 2
)


def model_fn(model_dir: str, context: Any = None) -> Predictor:
    """Load the model; safetensors alone, nothing is unpickled."""
    return Predictor.load(model_dir, max_tokens=MAX_TOKENS)


def input_fn(body: bytes | str, content_type: str | None, context: Any = None) -> list[Query]:
    """The sequences of a request; `RequestError` says what is wrong with it."""
    return read_request(body, content_type, LIMITS)


def predict_fn(queries: list[Query], predictor: Predictor, context: Any = None) -> list[dict[str, Any]]:
    """A prediction for each sequence, in their order."""
    predictions = predictor.predict([query.sequence for query in queries])
    return [{"name": q.name, **p.to_dict()} for q, p in zip(queries, predictions, strict=True)]


def output_fn(predictions: list[dict[str, Any]], accept: str | None, context: Any = None) -> str:
    """The response."""
    wanted = {part.partition(";")[0].strip().lower() for part in (accept or "*/*").split(",")}
    if not wanted & {"", "*/*", "application/*", "application/json"}:
        raise RequestError(f"accept {(accept or '')[:80]!r}: answers are application/json", status=406)
    return json.dumps(predictions)
