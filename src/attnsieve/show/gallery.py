"""The usual figures of a profile, a plan or result rows, written into a folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from attnsieve.errors import require
from attnsieve.plan import Plan
from attnsieve.profiling import Measurement, Profile, Stability
from attnsieve.show.canvas import save
from attnsieve.show.grids import density_grid, mass_grid
from attnsieve.show.heads import head_figure
from attnsieve.show.kinds import kind_map
from attnsieve.show.lengths import length_figure
from attnsieve.show.masks import mask_gallery
from attnsieve.show.results import Row, by_source, pages, result_figure
from attnsieve.show.stability import stability_figure
from attnsieve.show.views import amplification, head_view, spread_heads, typical_heads


def draw_all(
    folder: str | Path,
    *,
    profile: Profile | None = None,
    plan: Plan | None = None,
    heads: Sequence[tuple[int, int]] | None = None,
) -> list[Path]:
    """heads.png, of a plan masks.png and kinds.png too and, as far as it knows them, density.png and retained.png in `folder`.

    Returns the paths that were written. heads: (layer, head) pairs, by default four typical ones; where those of a plan all choose
    their keys from the input, there is no heads.png. Raises UserError for heads that do not exist, for a profile without maps
    that comes alone, and where of the heads that were asked for nothing can be drawn.
    """
    require(profile is not None or plan is not None, "figures are drawn from a profile, a plan, or both")
    shown = heads
    if shown is None:
        shown = typical_heads(plan) if plan is not None else spread_heads(profile.fingerprint)  # type: ignore[union-attr]
    views = [head_view(layer, head, profile=profile, plan=plan) for layer, head in shown]
    figures = {}
    if heads is not None or plan is None or not all(view.empty for view in views):
        figures["heads.png"] = head_figure(views, **amplification(plan))
    if plan is not None:
        figures["masks.png"] = mask_gallery(plan)
        figures["kinds.png"] = kind_map(plan)
    if plan is not None and plan.density is not None:
        figures["density.png"] = density_grid(plan.density, layers=plan.fingerprint.indices)
    if plan is not None and plan.retained is not None:
        figures["retained.png"] = mass_grid(plan.retained, layers=plan.fingerprint.indices)
    return [save(figure, Path(folder) / name) for name, figure in figures.items()]


def draw_results(folder: str | Path, rows: Sequence[Row]) -> list[Path]:
    """One figure per metric of the rows, METRIC.png in `folder`; the paths that were written.

    Rows of several models or dtypes get figures of their own, with these in their names, and numbers where one has no room.
    """
    written = []
    for source, own in by_source(rows).items():
        for metric in sorted({str(row["metric"]) for row in own}):
            for number, some in enumerate(pages([row for row in own if row["metric"] == metric]), 1):
                name = " ".join([metric, source, *([str(number)] if number > 1 else [])]).split()
                # Hub ids and folders have slashes.
                plain = re.sub(r"[^\w.=+-]+", "-", "-".join(name))
                written.append(save(result_figure(some, metric), Path(folder) / f"{plain}.png"))
    return written


def draw_measurement(folder: str | Path, measurement: Measurement, plan: Plan | None = None) -> list[Path]:
    """retained-by-length.png in `folder`, with the plan where it was fitted from this measurement; the paths that were written."""
    return [save(length_figure(measurement, plan), Path(folder) / "retained-by-length.png")]


def draw_stability(folder: str | Path, found: Stability) -> list[Path]:
    """stability.png in `folder`; the paths that were written."""
    return [save(stability_figure(found), Path(folder) / "stability.png")]
