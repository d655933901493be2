"""What `auto` chooses on a GPU: always exact, named in reports, by measured costs where this GPU was measured."""

from importlib import import_module

import pytest
import torch

from attnsieve import Plan, Spans, attend, compile_layout
from attnsieve.attention import BACKENDS, choose_backend
from attnsieve.backends import cost
from attnsieve.backends.call import Call
from attnsieve.bench.masks import mask
from attnsieve.hf import apply, fingerprint
from attnsieve.hf.random_model import random_model
from attnsieve.patterns import dense, sink, vertical_slash, window
from attnsieve.selection import choose
from attnsieve.testing import assert_within_budget
from tests.gpu.quiet import best_ms

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
# A prediction may be off by this factor: choices among backends that are closer than that do not matter.
TOLERATED = 1.5


def make(layout, n, q_len=None, heads=8, kv_heads=2, width=128):
    q_len = n if q_len is None else q_len
    draw = lambda count, length: torch.randn(1, count, length, width, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    return Call(draw(heads, q_len), draw(kv_heads, n), draw(kv_heads, n), layout, Spans.full(1, q_len, n, "cuda"), width**-0.5)


LAYOUTS = {
    "dense": lambda n: compile_layout([dense()] * 8, n, "cuda"),
    "window": lambda n: compile_layout([window(200)] * 8, n, "cuda"),
    "sink and window": lambda n: compile_layout([sink(4) | window(200)] * 8, n, "cuda"),
    "blocks": lambda n: mask("blocks-25", n, 8, "cuda"),
    "columns": lambda n: mask("columns-5", n, 8, "cuda"),
    "selected": lambda n: mask("dma-512", n, 2, "cuda"),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("n", "q_len"), [(300, 300), (2048, 2048), (2048, 1), (2048, 128)])
def test_auto_is_exact(name, n, q_len):
    call = make(LAYOUTS[name](max(n, 1100)), n, q_len)
    out, lse = attend(call.q, call.k, call.v, call.layout, return_lse=True)
    assert_within_budget(out, lse, call)
    assert choose_backend(call) in BACKENDS


def test_choosing_waits_for_nothing_once_a_layout_is_known():
    call = make(LAYOUTS["blocks"](2048), 2048)
    chosen = choose_backend(call)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert choose_backend(call) == chosen
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_choosing_for_keys_of_one_call_never_waits():
    call = make(compile_layout([dense()] * 8, 512, "cuda"), 512)
    layout = choose([vertical_slash(mass=0.5)] * 8, call.q, call.k)
    fresh = make(layout, 512)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert choose_backend(fresh) == "triton"
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("n", [8192, 32768])
@pytest.mark.parametrize("name", ["blocks-10", "C", "dense()"])
def test_predictions_are_near_what_is_measured(name, n):
    call = make(mask(name, n, 32, "cuda"), n, heads=32, kv_heads=8)
    known = cost.predict(call, [b for b in ("triton", "fa4", "dense") if b != "dense" or name == "dense()"])
    if not known:
        pytest.skip("this GPU was never measured: benchmarks/fit_cost.py")
    for backend, predicted in known.items():
        if import_module(BACKENDS[backend]).why_not(call) is not None:
            continue
        run = lambda backend=backend: attend(call.q, call.k, call.v, call.layout, backend=backend)  # noqa: E731
        assert predicted / TOLERATED <= best_ms(run, predicted) <= predicted * TOLERATED, backend


def test_reports_name_who_computed():
    model = random_model("tiny", "cuda", torch.bfloat16)
    ids = torch.randint(60, (1, 300), device="cuda")
    plan = Plan.uniform(fingerprint(model), sink(1) | window(20))
    with apply(model, plan) as handle, torch.inference_mode():
        model(ids)
    assert sum(layer.backends.total() for layer in handle.report().layers) == 2


needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@needs_two
def test_kernels_run_where_the_tensors_are():
    torch.cuda.set_device(0)
    q, k, v = (torch.randn(1, 2, 300, 64, device="cuda:1", dtype=torch.bfloat16) for _ in range(3))
    layout = choose([vertical_slash(mass=0.5), sink(2) | window(9)], q, k)
    call = Call(q, k, v, layout, Spans.full(1, 300, 300, q.device), 0.125)
    assert_within_budget(*attend(q, k, v, layout, return_lse=True, backend="triton"), call)


@needs_two
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("q_len", [2048, 1])
def test_auto_is_exact_on_another_gpu_than_the_current_one(name, q_len):
    torch.cuda.set_device(0)
    call = make(LAYOUTS[name](2048), 2048, q_len)
    q, k, v, layout = (part.to("cuda:1") for part in (call.q, call.k, call.v, call.layout))
    call = Call(q, k, v, layout, Spans.full(1, q_len, 2048, "cuda:1"), call.scale)
    assert_within_budget(*attend(q, k, v, layout, return_lse=True), call)


@needs_two
def test_a_model_on_another_gpu_than_the_current_one_generates_the_same():
    """Prompt and decode steps, with transformers' cache and with the one that drops keys."""
    torch.cuda.set_device(0)
    model = random_model("tiny", "cuda:0", torch.float32)
    ids = torch.randint(60, (2, 300), device="cuda:0")
    plan, options = Plan.uniform(fingerprint(model), sink(1) | window(20)), {"max_new_tokens": 8, "do_sample": False}
    texts = []
    for device in ("cuda:0", "cuda:1"):
        model.to(device)
        with apply(model, plan) as handle:
            texts.append(model.generate(ids.to(device), **options).cpu())
            texts.append(model.generate(ids.to(device), past_key_values=handle.cache(512), **options).cpu())
    assert all(torch.equal(text, texts[0]) for text in texts)
