"""The transformers adapter: load a model, profile it, measure candidates on it, apply a plan to it."""

from attnsieve.hf.adapter import Handle, apply
from attnsieve.hf.cache import SparseCache
from attnsieve.hf.capture import profile
from attnsieve.hf.geometry import check_positions, fingerprint, longest_text
from attnsieve.hf.loading import load_model
from attnsieve.hf.measure import measure
from attnsieve.hf.report import CacheReport, LayerReport, Report

__all__ = [
    "CacheReport",
    "Handle",
    "LayerReport",
    "Report",
    "SparseCache",
    "apply",
    "check_positions",
    "fingerprint",
    "load_model",
    "longest_text",
    "measure",
    "profile",
]
