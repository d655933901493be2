"""Figures: what is drawn is what was given, every label is readable, and no global state is left behind."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread
from matplotlib.text import Text

from attnsieve.dam import transform
from attnsieve.errors import UserError
from attnsieve.fingerprint import Fingerprint
from attnsieve.patterns import Captured, Pattern
from attnsieve.plan import Plan
from attnsieve.profiling import Measurement, Profile, Stability
from attnsieve.show import (
    density_grid,
    draw_all,
    draw_results,
    head_figure,
    head_view,
    kind_map,
    length_figure,
    mask_gallery,
    mass_grid,
    result_figure,
    result_table,
    save,
    stability_figure,
    stability_text,
)
from attnsieve.show.heads import PIXELS, _cells
from attnsieve.show.lengths import plan_by_length
from attnsieve.show.results import family
from attnsieve.show.views import HeadView

MODEL = Fingerprint("llama", 3, 4, 2, 16, "0" * 16)
L = 16


def random_profile() -> Profile:
    maps = torch.rand(3, 4, L, L).add(0.01).tril()
    maps /= maps.sum(-1, keepdim=True)
    return Profile(MODEL, L, maps, torch.full((L,), 2))


def random_plan() -> Plan:
    def rule() -> Pattern:
        mask = (torch.rand(L, L) < 0.3).tril()
        mask[0, 0] = True
        return Pattern.of(Captured.from_mask(mask)) | Pattern.parse(f"columns(0, start={L}) | diagonals(0, 2, start={L})")

    rows = [[rule() for _ in range(3)] + [Pattern.parse("dense()")] for _ in range(3)]
    return Plan(MODEL, rows, {"settings": {"tau": 0.2}}, torch.rand(3, 4), torch.rand(3, 4))


def result_rows() -> list[dict]:
    plans = {"paper": 0.03, "sink(4) | window(256)": 0.4, "a plan with a name that is far too long " * 3: 0.2, "dense": 1.0}
    return [
        {
            "task": task,
            "variant": "",
            "length": length,
            "items": 8,
            "metric": metric,
            "plan": plan,
            "density": density,
            "value": density,
            "stderr": 0.05,
            "dense_value": None if plan == "dense" else 0.9,
            "paired_difference": None if plan == "dense" else density - 0.9,
            "paired_stderr": None if plan == "dense" else 0.02,
        }
        for task, length, metric in itertools.product(["kv", "needle-multiquery"], [1024, 2048], ["exact_match", "answer_nll"])
        for plan, density in plans.items()
    ]


def shown_texts(figure) -> list[tuple[str, object]]:
    """(text, bounding box) of everything written, after layout."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    found = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    shown = {id(text): text for text in found if text.axes is None or text.axes.axison}
    for axes in figure.axes:
        for label in (*labels_out_of_view(axes.xaxis), *labels_out_of_view(axes.yaxis)):
            shown.pop(id(label), None)
    return [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in shown.values()]


def labels_out_of_view(axis) -> list[Text]:
    """Labels of ticks beyond the limits of an axis, which matplotlib before 3.11 keeps and does not draw."""
    low, high = sorted(axis.get_view_interval())
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    return [label for tick in ticks if not low <= tick.get_loc() <= high for label in (tick.label1, tick.label2)]


def assert_labels_are_readable(figure) -> None:
    """Every text lies inside the figure, and no two texts overlap."""
    boxes = shown_texts(figure)
    width, height = figure.canvas.get_width_height()
    slack = 3
    for text, box in boxes:
        inside = -slack <= box.x0 and box.x1 <= width + slack and -slack <= box.y0 and box.y1 <= height + slack
        assert inside, f"{text!r} leaves the figure"
    # Titles of panels begin with empty lines, into which the name of the head is written.
    solid = [(text, box) for text, box in boxes if not text.startswith("\n")]
    for (one, first), (other, second) in itertools.combinations(solid, 2):
        apart = (
            min(first.x1, second.x1) - max(first.x0, second.x0) < 1 or min(first.y1, second.y1) - max(first.y0, second.y0) < 1
        )
        assert apart, f"{one!r} and {other!r} overlap"
    assert len(solid) > 4


