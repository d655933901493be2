"""Portable backend: plain torch on any device, in time proportional to the kept keys, forward and backward."""

from attnsieve.backends.portable.function import run, why_not

__all__ = ["run", "why_not"]
