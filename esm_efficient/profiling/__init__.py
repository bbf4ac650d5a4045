"""Costs of training, measured while it runs."""
