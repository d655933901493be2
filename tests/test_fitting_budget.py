"""Budgets: measured candidates against their definition, and allocations against brute force."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnsieve import Pattern, UserError
from attnsieve.fingerprint import Fingerprint
from attnsieve.fitting import Settings, default_candidates, fit_budget
from attnsieve.fitting.allocate import with_mass, within_density, within_error
from attnsieve.hf import fingerprint, measure
from attnsieve.profiling import Measurement
from attnsieve.selection import choose
from tests.hf_tiny import VOCAB, tiny

CANDIDATES = ["sink(1) | window(4)", "sink(2) | window(24)", "window(1) | top_blocks(1, block=8)"]


def tables(candidates, units, seed):
    """Random costs and losses where dearer candidates tend to be better, and the last is dense."""
    generator = torch.Generator().manual_seed(seed)
    density = torch.rand(candidates, units, generator=generator, dtype=torch.float64)
    error = (1 - density) * torch.rand(candidates, units, generator=generator, dtype=torch.float64)
    density[-1], error[-1] = 1.0, 0.0
    return density, error


def brute_force(cost, loss, budget):
    """The least total loss with a total cost within the budget."""
    units = range(cost.shape[1])
    found = [
        sum(float(loss[c, u]) for u, c in zip(units, choice, strict=True))
        for choice in itertools.product(range(cost.shape[0]), repeat=cost.shape[1])
        if sum(float(cost[c, u]) for u, c in zip(units, choice, strict=True)) <= budget * (1 + 1e-12)
    ]
    return min(found, default=None)


@given(st.integers(2, 4), st.integers(1, 5), st.integers(0, 10_000), st.floats(0.05, 1.0))
def test_density_budget_against_brute_force(candidates, units, seed, budget):
    density, error = tables(candidates, units, seed)
    best = brute_force(density, error, budget * units)
    if best is None:
        with pytest.raises(UserError, match="the least they reach"):
            within_density(density, error, budget)
        return
    found = within_density(density, error, budget)
    assert found.density <= budget * (1 + 1e-9)
    assert found.bound - 1e-9 <= best <= found.error + 1e-9
    # The gap of a price is at most one unit's exchange.
    assert found.error <= best + float((error.amax(0) - error.amin(0)).max()) + 1e-9


@given(st.integers(2, 4), st.integers(1, 5), st.integers(0, 10_000), st.floats(0.01, 2.0))
def test_error_budget_against_brute_force(candidates, units, seed, budget):
    density, error = tables(candidates, units, seed)
    found = within_error(density, error, budget)
    best = brute_force(error, density, budget) / units
    assert found.error <= budget * (1 + 1e-9)
    assert found.bound - 1e-9 <= best <= found.density + 1e-9


def test_many_heads_come_close_to_the_bound():
    density, error = tables(12, 300, 0)
    found = within_density(density, error, 0.2)
    assert 0.199 < found.density <= 0.2
    assert found.error <= found.bound * 1.01


def test_mass_takes_the_cheapest_that_is_enough():
    density = torch.tensor([[0.1, 0.1], [0.2, 0.3], [1.0, 1.0]], dtype=torch.float64)
    retained = torch.tensor([[0.95, 0.5], [0.99, 0.8], [1.0, 1.0]], dtype=torch.float64)
    assert with_mass(density, retained, 1 - retained, 0.9).choice.tolist() == [0, 2]
    with pytest.raises(UserError, match="that keeps"):
        with_mass(density[:2], retained[:2], 1 - retained[:2], 0.9)


@pytest.mark.parametrize("last", [None, 7])
def test_measure_equals_its_definition(last):
    model = tiny("llama", torch.float64)
    texts = [torch.randint(2, VOCAB, (40,)) for _ in range(2)]
    found = measure(model, texts, CANDIDATES, last=last, progress=False)
    assert found.candidates[-1] == "dense()"
    assert found.retained[:, -1].min() == pytest.approx(1)
    assert found.error[:, -1].max() == pytest.approx(0, abs=1e-20)
    maps = [model(text[None], output_attentions=True).attentions for text in texts]
    rows = torch.arange(40)
    for c, text in enumerate(CANDIDATES[:2]):
        keep = Pattern.parse(text).keep(rows[:, None], rows[None, :])
        for layer in range(2):
            kept = [(document[layer][0] * keep).sum(-1)[:, -(last or 40) :] for document in maps]
            expected = torch.stack(kept).mean((0, 2))
            torch.testing.assert_close(found.retained[0, c, layer], expected.float())
        assert found.density[0, c].unique().item() == pytest.approx(float(keep.sum() / (40 * 41 / 2)))
    assert (found.error[:, 0] > found.error[:, 1]).float().mean() > 0.8


def test_last_rows_are_compared_with_their_own_outputs():
    """Of a text whose last row alone a window of its length changes, the error is that row's."""
    text = torch.randint(2, VOCAB, (12,))
    model = tiny("llama", torch.float64)
    whole, one = (measure(model, [text], ["window(11)"], last=last, progress=False).error[0, 0] for last in (12, 1))
    assert bool((one > whole).all())
    assert bool((whole > 0).all())


