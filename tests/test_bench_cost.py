"""Costs: fitted constants, predictions, and what `auto` and "fastest" make of them."""

from importlib.util import find_spec

import pytest
import torch

from attnsieve import Plan, Spans, UserError, attention, compile_layout
from attnsieve.backends import cost, cost_work
from attnsieve.backends.call import Call
from attnsieve.backends.fa4.lists import lists_of_blocks, lists_of_rule
from attnsieve.bench.fit_cost import fit, least_squares
from attnsieve.hf import apply, fingerprint
from attnsieve.patterns import (
    antidiagonal_blocks,
    columns,
    dense,
    dense_decode,
    diagonals,
    heavy_hitters,
    last_queries,
    probed_blocks,
    probed_keys,
    random_blocks,
    sink,
    top_blocks,
    vertical_slash,
    window,
)
from attnsieve.selection import cost as choosing
from tests.hf_tiny import close, logits, oracle, tiny, tokens

FIRST_CHOICE = "portable"


def make(patterns, q_len=200, k_len=200, capacity=None):
    q = torch.randn(1, len(patterns), q_len, 16)
    k, v = (torch.randn(1, 1, k_len, 16) for _ in range(2))
    return Call(q, k, v, compile_layout(patterns, capacity or k_len), Spans.full(1, q_len, k_len), 0.25)


@pytest.fixture
def table(monkeypatch):
    """Sets the constants of this machine's CPU."""

    def use(**constants):
        found = {name.replace("_", " "): value for name, value in constants.items()}
        monkeypatch.setattr(cost, "_table", lambda: {"cpu": {"constants": found}})

    use()
    return use


def row(backend, work, ms, op="prefill", **more):
    base = {
        "includes_mask_building": False,
        "device": "gpu",
        "density": 0.5,
        "commit": "abc",
        "mask": str(work),
        "dtype": "bf16",
    }
    base |= {"batch": 1, "q_heads": 4, "kv_heads": 2, "head_dim": 64, "q_len": 512, "kv_len": 512}
    return base | {"backend": backend, "op": op, "work": work, "ms_p20": ms} | more


def test_constants_that_made_the_rows_are_found_again():
    rows = [
        row("triton", {"call": 1.0, "whole": w, "partial": p}, 0.05 + 2 * w + 3 * p)
        for w, p in [(1, 1), (4, 1), (9, 5), (0, 2)]
    ]
    found = fit(rows)["gpu"]
    assert found["constants"]["triton prefill"] == pytest.approx({"call": 0.05, "whole": 2.0, "partial": 3.0}, rel=1e-3)
    assert found["relative_error"]["triton prefill"]["worst"] < 1e-9


def test_of_repeated_measurements_the_last_counts():
    """A kernel that has changed since may do other work for the same mask."""
    old, new = {"call": 1.0, "whole": 1.0}, {"call": 1.0, "whole": 1.0, "moved": 2.0}
    rows = [
        row("fa4", old, 9.0, mask="C"),
        row("fa4", {"call": 1.0, "whole": 3.0}, 4.0),
        row("fa4", {"call": 1.0, "whole": 1.0}, 2.0),
    ]
    found = fit([*rows, row("fa4", new, 2.5, mask="C")])["gpu"]["constants"]["fa4 prefill"]
    assert found == pytest.approx({"call": 1.0, "whole": 1.0, "moved": 0.25}, rel=1e-3)


