"""Which weights a model has: what tells two trainings of one architecture apart in result rows."""

from __future__ import annotations

from hashlib import sha256

from torch import nn

# Of every parameter, spread over it: training changes them all.
SAMPLES = 64


def weights_digest(model: nn.Module) -> str:
    """8 hex digits over the names of all parameters and some of their values, which do not depend on the device."""
    total = sha256()
    for name, weight in model.named_parameters():
        total.update(name.encode())
        if not weight.is_meta:
            some = weight.detach().flatten()[:: max(1, weight.numel() // SAMPLES)][:SAMPLES]
            total.update(some.float().cpu().numpy().tobytes())
    return total.hexdigest()[:8]