def test_lengths_are_kept_apart_and_saved(tmp_path):
    texts = [torch.randint(2, VOCAB, (n,)) for n in (20, 33, 33)]
    found = measure(tiny(), texts, CANDIDATES, progress=False)
    assert found.lengths == (20, 33)
    assert found.provenance["documents"] == [1, 2]
    found.save_pretrained(tmp_path)
    assert Measurement.from_pretrained(tmp_path) == found


def test_plans_meet_their_budget():
    model = tiny()
    found = measure(model, [torch.randint(2, VOCAB, (48,))], CANDIDATES, progress=False)
    plan = fit_budget(found, density=0.4)
    plan.check(fingerprint(model))
    assert float(plan.density.mean()) <= 0.4 + 1e-6
    assert plan.provenance["expected"]["error_per_layer"] <= plan.provenance["uniform_error_per_layer"] + 1e-9
    assert float(fit_budget(found, mass=0.8).retained.min()) >= 0.8 - 1e-6
    assert fit_budget(found, max_error=1e-9).density.min() == 1


def test_bad_budgets_are_refused():
    model = Fingerprint("llama", 1, 2, 1, 8, "0" * 16)
    one = torch.ones(1, 1, 1, 2)
    found = Measurement(model, ("dense()",), (10,), one, one, 0 * one)
    with pytest.raises(UserError, match="the least they reach is 1"):
        fit_budget(found, density=0.5)
    with pytest.raises(UserError, match="exactly one"):
        fit_budget(found)
    with pytest.raises(UserError, match="share"):
        fit_budget(found, density=1.0, share="all")
    for options, message in (
        ({"density": "0.5"}, "density must be a number"),
        ({"density": 1.0, "dense_layers": 1.0}, "dense_layers must be a whole number"),
        ({"density": 1.0, "dense_decode": "no"}, "dense_decode must be True or False"),
    ):
        with pytest.raises(UserError, match=message):
            fit_budget(found, **options)


def test_what_cannot_be_measured_is_refused():
    text = torch.randint(2, VOCAB, (20,))
    with pytest.raises(UserError, match="put it in a list"):
        measure(tiny(), [text], "window(4)", progress=False)
    with pytest.raises(UserError, match="parsed from text"):
        measure(tiny(), [text], [3], progress=False)
    for last in (0, 21, 2.0):
        with pytest.raises(UserError, match="from 1 to 20, the shortest text's"):
            measure(tiny(), [text, torch.cat([text, text])], ["window(4)"], last=last, progress=False)
    broken = tiny()
    broken.model.layers[1].self_attn.v_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(UserError, match="layer 1 has NaN or infinite attention"):
        measure(broken, [text], ["window(4)"], progress=False)


