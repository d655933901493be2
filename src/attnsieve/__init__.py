"""attnsieve: attention that computes only the entries that matter.

profile = attnsieve.profile(model, batches)      # observe
plan = attnsieve.fit(profile, preset="robust")   # choose, per layer and head
with attnsieve.apply(model, plan):               # run sparse
    model.generate(**inputs)
"""

from importlib import import_module
from typing import Any

from attnsieve.attention import attend
from attnsieve.errors import UserError
from attnsieve.layout import Layout, compile_layout
from attnsieve.patterns import Pattern
from attnsieve.spans import Spans

# Loaded on first use: these rooms import transformers or read artefacts, and importing the package has no effects.
_LAZY = {
    "Plan": "attnsieve.plan",
    "Profile": "attnsieve.profiling",
    "apply": "attnsieve.hf",
    "fit": "attnsieve.fitting",
    "profile": "attnsieve.hf",
}

__version__ = "0.1.0"
__all__ = ["Layout", "Pattern", "Spans", "UserError", "attend", "compile_layout", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'attnsieve' has no attribute {name!r}")
