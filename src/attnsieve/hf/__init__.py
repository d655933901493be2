"""The transformers adapter: apply a plan to a model, profile a model."""

from attnsieve.hf.adapter import Handle, apply
from attnsieve.hf.capture import profile
from attnsieve.hf.geometry import fingerprint
from attnsieve.hf.report import LayerReport, Report

__all__ = ["Handle", "LayerReport", "Report", "apply", "fingerprint", "profile"]