@pytest.mark.parametrize("given", ["measured/book", None, [3]], ids=str)
def test_other_things_than_measurements_are_refused(given):
    with pytest.raises(UserError, match="fit_budget takes measurements"):
        fit_budget(given, density=0.5)


def test_the_usual_candidates_keep_sinks_and_the_newest_keys():
    rules = default_candidates(1000, sinks=3, local=20)
    rows = torch.arange(1000)
    guard = Pattern.parse("sink(3) | window(20)").keep(rows[:, None], rows[None, :])
    for rule in rules:
        static = Pattern.of(*(atom for atom in rule if not atom.dynamic))
        assert (static.keep(rows[:, None], rows[None, :]) >= guard).all()
    kinds = [("dynamic" if rule.dynamic else "static") for rule in rules]
    assert kinds.count("dynamic") > 5
    assert str(rules[-1]) == "dense()"
    assert len(set(rules)) == len(rules)
    guarded = default_candidates(1000, last_rows=64, rows=16, share="kv")
    assert all("last_queries(64" in str(rule) for rule in guarded[:-1])
    assert all('share="kv"' in str(rule) for rule in guarded if "mass" in str(rule))
    assert all("rows=16" in str(rule) for rule in guarded if "probed_keys" in str(rule))
    with pytest.raises(UserError, match="at least 40 tokens, got 39"):
        default_candidates(39, local=20)


@pytest.mark.parametrize(("length", "widths"), [(40, [20]), (639, [20]), (640, [20, 40]), (1280, [20, 40, 80])])
def test_no_usual_window_reaches_over_more_than_a_sixteenth_of_a_text(length, widths):
    assert _windows(default_candidates(length, local=20)) == widths


def test_wide_windows_reach_over_half_a_text():
    usual, wide = (default_candidates(640, local=20, wide_windows=wide) for wide in (False, True))
    assert _windows(wide) == [20, 40, 80, 160, 320]
    assert [rule for rule in wide if rule in usual] == usual


def _windows(rules):
    static = [rule for rule in rules[:-1] if not rule.dynamic]
    return [atom.tokens for rule in static for atom in rule if atom.name == "window"]


GROUPED = [*CANDIDATES[:2], 'window(1) | top_blocks(1, block=8, share="kv")']


def test_a_group_that_shares_has_one_pattern_and_one_mask():
    model = tiny()
    found = measure(model, [torch.randint(2, VOCAB, (48,))], GROUPED, progress=False)
    plan = fit_budget(found, density=0.4, share="kv")
    for row in plan.patterns:
        assert all(len(set(row[start : start + 3])) == 1 for start in range(0, 6, 3))
    q, k = torch.randn(1, 6, 48, 8), torch.randn(1, 2, 48, 8)
    assert choose(plan.row(0), q, k).heads == 2
    with pytest.raises(UserError, match="with share='kv'"):
        fit_budget(found, density=0.4)
    alone = measure(model, [torch.randint(2, VOCAB, (48,))], CANDIDATES, progress=False)
    with pytest.raises(UserError, match="measure atoms with share='kv'"):
        fit_budget(alone, density=0.4, share="kv")


