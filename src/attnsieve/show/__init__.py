"""Figures and reports of profiles, plans and result rows. matplotlib is imported when a figure is drawn, not before.

save(head_figure([head_view(3, 5, profile=profile, plan=plan)]), "layer3-head5.png")
save(density_grid(plan.density), "density.svg")
print(plan_text(plan), result_table(rows))
draw_all("figures/", profile=profile, plan=plan)           # the usual ones
write_report("report.html", profile=profile, plan=plan)    # one page, interactive, without a network
"""

from attnsieve.show.canvas import save
from attnsieve.show.gallery import draw_all, draw_measurement, draw_results, draw_stability
from attnsieve.show.grids import density_grid, mass_grid
from attnsieve.show.heads import head_figure
from attnsieve.show.kinds import kind_map
from attnsieve.show.lengths import length_figure, measurement_text
from attnsieve.show.masks import mask_gallery
from attnsieve.show.report import write_report
from attnsieve.show.results import result_figure, result_table
from attnsieve.show.stability import stability_figure, stability_summary, stability_text
from attnsieve.show.summary import plan_summary, plan_text, profile_summary, profile_text
from attnsieve.show.tables import markdown, percent
from attnsieve.show.views import HeadView, head_view, parse_heads, spread_heads, typical_heads

__all__ = [
    "HeadView",
    "density_grid",
    "draw_all",
    "draw_measurement",
    "draw_results",
    "draw_stability",
    "head_figure",
    "head_view",
    "kind_map",
    "length_figure",
    "markdown",
    "mask_gallery",
    "mass_grid",
    "measurement_text",
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
    "stability_figure",
    "stability_summary",
    "stability_text",
    "typical_heads",
    "write_report",
]
