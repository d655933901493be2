"""Ragged KV storage for static patterns: every KV head keeps just the keys that later rows can still read."""

from attnsieve.ragged.kept import Kept
from attnsieve.ragged.store import RaggedStore

__all__ = ["Kept", "RaggedStore"]
