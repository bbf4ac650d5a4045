"""Predicted costs of training, with no GPU and no weights."""