def test_guard_rails_are_paid_from_the_budget():
    model = tiny()
    texts = [torch.randint(2, VOCAB, (n,)) for n in (150, 200)]
    found = measure(model, texts, CANDIDATES, progress=False)
    plain = fit_budget(found, density=0.7)
    plan = fit_budget(found, density=0.7, dense_layers=1)
    assert set(map(str, plan.patterns[0])) == {"dense()"}
    assert plan.density[0].min() == 1
    assert float(plan.density.mean()) <= 0.7 + 1e-6
    assert float(plan.density[1].mean()) < float(plain.density[1].mean())
    assert plan.provenance["guards"] == {"dense_layers": 1, "last_rows": 0, "dense_decode": False}
    assert plan.provenance["heads"]["dense()"] >= 6
    with pytest.raises(UserError, match=r"no choice of candidates has a density of 0\.4; the least they reach is 0\.5"):
        fit_budget(found, density=0.4, dense_layers=1)

    last = fit_budget(found, density=0.7, last_rows=10)
    assert all(str(p) == "dense()" or "last_queries(10, block=64)" in str(p) for row in last.patterns for p in row)
    again = measure(model, texts, sorted({str(p) for row in last.patterns for p in row}), progress=False)
    for layer, row in enumerate(last.patterns):
        for head, pattern in enumerate(row):
            true = again.density[:, again.candidates.index(str(pattern)), layer, head].max()
            assert true <= last.density[layer, head] + 1e-6


def test_decode_steps_that_read_everything_cost_a_prompt_nothing():
    model = tiny()
    found = measure(model, [torch.randint(2, VOCAB, (200,))], CANDIDATES, progress=False)
    plain, plan = fit_budget(found, density=0.4), fit_budget(found, density=0.4, dense_decode=True)
    pairs = [(a, b) for one, two in zip(plain.patterns, plan.patterns, strict=True) for a, b in zip(one, two, strict=True)]
    assert {str(a) for a, _ in pairs} - {"dense()"}
    assert all(b == (a if str(a) == "dense()" else a | Pattern.parse("dense_decode()")) for a, b in pairs)
    assert torch.equal(plan.density, plain.density)
    assert plan.provenance["guards"] == {"dense_layers": 0, "last_rows": 0, "dense_decode": True}
    rails = fit_budget(found, density=0.8, dense_decode=True, last_rows=5)
    kinds = {str(pattern) for row in rails.patterns for pattern in row} - {"dense()"}
    assert kinds
    assert all("dense_decode()" in kind and "last_queries(5, block=64)" in kind for kind in kinds)


def test_the_worst_kind_of_text_decides():
    model = tiny()
    torch.manual_seed(1)
    kinds = [measure(model, [torch.randint(2, top, (64,))], CANDIDATES, progress=False) for top in (4, VOCAB)]
    plan = fit_budget(kinds, density=0.6)
    worst = {name: torch.stack([getattr(kind, name) for kind in kinds]).amax(0)[0].double() for name in ("density", "error")}
    places = torch.tensor([[kinds[0].candidates.index(str(p)) for p in row] for row in plan.patterns])
    assert plan.density == pytest.approx(worst["density"].gather(0, places[None])[0].float())
    assert float(plan.density.mean()) <= 0.6 + 1e-6
    expected = within_density(worst["density"].flatten(1), worst["error"].flatten(1), 0.6)
    assert plan.provenance["expected"]["error_per_layer"] == pytest.approx(expected.error / len(plan.patterns))
    assert len(plan.provenance["measurement"]["worst_of"]) == 2
    longer = measure(model, [torch.randint(2, VOCAB, (n,)) for n in (64, 65)], CANDIDATES, progress=False)
    plan = fit_budget([kinds[0], longer], density=0.6)
    every = torch.cat([kinds[0].density, longer.density]).amax(0)
    places = torch.tensor([[kinds[0].candidates.index(str(p)) for p in row] for row in plan.patterns])
    assert plan.density == pytest.approx(every.gather(0, places[None])[0])
    assert plan.provenance["lengths"] == [64, 65]
    other = measure(model, [torch.randint(2, VOCAB, (64,))], CANDIDATES[:1], progress=False)
    with pytest.raises(UserError, match="same ones"):
        fit_budget([kinds[0], other], density=0.6)
    with pytest.raises(UserError, match="at least one"):
        fit_budget([], density=0.6)


def test_dense_layers_of_a_preset():
    settings = Settings(dense_layers=2)
    assert settings.to_json()["dense_layers"] == 2
    with pytest.raises(UserError, match="dense_layers"):
        Settings(dense_layers=-1)
