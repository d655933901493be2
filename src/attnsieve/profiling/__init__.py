"""Profiling: what a frozen model attends to, reduced while it runs.

    capture = Capture(fingerprint, pcl=512, lengths=(2048,))         # UserError if the sums cannot fit in memory
    for batch in batches:
        for layer in ...:                                            # from inside the model's attention function
            capture.add(layer, q, k, scale=scale, spans=spans, window=None)
    profile = capture.finish({"data": "...", "documents": 64})       # UserError if a layer or a row was never seen

q [B, Hq, T, D] and k [B, Hkv, T, D] after RoPE, T slots of a plain forward without a cache, any floating dtype and device.
spans: (batch row, first slot, tokens) of every document in the batch; slots outside are padding and never read. scale: what
the model multiplies q.k by. window: a sliding layer's own width (keys i - window < j <= i), else None. A document of at
least n tokens also adds to the statistics of length n; rows beyond the longest such n are not computed.
"""

from attnsieve.profiling.capture import Capture
from attnsieve.profiling.measurement import Measurement
from attnsieve.profiling.memory import available_memory, estimate_memory
from attnsieve.profiling.profile import LongStatistics, Profile
from attnsieve.profiling.stability import Stability

__all__ = [
    "Capture",
    "LongStatistics",
    "Measurement",
    "Profile",
    "Stability",
    "available_memory",
    "estimate_memory",
]
