"""Fitting: the paper's patterns from written-out maps, honest expectations, and heads that get what they need."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnsieve.errors import UserError
from attnsieve.fingerprint import Fingerprint
from attnsieve.fitting import PRESETS, fit
from attnsieve.fitting.expect import Observed, expect
from attnsieve.layout import compile_layout
from attnsieve.patterns import Pattern, dense, sink, window
from attnsieve.plan import Plan
from attnsieve.profiling import LongStatistics, Profile


def profile_of(whole, pcl, rows_seen=3):
    """The profile of documents that all have the attention maps `whole` [layers, heads, n, n], rows adding up to 1."""
    layers, heads, n, _ = whole.shape
    model = Fingerprint("toy", layers, heads, heads, 16, "0123456789abcdef")
    late = whole.clone()
    late[:, :, :pcl] = 0
    offsets = torch.stack([late.diagonal(-d, 2, 3).sum(-1) for d in range(n)], -1)
    rows = rows_seen * (n - pcl)
    long = LongStatistics(n, rows, (late.sum(2) * rows_seen).float(), (offsets * rows_seen).float())
    seen = torch.full((pcl,), rows_seen)
    return Profile(model, pcl, whole[:, :, :pcl, :pcl].float(), seen, (long,) if n > pcl else (), {"data": "toy"})


def normalised(weights):
    weights = weights.double().tril()
    return weights / weights.sum(-1, keepdim=True)


def random_whole(seed=0, heads=6, n=48):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, heads, n, n, generator=generator)
    distance = torch.arange(n)[:, None] - torch.arange(n)
    scores -= distance * torch.linspace(0, 1, heads)[:, None, None]
    scores[..., :2] += torch.rand(2, heads, 1, 2, generator=generator) * 8
    return normalised(scores.exp())


def kept(size, columns, diagonals, *pairs):
    mask = torch.zeros(size, size)
    for column in columns:
        mask[column:, column] = 1
    for distance, first, last in diagonals:
        for row in range(first, last + 1):
            mask[row, row - distance] = 1
    for pair in pairs:
        mask[pair] = 1
    return mask


def test_paper_preset_gives_the_patterns_of_two_real_heads():
    masks = [
        kept(32, [0], [(0, 0, 31), (1, 1, 31), (2, 12, 31)]),
        kept(32, [0], [(0, 0, 20)], (2, 1)),
    ]
    plan = fit(profile_of(normalised(torch.stack(masks))[None], 32), preset="paper")
    texts = [str(pattern).split(" | ", 1)[1] for pattern in plan.row(0)]
    assert texts == [
        "columns(0, 29, 30, 31, start=32) | diagonals(0, 1, 31, start=32)",
        "columns(0, start=32) | diagonals(31, start=32)",
    ]
    for pattern, mask in zip(plan.row(0), masks, strict=True):
        rows = torch.arange(32)
        assert torch.equal(pattern.keep(rows[:, None], rows), mask.bool())
    supported = fit(profile_of(normalised(torch.stack(masks))[None], 32), preset="paper", min_support=8)
    assert [str(pattern).split(" | ", 1)[1] for pattern in supported.row(0)] == [
        "columns(0, start=32) | diagonals(0, 1, start=32)",
        "columns(0, start=32)",
    ]
    assert plan.provenance["reach"] == plan.provenance["reach_bound"] == 31
    assert supported.provenance["reach"] == 1


def true_share(whole, pattern):
    rows = torch.arange(whole.shape[-1])
    return (whole * pattern.keep(rows[:, None], rows)).sum(-1)


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "paper"},
        {"preset": "paper", "tau": 0.1, "mu": 0.5},
        {"preset": "paper", "pcl": 7, "tau": 0.1, "mu": 0.3},
        {"preset": "robust"},
        {"preset": "robust", "floor": 0.6, "share": 0.7, "mu": 0.4, "pcl": 9},
        {"preset": "robust", "threshold": "relative", "kappa": 1.5, "floor": 0.5},
    ],
)
def test_expectations_are_those_of_the_patterns(options):
    whole = random_whole()
    plan = fit(profile_of(whole, 12), **options)
    for layer in range(2):
        for head, pattern in enumerate(plan.row(layer)):
            share = true_share(whole[layer, head], pattern)
            exact = compile_layout([pattern], 48).density(48).item()
            assert plan.density[layer, head].item() == pytest.approx(exact, abs=1e-6)
            assert plan.retained[layer, head].item() == pytest.approx(share.mean().item(), abs=0.02)


def test_mass_is_exact_where_columns_and_offsets_do_not_meet():
    whole = random_whole()
    observed = Observed.of([profile_of(whole, 12)], 0)
    columns, offsets = torch.arange(48).expand(6, 48) < 2, torch.arange(48).expand(6, 48) < 10
    found = expect(observed, torch.ones(6, 12, 12).tril().bool(), columns, offsets)
    for head in range(6):
        share = true_share(whole[0, head], sink(2) | window(10))[12:].mean().item()
        assert found.beyond[head].item() == pytest.approx(share, abs=1e-5)
    everything = torch.ones(6, 48, dtype=torch.bool)
    found = expect(observed, torch.ones(6, 12, 12).tril().bool(), everything, everything)
    assert found.density.tolist() == [1.0] * 6
    torch.testing.assert_close(found.retained, torch.ones(6).double(), atol=1e-6, rtol=0)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), floor=st.floats(0.3, 0.99))
def test_robust_heads_meet_the_floor_or_are_dense(seed, floor):
    whole = random_whole(seed, heads=4, n=40)
    plan = fit(profile_of(whole, 10), floor=floor, share=max(floor, 0.5))
    assert (plan.retained >= floor - 1e-6).all()
    for layer in range(2):
        for head, pattern in enumerate(plan.row(layer)):
            below = true_share(whole[layer, head], pattern)[:10].mean().item()
            assert below >= floor - 1e-6
            assert (pattern == dense()) == (plan.density[layer, head].item() == 1)


def special_heads(n=512):
    distance = torch.arange(n)[:, None] - torch.arange(n)
    local = torch.where(distance < 6, 1.0, 0.0)
    sinks = torch.where(torch.arange(n) < 3, 50.0, 0.001).expand(n, n)
    stripes = torch.where(distance % 25 == 0, 1.0, 0.0) * (distance < 80)
    return normalised(torch.stack([local, sinks, torch.ones(n, n), stripes]))


def test_robust_makes_local_and_sink_heads_cheap_and_diffuse_heads_dense():
    plan = fit(profile_of(special_heads()[None], 128), floor=0.95)
    local, sinks, diffuse, stripes = plan.row(0)
    assert local == sinks == sink(4) | window(16)
    assert diffuse == dense()
    assert "diagonals(25, 50, 75)" in str(stripes)
    assert plan.provenance["choice"] == [["local", "local", "dense", "dam"]]
    assert plan.provenance["heads"] == {"local": 2, "dense": 1, "dam": 1}
    assert plan.provenance["reach"] is None


def test_adaptive_lets_diffuse_heads_choose_and_keeps_the_others():
    profile = profile_of(special_heads()[None], 128)
    robust, adaptive = (fit(profile, preset=preset, floor=0.95) for preset in ("robust", "adaptive"))
    expected = Pattern.parse("sink(4) | window(32) | probed_keys(mass=0.95, block=64, rows=8)")
    assert adaptive.row(0) == (*robust.row(0)[:2], expected, robust.row(0)[3])
    assert adaptive.provenance["choice"] == [["local", "local", "adaptive", "dam"]]
    # What the input decides is not expected to be anything.
    assert adaptive.density is None
    assert adaptive.retained is None


def test_long_windows_are_not_local():
    n = 64
    distance = torch.arange(n)[:, None] - torch.arange(n)
    wide = normalised(torch.where(distance < 24, 1.0, 0.0))
    assert fit(profile_of(wide[None, None], 16), floor=0.95).row(0)[0] == dense()
    narrow = normalised(torch.where(distance < 16, 1.0, 0.0))
    assert fit(profile_of(narrow[None, None], 16), floor=0.95).row(0)[0] == sink(4) | window(16)


def test_forced_cells_are_counted():
    whole = normalised(kept(16, [], [(3, 3, 15)], (0, 0), (1, 0), (2, 0)) + 0)
    plan = fit(profile_of(whole[None, None], 16), preset="paper", force_self=True, force_sink=1)
    assert plan.provenance["forced_per_head"] == [[15 + 12]]
    assert plan.provenance["forced_cells"] == 27


def test_a_shorter_capture_length_is_the_crop():
    whole = random_whole(n=20)
    cropped = fit(profile_of(whole[..., :8, :8], 8), preset="paper", tau=0.2)
    assert fit(profile_of(whole, 20), preset="paper", tau=0.2, pcl=8).patterns == cropped.patterns


def test_plans_are_saved_with_their_origin(tmp_path):
    plan = fit(profile_of(random_whole(), 12), preset="robust", floor=0.8)
    plan.save_pretrained(tmp_path)
    loaded = Plan.from_pretrained(tmp_path)
    assert loaded == plan
    origin = loaded.provenance
    assert origin["settings"] == PRESETS["robust"].to_json() | {"floor": 0.8}
    assert (origin["measured_at"], origin["pcl"], origin["profiles"][0]["data"]) == (48, 12, "toy")
    assert origin["profiles"][0]["documents"] == 3
    assert "preset robust, pcl 12" in str(loaded)


def test_every_profile_must_meet_the_floor():
    local, sinks, diffuse, _ = special_heads()
    text, code = (profile_of(torch.stack(heads)[None], 128) for heads in ([local, sinks, local], [local, diffuse, sinks]))
    apart = [fit(profile, floor=0.95).row(0) for profile in (text, code)]
    assert apart == [(sink(4) | window(16),) * 3, (sink(4) | window(16), dense(), sink(4) | window(16))]
    for order in ([text, code], [code, text]):
        together = fit(order, floor=0.95)
        assert together.row(0) == apart[1]
        assert [profile["data"] for profile in together.provenance["profiles"]] == ["toy", "toy"]
    assert fit([text, text], floor=0.95).patterns == fit(text, floor=0.95).patterns
    mixed = fit([text, code], preset="paper", tau=0.05)
    assert (
        mixed.patterns
        == fit(
            profile_of(torch.stack([local, (sinks + diffuse) / 2, (local + sinks) / 2])[None], 128), preset="paper", tau=0.05
        ).patterns
    )
    assert mixed.retained[0, 2] < fit(text, preset="paper", tau=0.05).retained[0, 2]


def test_a_window_is_as_wide_as_the_widest_profile_needs():
    distance = torch.arange(256)[:, None] - torch.arange(256)
    narrow, wide = (profile_of(normalised((distance < w) * 1.0)[None, None], 64) for w in (6, 40))
    assert fit([narrow, wide], floor=0.99).row(0)[0] == sink(4) | window(48)


@pytest.mark.parametrize("early", ["diffuse", "local"])
def test_the_floor_holds_below_and_beyond_the_capture_length(early):
    local, _, diffuse, _ = special_heads()
    whole = torch.stack([local, diffuse] if early == "local" else [diffuse, local])
    whole = torch.cat([whole[0, :256], whole[1, 256:]])[None, None]
    assert fit(profile_of(whole, 256), floor=0.95).row(0)[0] == dense()
    assert fit(profile_of(whole, 256), floor=0.95, share=0.5, local=False).row(0)[0] == dense()
    same = [profile_of(head[None, None], 256) for head in (local, whole[0, 0])]
    for order in (same, same[::-1]):
        assert fit(order, floor=0.95).row(0)[0] == dense()


def test_profiles_that_do_not_fit_together_are_refused():
    one = profile_of(random_whole(), 12)
    for others, message in (
        ([], "at least one profile"),
        ([one, profile_of(random_whole(), 13)], r"got \(12, 48\) and \(13, 48\)"),
        ([one, profile_of(random_whole(n=49), 12)], r"got \(12, 48\) and \(12, 49\)"),
        (
            [one, profile_of(random_whole(heads=5), 12)],
            r"profile 1 and profile 2 were made for different models \(heads: 6 and 5; kv_heads: 6 and 5\): give those of one model",
        ),
    ):
        with pytest.raises(UserError, match=message):
            fit(others)


@pytest.mark.parametrize("given", ["profiles/book", None, [3]], ids=str)
def test_other_things_than_profiles_are_refused(given):
    with pytest.raises(UserError, match="fit takes profiles"):
        fit(given)


def test_maps_alone_serve_the_paper_but_not_a_floor():
    profile = profile_of(random_whole(n=12), 12)
    assert fit(profile, preset="paper").provenance["measured_at"] == 12
    with pytest.raises(UserError, match=r"no statistics: profile with lengths=\(48,\)"):
        fit(profile)


def test_a_threshold_that_drops_everything_is_refused():
    with pytest.raises(UserError, match=r"12 heads keep no key in any row \(L0H0"):
        fit(profile_of(random_whole(), 12), preset="paper", tau=2.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "bold"}, "choose from paper, robust, adaptive"),
        ({"taux": 1}, "did you mean tau"),
        ({"threshold": "loud"}, "absolute, mass, relative"),
        ({"mu": 0}, "mu must"),
        ({"min_support": 0}, "min_support"),
        ({"pcl": 13}, "from 1 to the profile's 12"),
        ({"pcl": 0}, "from 1 to the profile's 12"),
        ({"floor": 1.5}, "floor"),
        ({"floor": 0.0}, "set a floor"),
        ({"share": 0.0}, "share"),
        ({"preset": "paper", "eps": 0.0}, "eps"),
        ({"dense_layers": 99}, "dense_layers must be from 0 to"),
        ({"force_sink": -1}, "force_sink must be a whole number, got -1"),
        ({"preset": "paper", "tau": "much"}, "tau must be a finite number, got 'much'"),
        ({"preset": "paper", "tau": float("nan")}, "tau must be a finite number, got nan"),
        ({"preset": "paper", "tau": -1}, "tau must be at least 0"),
        ({"tau": 0.1, "lam": 1.0}, "tau, lam: only threshold=absolute reads that, preset 'robust' has threshold=mass"),
        ({"preset": "paper", "share": 0.9}, "share: only threshold=mass"),
        ({"threshold": "relative", "kappa": -1}, "kappa must be at least 0"),
        ({"preset": "paper", "fallback": "keys"}, "keep the floor: set one above 0"),
        ({"join": "no"}, "join must be true or false, got 'no'"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        fit(profile_of(random_whole(), 12), **options)


def test_numbers_of_numpy_are_numbers(tmp_path):
    profile = profile_of(random_whole(), 12)
    plan = fit(profile, preset="paper", tau=np.float64(0.25))
    plan.save_pretrained(tmp_path)
    assert Plan.from_pretrained(tmp_path) == fit(profile, preset="paper", tau=0.25)


def test_a_profile_without_maps_is_refused():
    whole = profile_of(random_whole(), 12)
    with pytest.raises(UserError, match="no maps"):
        fit(Profile(whole.fingerprint, 12, long=whole.long))
