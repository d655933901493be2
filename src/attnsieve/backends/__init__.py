"""Backends of `attend`: the same exact mask, computed in different ways."""