def test_labels_are_readable():
    plan, profile = random_plan(), random_profile()
    views = [head_view(layer, 0, profile=profile, plan=plan) for layer in range(3)]
    for figure in (
        head_figure(views),
        head_figure([head_view(0, 1, plan=plan)]),
        head_figure([HeadView("W" * 30, torch.eye(L)), HeadView("many words in a name " * 9, torch.eye(L))]),
        head_figure([head_view(2, 3, profile=profile)]),
        density_grid(plan.density),
        mass_grid(torch.rand(36, 32)),
        mass_grid(torch.rand(1, 1)),
        result_figure(result_rows(), "exact_match"),
    ):
        assert_labels_are_readable(figure)


def test_the_head_figure_shows_what_it_was_given():
    profile, plan = random_profile(), random_plan()
    figure = head_figure([head_view(1, 2, profile=profile, plan=plan)], lam=0.3, tau=0.2)
    mean, boxcox, mask, extended = (axes.images[0].get_array() for axes in figure.axes[:4])
    below = np.tril(np.ones((L, L), dtype=bool))
    for drawn, expected in (
        (mean, profile.maps[1, 2]),
        (boxcox, transform(profile.maps[1, 2], 0.3, 1e-10)),
        (mask, plan.row(1)[2].atoms[0].mask()),
    ):
        assert np.array_equal(drawn.mask, ~below)
        np.testing.assert_allclose(drawn.data[below], expected.float().numpy()[below], rtol=1e-6)
    assert extended.shape == (2 * L, 2 * L)
    assert extended[L:, 0].all()
    assert "layer 1, head 2" in "".join(text for text, _ in shown_texts(figure))


def test_maps_too_large_for_a_panel_are_averaged_over_causal_pairs():
    size = 2 * PIXELS + 3
    cells = _cells(torch.ones(size, size).tril())
    assert cells.shape[0] <= PIXELS
    np.testing.assert_allclose(cells.compressed(), 1.0)
    diagonal = _cells(torch.eye(size))
    assert diagonal.diagonal().min() > 0
    assert diagonal.sum() == diagonal.diagonal().sum()


def test_a_head_without_maps_leaves_its_panel_empty():
    figure = head_figure([HeadView("a", torch.eye(L)), HeadView("b", None, torch.eye(L), torch.eye(2 * L))])
    assert [len(axes.images) for axes in figure.axes[:8]] == [1, 1, 0, 0, 0, 0, 1, 1]
    with pytest.raises(UserError, match="nothing to draw"):
        head_figure([HeadView("a")])
    with pytest.raises(UserError, match="1 to 12 heads, got 0"):
        head_figure([])


def test_grids_print_percent_where_there_is_room():
    share = torch.tensor([[0.004, 0.07], [0.5, 1.0], [0.0, 0.099]])
    texts = [text.get_text() for text in density_grid(share).axes[0].texts]
    assert texts == ["0.4", "7.0", "50", "100", "0", "9.9"]
    assert not density_grid(torch.rand(40, 40)).axes[0].texts
    with pytest.raises(UserError, match=r"\[layers, heads\], got shape \(3,\)"):
        density_grid(torch.rand(3))


def test_result_figures_put_plans_at_their_density():
    rows = [row for row in result_rows() if row["task"] == "kv" and row["length"] == 1024]
    (axes,) = result_figure(rows, "exact_match").axes
    dense, *marks = [line for line in axes.lines if line.get_marker() != "_"]
    assert dense.get_ydata()[0] == 1.0
    assert [(mark.get_xdata()[0], mark.get_ydata()[0]) for mark in marks] == [(3.0, 0.03), (40.0, 0.4), (20.0, 0.2)]
    assert len({(mark.get_color(), mark.get_marker()) for mark in marks}) == 3
    with pytest.raises(UserError, match="the rows have: answer_nll, exact_match"):
        result_figure(rows, "f1")


