"""Baselines: densities met from below, the rules of the papers, MoA's budget spent where it catches most."""

import itertools

import pytest
import torch

from attnsieve import Pattern, Plan, UserError
from attnsieve.evaluation.baselines import (
    CACHE,
    DYNAMIC,
    MOA_PARTS,
    STATIC,
    _widen,
    cache_baseline,
    dynamic_baseline,
    moa_baseline,
    static_baseline,
)
from attnsieve.evaluation.density import pattern_density
from attnsieve.evaluation.fidelity import layer_fidelity
from attnsieve.hf import fingerprint
from attnsieve.selection import choose
from tests.evaluation_tiny import model, plan_density

MODEL = fingerprint(model())


@pytest.mark.parametrize("name", STATIC)
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("length", [300, 777])
def test_the_density_is_met_from_below(name, density, length):
    plan = static_baseline(name, MODEL, density=density, length=length)
    found = plan_density(plan, length)
    assert density - 0.03 < found <= density
    assert plan.provenance["method"] == name
    assert len({pattern for row in plan.patterns for pattern in row}) == 1


@pytest.mark.parametrize("name", STATIC)
def test_more_density_never_keeps_fewer_pairs(name):
    densities = [plan_density(static_baseline(name, MODEL, density=d / 10, length=400), 400) for d in range(3, 11)]
    assert densities == sorted(densities)


def test_the_rules_are_those_of_the_papers():
    rule = lambda name: str(static_baseline(name, MODEL, density=0.3, length=512).patterns[0][0])  # noqa: E731
    assert Pattern.parse(rule("window")).atoms[0].name == "window"
    assert [atom.name for atom in Pattern.parse(rule("streaming-llm"))] == ["sink", "window"]
    assert "sink(4)" in rule("streaming-llm")
    assert [atom.name for atom in Pattern.parse(rule("longformer"))] == ["dilated", "sink", "window"]
    assert [atom.name for atom in Pattern.parse(rule("bigbird"))] == ["random_blocks", "sink", "window"]


@pytest.mark.parametrize("name", STATIC)
def test_infeasible_densities_name_the_reachable_one(name):
    least = pattern_density(STATIC[name](1, 256), 256)
    with pytest.raises(UserError, match=f"{least:.4f}"):
        static_baseline(name, MODEL, density=least * 0.9, length=256)


def test_bad_requests():
    with pytest.raises(UserError, match="streaming-llm"):
        static_baseline("h2o", MODEL, density=0.5, length=100)
    with pytest.raises(UserError, match="minference"):
        dynamic_baseline("h2o", MODEL, strength=0.5)
    for density in (0, -1, 1.5):
        with pytest.raises(UserError, match="density"):
            static_baseline("window", MODEL, density=density, length=100)
    with pytest.raises(UserError, match="length"):
        static_baseline("window", MODEL, density=0.5, length=0)
    with pytest.raises(UserError, match="profile at 100"):
        moa_baseline(MODEL, torch.ones(2, 4, 90), density=0.5, length=100)
    with pytest.raises(UserError, match="at least"):
        moa_baseline(MODEL, torch.ones(2, 4, 100), density=0.01, length=100)


@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_baselines_keep_more_when_stronger(name):
    ids = [2 + 7 * place % 200 for place in range(500)]
    weak, strong = (0.9, 0.05) if name == "flashprefill" else (0.3, 0.999)
    few = layer_fidelity(model(), dynamic_baseline(name, MODEL, strength=weak), ids)
    many = layer_fidelity(model(), dynamic_baseline(name, MODEL, strength=strong), ids)
    assert few.density.mean() < many.density.mean() <= 1
    assert few.retained.mean() < many.retained.mean() <= 1 + 1e-6
    with pytest.raises(UserError):
        dynamic_baseline(name, MODEL, strength=1.5)


def local_and_far(length: int) -> torch.Tensor:
    """Head 0 of every layer looks near, head 1 everywhere, the others in between."""
    distance = torch.arange(length, dtype=torch.float64)
    decay = torch.tensor([[20.0, 1e6, 100.0, 150.0], [10.0, 1e6, 80.0, 120.0]])
    return torch.exp(-distance / decay[..., None])


def test_moa_spends_where_it_catches_most():
    mass, length = local_and_far(640), 640
    plan = moa_baseline(MODEL, mass, density=0.4, length=length)
    width = lambda layer, head: next(atom.tokens for atom in plan.patterns[layer][head] if atom.name == "window")  # noqa: E731
    assert width(0, 0) < width(0, 2) <= width(0, 3)
    assert 0.3 < plan_density(plan, length) <= 0.4
    share = mass.flatten(0, 1) / mass.flatten(0, 1).sum(-1, keepdim=True)

    def caught(chosen: Plan) -> float:
        widths = [next(atom.tokens for atom in rule if atom.name == "window") for row in chosen.patterns for rule in row]
        return sum(float(share[place, :width].sum()) for place, width in enumerate(widths))

    uniform = static_baseline("streaming-llm", MODEL, density=plan_density(plan, length), length=length)
    assert caught(plan) > caught(uniform)


def test_moa_with_everything_is_dense():
    plan = moa_baseline(MODEL, local_and_far(320), density=1.0, length=320)
    assert plan_density(plan, 320) == 1
    assert isinstance(plan, Plan)
    assert max(MOA_PARTS) == 1


def test_widening_is_optimal_for_what_it_spends():
    costs = [1.0, 2.0, 4.0, 8.0]
    gains = [[0.1, 0.2, 0.7, 1.0], [0.5, 0.9, 0.95, 1.0], [0.0, 0.1, 0.2, 1.0]]
    # Totals at which steps of the three concave hulls, steepest first, use up the budget.
    for budget in (3.0, 4.0, 7.0, 14.0, 18.0, 24.0):
        chosen = _widen(gains, costs, budget)
        assert sum(costs[choice] for choice in chosen) == budget
        best = max(
            sum(gain[choice] for gain, choice in zip(gains, choices, strict=True))
            for choices in itertools.product(range(4), repeat=3)
            if sum(costs[choice] for choice in choices) <= budget
        )
        assert sum(gain[choice] for gain, choice in zip(gains, chosen, strict=True)) == pytest.approx(best)


@pytest.mark.parametrize("name", CACHE)
def test_a_decode_step_reads_as_many_keys_as_the_cache_holds(name):
    length = 400
    plan = cache_baseline(name, MODEL, density=0.2, length=length)
    assert plan.provenance["method"] == name
    heads, kv_heads = MODEL.heads, MODEL.kv_heads
    q, k = torch.randn(1, heads, length, 8), torch.randn(1, kv_heads, length, 8)
    layout = choose(plan.row(0), q[:, :, -1:], k)
    kept = layout.dense(torch.tensor([length - 1]), torch.arange(length))
    assert 0.18 * length < int(kept.sum(-1).max()) <= 0.2 * length
    assert int(kept.sum(-1).min()) == int(kept.sum(-1).max())
    prompt = choose(plan.row(0), q, k).density()
    assert (prompt.min() == 1) if name == "snapkv" else (prompt.max() < 0.6)
    with pytest.raises(UserError, match="more than 32 keys"):
        cache_baseline(name, MODEL, density=0.01, length=length)
    with pytest.raises(UserError, match="unknown cache baseline"):
        cache_baseline("h3o", MODEL, density=0.5, length=length)
