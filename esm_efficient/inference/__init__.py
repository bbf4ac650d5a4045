"""Predict from sequences with a fine-tuned model, with the label names of its training."""

from esm_efficient.inference.embedder import Embedder, embed_file
from esm_efficient.inference.files import FileResult
from esm_efficient.inference.predictions import predict_file
from esm_efficient.inference.predictor import Prediction, Predictor
from esm_efficient.inference.requests import Query, RequestLimits, read_request
from esm_efficient.inference.windows import Windows

__all__ = [
    "Embedder",
    "FileResult",
    "Prediction",
    "Predictor",
    "Query",
    "RequestLimits",
    "Windows",
    "embed_file",
    "predict_file",
    "read_request",
]
