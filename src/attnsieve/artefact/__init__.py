"""Artefacts: directories of config.json + model.safetensors + README.md, written atomically and read strictly."""

from attnsieve.artefact.base import Artefact
from attnsieve.artefact.strict import CONFIG, Expected, plain_json, read_config

__all__ = ["CONFIG", "Artefact", "Expected", "plain_json", "read_config"]
