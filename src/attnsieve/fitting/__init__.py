"""Fitting: from a Profile, or from measured candidates and a budget, to a Plan; on the CPU, in seconds."""

from attnsieve.fitting.budget import fit_budget
from attnsieve.fitting.candidates import default_candidates
from attnsieve.fitting.choose import fit
from attnsieve.fitting.settings import PRESETS, Settings
from attnsieve.fitting.stability import stability

__all__ = ["PRESETS", "Settings", "default_candidates", "fit", "fit_budget", "stability"]