def test_constants_are_never_negative():
    a = torch.tensor([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]], dtype=torch.float64)
    x = least_squares(a, torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(x, torch.tensor([2.0, 0.0], dtype=torch.float64))


def test_dense_is_what_the_fastest_dense_kernel_takes():
    work = {"call": 1.0, "whole": 2.0}
    rows = [row("cudnn", work, 4.0, density=1), row("flash", work, 6.0, density=1), row("triton", work, 8.0)]
    found = fit(rows)["gpu"]["constants"]
    assert sum(found["dense prefill"][kind] * amount for kind, amount in work.items()) == pytest.approx(4.0, rel=1e-3)


def test_what_auto_took_counts_for_it():
    rows = [row("fa4", {"call": 1.0, "whole": 1.0}, 3.0), row("auto: fa4", {"call": 1.0, "whole": 3.0}, 5.0)]
    assert fit(rows)["gpu"]["constants"] == {"fa4 prefill": pytest.approx({"call": 2.0, "whole": 1.0}, rel=1e-3)}


def test_rows_with_building_or_without_work_are_left_out():
    with pytest.raises(UserError, match="no row holds"):
        fit([row("triton", {"call": 1.0}, 1.0, includes_mask_building=True), row("triton", None, 1.0)])


@pytest.mark.parametrize("patterns", [[window(9)], [dense()], [sink(2) | window(150), window(3)]])
def test_portable_work_counts_every_pair_it_computes(patterns):
    """At least the kept pairs, at most whole tiles around them."""
    call = make(patterns)
    at_width_16 = 0.2 + 0.8 * 16 / 128
    cells = cost_work.work(call, "portable")["whole"] * 1e9 / at_width_16
    kept = int(call.layout.pairs().sum()) * len(patterns) // call.layout.heads
    assert kept <= cells <= kept + 2 * 128 * 200 * len(patterns)


def test_scattered_diagonals_are_work_of_their_own():
    amounts = cost_work.work(make([diagonals(0, 50, 100)], 300, 300), "portable")
    assert amounts["single"] > 0


def test_chunks_are_less_work_than_prompts():
    whole, chunk = make([window(40)], 512, 512), make([window(40)], 128, 512)
    amounts = [cost_work.work(call, "portable")["whole"] for call in (whole, chunk)]
    assert amounts[1] < amounts[0] / 2
    dense_scores = [cost_work.work(call, "dense")["whole"] for call in (whole, chunk)]
    assert dense_scores[1] / dense_scores[0] == pytest.approx((128 * 384 + 128 * 129 / 2) / (512 * 513 / 2))


def test_auto_takes_the_least_predicted_of_what_can_serve(table):
    dense_call, sparse_call = make([dense()]), make([window(5)])
    slow, fast = {"call": 9.0, "whole": 0.0, "single": 0.0, "part": 0.0}, {"call": 1.0, "whole": 0.0}
    table(portable_prefill=slow, dense_prefill=fast)
    assert attention.choose_backend(dense_call) == "dense"
    assert attention.choose_backend(sparse_call) == "portable", "dense attention is not this mask"
    assert attention.dense_is_faster(sparse_call, "portable")
    table(portable_prefill=slow | {"call": 0.5}, dense_prefill=fast)
    assert attention.choose_backend(make([dense()])) == "portable"


def test_nothing_is_guessed_where_nothing_was_measured(table):
    call = make([dense()])
    assert cost.predict(call, ("portable", "dense")) == {}
    assert attention.choose_backend(call) == FIRST_CHOICE
    table(dense_prefill={"call": 1.0, "whole": 0.0})
    assert attention.choose_backend(make([dense()])) == FIRST_CHOICE
    assert not attention.dense_is_faster(make([window(5)]), "portable")


def test_work_is_counted_once_per_power_of_two(table, monkeypatch):
    table(portable_prefill={"call": 1.0, "whole": 1.0, "single": 1.0, "part": 1.0})
    counted = []
    right = cost_work.work
    monkeypatch.setattr(cost_work, "work", lambda call, backend: counted.append(backend) or right(call, backend))
    call = make([window(5)], 200, 200, capacity=256)
    shorter = Call(call.q[:, :, :190], call.k[:, :, :190], call.v[:, :, :190], call.layout, Spans.full(1, 190, 190), 0.25)
    assert cost.predict(call, ("portable",)) == cost.predict(shorter, ("portable",))
    assert counted == ["portable"]


def test_the_shipped_table_knows_every_kind_of_work_it_is_asked_for():
    call = make([window(5) | sink(1)])
    known = cost.constants("cpu")
    assert cost_work.work(call, "portable").keys() <= known["portable prefill"].keys()
    assert cost_work.work(call, "dense").keys() <= known["dense prefill"].keys()


# apply


def uniform(model, rule):
    return Plan.uniform(fingerprint(model), rule)


def test_fastest_runs_dense_by_name_where_costs_say_so_and_never_in_decode(table):
    model, ids = tiny(), tokens(1, 40)
    plan = uniform(model, sink(1) | window(4))
    table(portable_prefill={"call": 9.0, "whole": 0.0, "single": 0.0, "part": 0.0}, dense_prefill={"call": 1.0, "whole": 0.0})
    with apply(model, plan, backend="fastest") as handle:
        got = logits(model, ids)
        logits(model, ids[:, :1])
    close(got, logits(model, ids))
    layer = handle.report().layers[0]
    assert [reason.split(":")[0] for reason in layer.dense] == ["faster dense"]
    assert layer.sparse == {"decode": 1}
    assert layer.backends == {"portable": 1}
    assert "faster dense" in str(handle.report())


def test_auto_never_runs_a_sparse_layer_dense(table):
    model, ids = tiny(), tokens(1, 40)
    plan = uniform(model, sink(1) | window(4))
    table(portable_prefill={"call": 9.0, "whole": 0.0, "single": 0.0, "part": 0.0}, dense_prefill={"call": 1.0, "whole": 0.0})
    with apply(model, plan) as handle:
        got = logits(model, ids)
    close(got, oracle(model, plan, ids))
    assert handle.report().unplanned == {}
    assert handle.report().to_json()["layers"][0]["backends"] == {"portable": 1}


def test_fastest_follows_the_plan_where_it_is_faster(table):
    model, ids = tiny(), tokens(1, 40)
    plan = uniform(model, sink(1) | window(4))
    table(portable_prefill={"call": 1.0, "whole": 0.0, "single": 0.0, "part": 0.0}, dense_prefill={"call": 9.0, "whole": 0.0})
    with apply(model, plan, backend="fastest") as handle:
        got = logits(model, ids)
    close(got, oracle(model, plan, ids))
    assert handle.report().layers[0].sparse == {"prefill": 1}


def test_fastest_chooses_once_for_a_prompt(table, monkeypatch):
    """The choice that dense attention was compared with is the one that computes."""
    model = tiny()
    table(portable_prefill={"call": 1.0, "whole": 0.0, "single": 0.0, "part": 0.0}, dense_prefill={"call": 9.0, "whole": 0.0})
    with apply(model, uniform(model, sink(1) | window(4)), backend="fastest") as handle:
        monkeypatch.setattr(attention, "choose_backend", None)
        logits(model, tokens(1, 40))
    assert handle.report().layers[0].backends == {"portable": 1}


def test_fastest_keeps_padded_batches_on_the_plan(table):
    model, ids = tiny(), tokens(2, 40)
    table(portable_prefill={"call": 9.0, "whole": 0.0, "single": 0.0, "part": 0.0}, dense_prefill={"call": 1.0, "whole": 0.0})
    padding = torch.ones_like(ids)
    padding[1, :6] = 0
    with apply(model, uniform(model, sink(1) | window(4)), backend="fastest") as handle:
        logits(model, ids, attention_mask=padding)
    assert handle.report().layers[0].sparse == {"prefill": 1}


CHOOSING = {"call": 1.0, "product": 0.0, "alone": 0.0, "searched": 0.0}


@pytest.mark.parametrize(("choosing_ms", "runs_dense"), [(5.0, False), (9.0, True), (9.1, True)])
def test_fastest_runs_dense_where_choosing_alone_takes_as_long(table, choosing_ms, runs_dense):
    model, ids = tiny(), tokens(1, 40)
    plan = uniform(model, sink(1) | window(2) | probed_keys(mass=0.3, block=8, rows=2))
    table(choosing_prefill=CHOOSING | {"call": choosing_ms}, dense_prefill={"call": 9.0, "whole": 0.0})
    with apply(model, plan, backend="fastest") as handle:
        got = logits(model, ids)
        step = logits(model, ids[:, :1])
    with apply(model, plan) as exact:
        expected = logits(model, ids)
        assert torch.equal(step, logits(model, ids[:, :1]))
    assert exact.report().layers[0].sparse == {"prefill": 1, "decode": 1}
    close(got, logits(model, ids) if runs_dense else expected)
    assert not torch.allclose(expected, logits(model, ids), atol=1e-3)
    layer = handle.report().layers[0]
    assert layer.sparse == ({"decode": 1} if runs_dense else {"prefill": 1, "decode": 1})
    assert [reason.split(":")[0] for reason in layer.dense] == (["faster dense"] if runs_dense else [])


@pytest.mark.parametrize(
    "rule", [heavy_hitters(9, 4, block=8), last_queries(4) | window(2)], ids=["not modelled", "nothing is chosen"]
)
def test_fastest_keeps_to_plans_whose_choice_has_no_known_price(table, rule):
    model, ids = tiny(), tokens(1, 40)
    table(choosing_prefill=CHOOSING, dense_prefill={"call": 0.0, "whole": 1e-9})
    with apply(model, uniform(model, sink(1) | rule), backend="fastest") as handle:
        logits(model, ids)
    assert handle.report().layers[0].sparse == {"prefill": 1}


def of_choice(rule, n=512, heads=4):
    q, k = torch.empty(1, heads, n, 128), torch.empty(1, 2, n, 128)
    call = Call(q, k, k, compile_layout([dense()] * 2, n), Spans.full(1, n, n), 0.1)
    return choosing.work([sink(1) | rule] * heads, call)


def test_work_of_choosing_is_what_the_kernels_multiply_and_search():
    pairs = 512 * 513 / 2
    alone = of_choice(probed_keys(mass=0.9, block=64, rows=8))
    expected = {"call": 1, "product": 4 * 2 * pairs / 8 / 1e9, "searched": 4 * pairs / 64 / 1e9}
    assert alone == pytest.approx(expected)
    together = of_choice(probed_keys(mass=0.9, block=64, rows=8, share="kv"))
    assert together == pytest.approx(expected | {"searched": expected["searched"] / 2})
    assert of_choice(probed_keys(mass=0.9, block=64, rows=8), n=1024)["product"] == pytest.approx(
        alone["product"] * 4, rel=0.01
    )
    strided = of_choice(vertical_slash(mass=0.9, probe=64, strided=16))
    assert strided["alone"] == pytest.approx(3 * 4 * 16 * 512 / 1e9)
    both = of_choice(vertical_slash(mass=0.9) | probed_blocks(mass=0.9))
    assert both["call"] == 2
    assert of_choice(heavy_hitters(9, 4)) is None
    assert of_choice(last_queries(4) | dense_decode()) == {}


def test_the_shipped_table_knows_all_work_of_choosing_on_an_h100():
    known = cost.constants("NVIDIA H100 80GB HBM3")["choosing prefill"]
    rules = (vertical_slash(mass=0.9, strided=4), probed_keys(mass=0.9), antidiagonal_blocks(mass=0.9), top_blocks(3))
    assert all(of_choice(rule).keys() <= known.keys() for rule in rules)


def test_strict_and_fastest_contradict_each_other():
    model = tiny()
    with pytest.raises(UserError, match="strict forbids"):
        apply(model, uniform(model, window(4)), backend="fastest", strict=True)


# Tile lists


@pytest.mark.parametrize("size", [16, 32, 48])
def test_lists_of_blocks_hold_each_causal_tile_once(size):
    n, tile = 200, 16
    layout = compile_layout([random_blocks(2, block=size), random_blocks(1, block=size, seed=3)], n)
    part_count, part, whole_count, whole = lists_of_blocks(layout.blocks, tile)
    mask = layout.dense(torch.arange(n), torch.arange(n))[0]
    tiles = -(-n // tile)
    for h in range(2):
        for t in range(tiles):
            rows = mask[h, t * tile : (t + 1) * tile]
            kept = [b for b in range(tiles) if rows[:, b * tile : (b + 1) * tile].any()]
            listed = whole[0, h, t, : whole_count[0, h, t]].tolist()
            assert listed == sorted(listed)
            assert sorted(listed + part[0, h, t, : part_count[0, h, t]].tolist()) == kept
            assert all(rows[:, b * tile : (b + 1) * tile].all() for b in listed)
    assert int(whole_count.sum()) > 0, "nothing is shown of whole tiles"


RULES = [sink(3) | window(40), window(9) | diagonals(100, 101, 150), dense()]


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton's interpreter")
def test_lists_of_a_rule_hold_each_tile_once_and_only_whole_ones_as_whole():
    n, tile = 200, 16
    layout = compile_layout(RULES, n)
    part_count, part, whole_count, whole = lists_of_rule(layout, tile)
    mask = layout.dense(torch.arange(n), torch.arange(n))[0]
    for h in range(len(RULES)):
        for t in range(-(-n // tile)):
            rows = mask[h, t * tile : (t + 1) * tile]
            listed = whole[0, h, t, : whole_count[0, h, t]].tolist()
            both = listed + part[0, h, t, : part_count[0, h, t]].tolist()
            needed = {b for b in range(t + 1) if rows[:, b * tile : (b + 1) * tile].any()}
            assert len(both) == len(set(both))
            assert needed <= set(both)
            assert all(rows[:, b * tile : (b + 1) * tile].all() for b in listed)
    assert int(whole_count[0, 2].sum()) == sum(range(-(-n // tile))), "a dense head's tiles below the diagonal are whole"


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton's interpreter")
@pytest.mark.parametrize("rule", [window(40), sink(3) | window(40), columns(*range(0, 190, 9)) | window(20), dense()], ids=str)
def test_triton_work_counts_every_pair_once(rule):
    """At least the kept pairs; at most those of tiles around the window, and one column of rows for each listed key."""
    call = make([rule, rule], 200, 200)
    amounts = cost_work.work(call, "triton")
    unit = 1e9 / (0.2 + 0.8 * 16 / 128)
    scores = sum(amounts[kind] for kind in ("whole", "partial", "single")) * unit
    kept = 2 * int(call.layout.pairs()[0, 0])
    assert kept <= scores <= kept + 2 * 256 * 256


def test_rows_of_lists_are_those_of_a_chunk():
    layout = compile_layout([random_blocks(2, block=16)], 160)
    lists = lists_of_blocks(layout.blocks, 16)
    chunk = lists.rows(3, 7, 7)
    assert chunk.part_count.shape == (1, 1, 4)
    assert chunk.whole.shape[-1] <= 7
    assert torch.equal(chunk.whole_count, lists.whole_count[:, :, 3:7])
    doubled = lists.per_query_head(3)
    assert doubled.whole.shape[1] == 3
    assert torch.equal(doubled.whole[:, 2], lists.whole[:, 0])