def test_files_are_written_in_the_format_of_their_name(tmp_path):
    figure = mass_grid(torch.rand(2, 2))
    assert imread(save(figure, tmp_path / "deep" / "a.png")).ndim == 3
    assert "<svg" in save(figure, tmp_path / "a.svg").read_text()[:500]
    with pytest.raises(UserError, match=r"saved as \.png, \.svg, \.pdf, got 'a\.bmp'"):
        save(figure, tmp_path / "a.bmp")


def test_the_usual_figures(tmp_path):
    profile, plan = random_profile(), random_plan()
    names = lambda paths: [path.name for path in paths if path.stat().st_size > 5000]  # noqa: E731
    every = ["heads.png", "masks.png", "kinds.png", "density.png", "retained.png"]
    assert names(draw_all(tmp_path, profile=profile, plan=plan, heads=[(0, 0)])) == every
    assert names(draw_all(tmp_path, profile=profile, heads=[(0, 0)])) == ["heads.png"]
    assert names(draw_all(tmp_path, plan=Plan.uniform(Fingerprint("llama", 1, 2, 2, 8, "0"), "sink(4) | window(8)"))) == [
        "heads.png",
        "masks.png",
        "kinds.png",
    ]
    # As budgets with guard rails make them: nothing of a head has a mask of its own.
    chosen = Plan.uniform(Fingerprint("llama", 1, 2, 2, 8, "0"), "sink(4) | window(8) | last_queries(32) | dense_decode()")
    assert names(draw_all(tmp_path, plan=chosen)) == ["masks.png", "kinds.png"]
    with pytest.raises(UserError, match="nothing to draw of these heads: keys chosen from the input"):
        draw_all(tmp_path, plan=chosen, heads=[(0, 1)])
    assert names(draw_results(tmp_path, result_rows()[:8])) == ["answer_nll.png", "exact_match.png"]


def test_rows_of_several_models_and_many_tasks_are_drawn_apart(tmp_path):
    rows = [{**row, "metric": "kl", "model": "one", "dtype": "float32"} for row in result_rows()[:4]]
    many = [{**row, "task": f"task {n}"} for row in rows for n in range(25)]
    drawn = [path.name for path in draw_results(tmp_path, [*many, *({**row, "model": "two"} for row in rows)])]
    assert drawn == ["kl-one.png", "kl-one-2.png", "kl-two.png"]
    named = [{**row, "model": name} for row in rows for name in ("org/one", "../../two")]
    assert {path.relative_to(tmp_path).name for path in draw_results(tmp_path, named)} == {"kl-org-one.png", "kl-..-..-two.png"}
    assert {path.parent for path in draw_results(tmp_path, named)} == {tmp_path}
    text = result_table([*rows, *({**row, "dtype": "bfloat16"} for row in rows)])
    assert text.count(" bfloat16 ") == text.count(" float32 ") == 4
    assert " one " not in text


