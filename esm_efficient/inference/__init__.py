"""A fine-tuned model and sequences in, predictions with the training's own label names out."""

from esm_efficient.inference.predictor import Prediction, Predictor
from esm_efficient.inference.requests import Query, RequestLimits, read_request

__all__ = ["Prediction", "Predictor", "Query", "RequestLimits", "read_request"]
