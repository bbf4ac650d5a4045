"""The lean encoder: the exact ESM-2 encoder without padding and with fewer saved activations."""

from esm_efficient.encoder.apply import (
    apply_lean_encoder,
    apply_lean_encoder_if_supported,
    has_lean_encoder,
    remove_lean_encoder,
)

__all__ = ["apply_lean_encoder", "apply_lean_encoder_if_supported", "has_lean_encoder", "remove_lean_encoder"]
