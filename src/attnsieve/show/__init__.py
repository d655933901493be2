"""Figures and reports of profiles, plans and result rows. matplotlib is imported when a figure is drawn, not before.

save(head_figure([head_view(3, 5, profile=profile, plan=plan)]), "layer3-head5.png")
save(density_grid(plan.density), "density.svg")
print(plan_text(plan), result_table(rows))
draw_all("figures/", profile=profile, plan=plan)           # the usual ones
"""

from attnsieve.show.canvas import save
from attnsieve.show.gallery import draw_all, draw_results
from attnsieve.show.grids import density_grid, mass_grid
from attnsieve.show.heads import head_figure
from attnsieve.show.results import result_figure, result_table
from attnsieve.show.summary import plan_summary, plan_text, profile_summary, profile_text
from attnsieve.show.tables import markdown, percent
from attnsieve.show.views import HeadView, head_view, parse_heads, spread_heads, typical_heads

__all__ = [
    "HeadView",
    "density_grid",
    "draw_all",
    "draw_results",
    "head_figure",
    "head_view",
    "markdown",
    "mass_grid",
    "parse_heads",
    "percent",
    "plan_summary",
    "plan_text",
    "profile_summary",
    "profile_text",
    "result_figure",
    "result_table",
    "save",
    "spread_heads",
    "typical_heads",
]