def test_drawing_does_not_touch_pyplot():
    code = (
        "import sys, torch; from attnsieve.show import mass_grid; assert 'matplotlib' not in sys.modules;"
        "mass_grid(torch.rand(2, 2)); assert 'matplotlib' in sys.modules; assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def measured(candidates=("sink(4) | window(32)", "sink(4) | vertical_slash(mass=0.9)", "dense()")) -> Measurement:
    shape = (2, len(candidates), 3, 4)
    texts = tuple(str(Pattern.parse(text)) for text in candidates)
    return Measurement(MODEL, texts, (512, 1024), torch.rand(shape), torch.rand(shape), torch.rand(shape))


def stable() -> Stability:
    shape = (3, 3, 3, 4)
    return Stability(MODEL, ("a", "b", "c"), 1024, torch.rand(shape), torch.rand(shape), torch.rand(3, 3, 4))


def test_the_gallery_shows_every_mask():
    rules = ["dense()", "sink(16) | window(16)", "window(16) | top_blocks(2)", "columns(0)"]
    plan = Plan(MODEL, [[*map(Pattern.parse, rules)], *random_plan().patterns[1:]])
    figure = mask_gallery(plan, 48)
    assert_labels_are_readable(figure)
    sheet = np.asarray(figure.axes[0].images[0].get_array())
    assert sheet.shape == (3 * 48 + 2 * 5, 4 * 48 + 3 * 5, 3)
    below = np.tril(np.ones((48, 48), dtype=bool))
    position = torch.arange(48)
    for head, text in enumerate(rules):
        picture = sheet[:48, head * 53 : head * 53 + 48]
        static = Pattern.of(*(atom for atom in Pattern.parse(text) if not atom.dynamic))
        kept = static.keep(position[:, None], position[None, :]).numpy()
        dark = picture.sum(-1) < 1.5
        assert np.array_equal(dark & below, kept)
        assert np.allclose(picture[~below], 0xE9 / 255, atol=1e-3)
    assert mask_gallery(Plan.uniform(MODEL, "window(3)")).axes[0].get_title() == "masks, 512 tokens"


def test_kinds_are_told_apart():
    plan = random_plan()
    rules = ["dense()", "sink(4) | window(8)", "window(3) | top_blocks(2)", "dilated(4, step=2)"]
    mixed = Plan(MODEL, [[*map(Pattern.parse, rules)], *plan.patterns[1:]])
    figure = kind_map(mixed)
    assert_labels_are_readable(figure)
    assert [text.get_text() for text in figure.axes[0].texts][:5] == ["d", "s", "i", "p", "D"]
    written = [text for text, _ in shown_texts(figure)]
    assert "D  DAM: 6 heads" in written
    assert "d  dense: 3 heads" in written
    rails = "last_queries(8) | dense_decode()"
    railed = kind_map(Plan(MODEL, [[Pattern.parse(f"{rule} | {rails}") for rule in rules], *plan.patterns[1:]]))
    assert [text.get_text() for text in railed.axes[0].texts][1:4] == ["s", "i", "p"]


def test_retained_mass_by_length_is_that_of_the_heads_own_rules():
    measurement = measured()
    choice = torch.randint(0, 3, (3, 4))
    plan = Plan(MODEL, [[Pattern.parse(measurement.candidates[c]) for c in row] for row in choice.tolist()])
    kept = plan_by_length(measurement, plan)
    for layer, head in itertools.product(range(3), range(4)):
        assert torch.equal(kept[:, layer, head], measurement.retained[:, choice[layer, head], layer, head])
    figure = length_figure(measurement, plan)
    assert_labels_are_readable(figure)
    np.testing.assert_allclose(figure.axes[0].lines[-1].get_ydata(), kept.mean((1, 2)))
    assert_labels_are_readable(length_figure(measured(tuple(f"window({w})" for w in range(1, 30)))))
    with pytest.raises(UserError, match="does not know the plan's rule"):
        length_figure(measurement, Plan.uniform(MODEL, "window(7)"))


def test_stability_is_drawn_and_told():
    found = stable()
    figure = stability_figure(found)
    assert_labels_are_readable(figure)
    np.testing.assert_array_equal(figure.axes[1].images[0].get_array(), found.worst())
    found.retained[:, :, 1], found.density[:] = 1.0, 0.2
    text = stability_text(found)
    assert "can serve 4 of 12 heads" in text
    (line,) = [line for line in text.splitlines() if line.startswith("|     1 |")]
    assert "4/4" in line


def test_plans_of_a_family_are_joined():
    rows = [
        row | {"plan": f"budget-{density}", "density": density} for row in result_rows()[:1] for density in (0.5, 0.1, 0.25)
    ]
    (axes,) = result_figure(rows, "exact_match").axes
    curves = [line for line in axes.lines if line.get_marker() != "_"]
    assert [line.get_xdata().tolist() for line in curves] == [[10.0, 25.0, 50.0]]
    assert family("budget-0.25") == family("budget-.1") == "budget"
    assert family("streaming-llm") == "streaming-llm"
    assert family("sink(4) | window(256)") == "sink(4) | window(256)"
