"""Predict from sequences with a fine-tuned model, with the label names of its training."""

from esm_efficient.inference.predictor import Prediction, Predictor
from esm_efficient.inference.requests import Query, RequestLimits, read_request

__all__ = ["Prediction", "Predictor", "Query", "RequestLimits", "read_request"]
