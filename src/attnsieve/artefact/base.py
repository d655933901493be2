"""How profiles, plans and measurements are saved, loaded and pushed: directories of config.json + model.safetensors + README.md."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from safetensors.numpy import save_file
from torch import Tensor

from attnsieve.artefact.strict import CONFIG, TENSORS, Expected, check_header, digest, read_config, read_tensors
from attnsieve.errors import UserError, require

CARD = "README.md"
CARD_HEAD = "---\nlibrary_name: attnsieve\n"


class Artefact(ModelHubMixin):
    """Base of Profile, Plan and Measurement: how they are saved, loaded and pushed.

    A subclass names its `kind` and its `format_version` and implements the four methods below. The inherited
    `push_to_hub(repo_id)` uploads what `save_pretrained` writes.
    """

    kind: ClassVar[str]
    format_version: ClassVar[int] = 1
    # Set here, the mixin neither records constructor arguments nor sets attributes on frozen instances.
    _hub_mixin_config = {}  # noqa: RUF012

    def to_config(self) -> dict[str, Any]:
        """JSON fields of config.json, without kind, version and digest."""
        raise NotImplementedError

    def to_tensors(self) -> dict[str, Tensor]:
        """Contents of model.safetensors."""
        raise NotImplementedError

    @classmethod
    def expected(cls, config: dict[str, Any]) -> dict[str, Expected]:
        """The tensors that belong to `config`, which may hold anything: raises UserError unless it is sound."""
        raise NotImplementedError

    @classmethod
    def build(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        """The artefact of a config and tensors that passed `expected`. Raises UserError for contents that do not fit."""
        raise NotImplementedError

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Artefact) or type(self) is not type(other) or self.to_config() != other.to_config():
            return False
        mine, theirs = self.to_tensors(), other.to_tensors()
        return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{str(self).splitlines()[0]}>"

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, *, config: None = None, model_card_kwargs: None = None
    ) -> None:
        """Write config.json, model.safetensors and README.md into `save_directory`, each replaced in one step.

        A reader that comes between two replacements finds a digest that does not match, never a mixture. The mixin's own
        method is not used because it deletes the old config.json first; its `push_to_hub` passes config and
        model_card_kwargs, which have no meaning here. Raises UserError where nothing can be written, and where a model, an
        artefact of another kind or a README.md of somebody else's would be replaced.
        """
        require(not config and not model_card_kwargs, "config and model_card_kwargs do not apply: config.json is the artefact")
        target = _path(save_directory)
        self.check_target(target)
        try:
            target.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as temporary:
                self._write(Path(temporary))
                for name in (CARD, TENSORS, CONFIG):
                    os.replace(Path(temporary) / name, target / name)
        except OSError as error:
            raise UserError(f"cannot save the {self.kind} in {target}: {error.strerror or error}") from error

    @classmethod
    def check_target(cls, folder: Path) -> None:
        """Raise UserError where `folder` holds a model, whose files have the same names, an artefact of another kind, or a README.md of
        somebody else's."""
        config, tensors, card = folder / CONFIG, folder / TENSORS, folder / CARD
        if config.exists() or tensors.exists():
            kind = read_config(config).get("kind") if config.is_file() else None
            held = f"{kind!r:.80}" if kind else "a model"
            require(
                kind == f"attnsieve {cls.kind}",
                f"{folder} holds {held}, which this {cls.kind} would replace: choose another directory",
            )
        elif card.exists():
            # A save that was cut short leaves its card alone.
            require(
                card.is_file() and card.read_bytes().startswith(CARD_HEAD.encode()),
                f"{folder} holds a {CARD}, which this {cls.kind} would replace: choose another directory",
            )

    def _write(self, folder: Path) -> None:
        # Through numpy, since torch's writer refuses tensors that share memory. Neither respects strides.
        save_file({name: tensor.contiguous().cpu().numpy() for name, tensor in self.to_tensors().items()}, folder / TENSORS)
        config = {"kind": f"attnsieve {self.kind}", "format_version": self.format_version} | self.to_config()
        config["digest"] = digest(config, folder / TENSORS)
        (folder / CONFIG).write_text(json.dumps(config, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        (folder / CARD).write_text(self.card(), encoding="utf-8")

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Load from a directory or, if there is none of that name, from the hub repository `source`.

        Raises UserError for anything but a complete, unchanged artefact of this kind and a known version. The mixin's own
        method is not used because it reads config.json leniently and passes its contents on as arguments.
        """
        folder = _path(source)
        if not folder.is_dir():
            options = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
            folder = _download(str(source), **options)
        config = read_config(folder / CONFIG)
        kind, version = config.pop("kind", None), config.pop("format_version", None)
        held = "nothing that attnsieve saves" if kind is None else f"{kind!r:.80}"
        require(kind == f"attnsieve {cls.kind}", f"{folder} holds {held}, expected a saved {cls.kind}: check the path")
        require(
            type(version) is int and 1 <= version <= cls.format_version,
            f"{folder} has {cls.kind} format {version!r:.40}, this version of attnsieve reads 1 to {cls.format_version}: "
            "upgrade attnsieve",
        )
        recorded = config.pop("digest", None)
        expected = cls.expected(config)
        check_header(folder / TENSORS, expected)
        actual = digest({"kind": kind, "format_version": version} | config, folder / TENSORS)
        require(
            recorded == actual,
            f"{folder} was changed after it was written (its digest does not match): save the {cls.kind} again",
        )
        return cls.build(config, read_tensors(folder / TENSORS, expected))

    def card(self) -> str:
        """The model card, README.md."""
        head = f"{CARD_HEAD}tags: [attnsieve, {self.kind}]\n---\n"
        return f"{head}\n# attnsieve {self.kind}\n\n```\n{self}\n```\n"


def _path(given: Any) -> Path:
    """`given` as a path. The empty string would be the current folder."""
    good = isinstance(given, str | os.PathLike) and os.fspath(given) != ""
    require(
        good, f"expected the path of a directory, or a hub id to load from, got {given!r:.80}: for the current folder give '.'"
    )
    return Path(given)


def _download(repo: str, **options: Any) -> Path:
    try:
        return Path(snapshot_download(repo, allow_patterns=[CONFIG, TENSORS], **options))
    except (OSError, ValueError) as error:  # the hub's errors, network included, derive from these
        raise UserError(
            f"{repo!r} is neither a directory nor a hub repository that can be reached: {type(error).__name__}"
        ) from None
