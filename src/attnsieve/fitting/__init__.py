"""Fitting: from a Profile to a Plan, on the CPU, in seconds."""

from attnsieve.fitting.choose import fit
from attnsieve.fitting.settings import PRESETS, Settings

__all__ = ["PRESETS", "Settings", "fit"]
