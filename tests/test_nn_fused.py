"""DMA's kernels in Triton's interpreter against plain torch; how many launches a call takes; and that they compile for a GPU."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from attnsieve import Spans
from attnsieve.nn import dynamic_mask_attention
from attnsieve.nn.fused import fused_ends
from attnsieve.nn.scores import key_scores
from attnsieve.nn.segments import Segments
from attnsieve.nn.selection import SelectionRule
from attnsieve.nn.selection_oracle import heap_ends
from attnsieve.testing import relative_error
from tests.gpu_compiler import compiled
from tests.interpreter import needs_interpreter


def scores(kind: str, n: int) -> torch.Tensor:
    if kind == "ties":
        values = torch.tensor([-torch.inf, -1.0, -0.0, 0.0, 1.0, torch.inf])
        return values[torch.randint(6, (1, 2, n))]
    if kind == "equal":
        return torch.zeros(1, 2, n)
    rising = torch.arange(n).float().expand(1, 2, n)
    return {"rising": rising, "falling": -rising, "random": torch.randn(1, 2, n)}[kind]


def fused(sigma: torch.Tensor, rule: SelectionRule, segments: Segments | None = None) -> torch.Tensor:
    from attnsieve.nn.selection_triton import ends

    start, stop = (None, None) if segments is None else (segments.start, segments.stop)
    return ends(sigma, start, stop, rule.keep_window_size, rule.window, rule.sinks, rule.union)


@pytest.fixture
def _short_blocks(monkeypatch):
    from attnsieve.nn import contenders_triton, selection_triton

    monkeypatch.setattr(selection_triton, "ROWS", 8)
    monkeypatch.setattr(selection_triton, "MOST", 40)
    monkeypatch.setattr(selection_triton, "LONG", (60, 3))
    monkeypatch.setattr(contenders_triton, "CHUNK", 16)
    monkeypatch.setattr(contenders_triton, "SAMPLES", 32)


@needs_interpreter
@pytest.mark.usefixtures("_short_blocks")
@pytest.mark.parametrize("kind", ["random", "ties", "equal", "rising", "falling"])
@pytest.mark.parametrize(("n", "budget"), [(1, 1), (7, 9), (40, 1), (41, 6), (66, 20), (67, 66), (150, 31)])
def test_ends_equal_those_of_the_heap(n, budget, kind):
    sigma = scores(kind, n)
    ends = fused(sigma, SelectionRule(budget))
    assert torch.equal(ends[0], torch.stack([heap_ends(row, budget) for row in sigma[0]]))


@needs_interpreter
@pytest.mark.usefixtures("_short_blocks")
@pytest.mark.parametrize("union", [False, True])
@pytest.mark.parametrize(
    "documents", [[(0, 75)], [(0, 30), (30, 75)], [(3, 20), (21, 24), (24, 70)], [(11, 12), (70, 75)]], ids=str
)
def test_documents_windows_and_sinks_equal_the_plain_ones(documents, union):
    sigma = scores("ties", 75).unflatten(1, (2, 1))[0]
    rows = [(1, start, stop - start, start, stop - start) for start, stop in documents]
    segments = Segments.of_spans(Spans.of([(0, 0, 30, 0, 30), *rows]), 2, 75)
    rule = SelectionRule(6, window=5, sinks=2, union=union)
    sigma[..., ::9] = torch.nan
    assert torch.equal(fused(sigma, rule, segments), rule.ends(sigma, segments, check_nan=False))


def edges(n: int) -> st.SearchStrategy[list[int]]:
    """Slots where documents begin and end, at the edges of blocks often."""
    return st.lists(st.one_of(st.integers(0, n), st.integers(0, n // 8).map(lambda x: 8 * x)), max_size=8).map(sorted)


@needs_interpreter
@pytest.mark.parametrize("most", [100, 0], ids=["one level", "two levels"])
@pytest.mark.parametrize("long", [100, 0], ids=["all keys", "contenders"])
@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate])
@given(data=st.data())
def test_documents_anywhere_equal_the_plain_ones(most, long, data):
    """Also where a program reads its keys in several steps."""
    from attnsieve.nn import contenders_triton, selection_triton

    n = data.draw(st.integers(8, 50))
    edge = data.draw(edges(n))
    # Every third run of slots is padding.
    rows = [(0, a, b - a, a, b - a) for x, (a, b) in enumerate(itertools.pairwise([0, *edge, n])) if x % 3 != 2]
    segments = data.draw(st.sampled_from([None, Segments.of_spans(Spans.of(rows), 1, n)]))
    sigma = torch.tensor(data.draw(st.lists(st.integers(-2, 2), min_size=2 * n, max_size=2 * n))).float().view(1, 2, n)
    window, sinks, union = data.draw(st.tuples(st.sampled_from([0, 1, 9, n]), st.sampled_from([0, 3]), st.booleans()))
    rule = SelectionRule(data.draw(st.integers(1, n)), window, sinks, union)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection_triton, "ROWS", 4)
        patch.setattr(selection_triton, "MOST", most)
        patch.setattr(selection_triton, "LONG", (long, 0))
        patch.setattr(selection_triton, "READ", ((16, 1), (16, 1)))
        patch.setattr(contenders_triton, "CHUNK", 8)
        patch.setattr(contenders_triton, "SAMPLES", 16)
        assert torch.equal(fused(sigma, rule, segments), rule.ends(sigma, segments))


@needs_interpreter
def test_selection_is_one_operation_of_a_graph():
    sigma = scores("random", 50)
    torch.compiler.reset()
    found = torch.compile(lambda x: fused_ends(x, None, 6, window=3), backend="aot_eager", fullgraph=True)(sigma)
    assert torch.equal(found, SelectionRule(6, window=3).ends(sigma))


@needs_interpreter
def test_segments_of_spans_equal_the_plain_ones():
    from attnsieve.nn.segments_triton import of_spans

    rows = [(2, 0, 0, 290, 10), (0, 0, 0, 0, 7), (0, 0, 0, 7, 1), (0, 0, 0, 8, 0), *((1, 0, 0, 3 * x, 2) for x in range(1, 30))]
    spans = Spans.of(rows)
    plain = Segments.of_spans(spans, 4, 300)
    for ours, expected in zip(of_spans(spans, 4, 300), (plain.start, plain.stop), strict=True):
        assert torch.equal(ours, expected)


@needs_interpreter
@pytest.mark.parametrize("exponential", [False, True])
@pytest.mark.parametrize(("dtype", "heads", "width", "bias"), [(torch.float32, 3, 20, True), (torch.bfloat16, 2, 16, False)])
def test_scores_and_their_gradients_equal_float64(dtype, heads, width, bias, exponential):
    from attnsieve.nn.scores_triton import FusedScores

    v = torch.randn(2, 70, heads, width).to(dtype).transpose(1, 2)
    given = [
        v,
        torch.randn(heads, heads * width) * 0.2,
        torch.randn(heads) if bias else None,
        torch.tensor([0.6, -0.4, 0.0])[:heads],
    ]
    results, probe = [], torch.randn(2, heads, 70)
    for kind in (None, torch.float64):
        inputs = [x if x is None else x.detach().to(kind or x.dtype).requires_grad_() for x in given]
        delta, sigma = FusedScores.apply(*inputs, exponential) if kind is None else key_scores(*inputs, exponential=exponential)
        leaves = [x for x in inputs if x is not None]
        results.append((delta, sigma, *torch.autograd.grad((delta * probe).sum(), leaves)))
    for place, (ours, exact) in enumerate(zip(*results, strict=True)):
        assert relative_error(ours, exact) < (1e-2 if place == 2 and dtype == torch.bfloat16 else 1e-5)


class Launches(TorchDispatchMode):
    """Torch operations that launch something, and kernels, in their order; none of either runs on a GPU."""

    def __init__(self, monkeypatch) -> None:
        super().__init__()
        from triton.runtime.interpreter import InterpretedFunction

        self.names: list[str] = []
        monkeypatch.setattr(InterpretedFunction, "run", lambda kernel, *_, **__: self.names.append(kernel.fn.__name__))
        # Tensors without memory stand for those of a GPU.
        monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
        stream = SimpleNamespace(cuda_stream=0)
        answers = {
            "current_device": -1,
            "get_device_capability": (8, 0),
            "current_stream": stream,
            "is_current_stream_capturing": False,
        }
        for question, answer in answers.items():
            monkeypatch.setattr(torch.cuda, question, lambda *_, answer=answer: answer)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if not function.is_view and not name.startswith(("aten.empty", "aten.new_empty", "aten.detach")):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def launches(monkeypatch, grad: bool = False, documents: int = 0, **rule) -> tuple[list[str], list[str]]:
    """Of the forward pass at 32K tokens, and of the backward pass."""
    make = lambda *shape, dtype=torch.float16: torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)  # noqa: E731
    q, k, v = make(1, 8, 32768, 64), make(1, 2, 32768, 64), make(1, 2, 32768, 64)
    weight, a = make(2, 128, dtype=torch.float32), make(2, dtype=torch.float32)
    spans = Spans(*(torch.empty(5, documents, dtype=torch.int64, device="meta"))) if documents else None
    with monkeypatch.context() as patch, Launches(patch) as counted:
        out = dynamic_mask_attention(q, k, v, dt_weight=weight, A=a, spans=spans, backend="triton", **rule)
        forward, counted.names = counted.names, []
        if grad:
            torch.autograd.grad(out, [q, k, v, weight, a], torch.empty_like(out))
    return forward, counted.names


@needs_interpreter
@pytest.mark.parametrize("rule", [{"keep_window_size": 1024}, {"keep_window_size": 1024, "window": 64, "sinks": 4}], ids=str)
def test_the_host_queues_few_launches_before_attention(monkeypatch, rule):
    forward, _ = launches(monkeypatch, **rule)
    assert forward[-1] == "forward_kernel"
    assert len(forward) <= 16, forward


@needs_interpreter
def test_documents_add_few(monkeypatch):
    forward, _ = launches(monkeypatch, documents=3, keep_window_size=1024)
    assert len(forward) <= 21, forward


@needs_interpreter
def test_training_takes_few_launches(monkeypatch):
    forward, backward = launches(monkeypatch, grad=True, keep_window_size=2048)
    assert len(forward) <= 16, forward
    assert len(backward) <= 17, backward


PROGRAM = """
import torch
from attnsieve.nn.scores_triton import FusedScores
from attnsieve import Spans
from attnsieve.nn.segments_triton import of_spans
from attnsieve.nn.selection_triton import ends

of_spans(Spans.packed([100, 200]), 1, 300)
for n in (1024, 8192, 16384):
    start = torch.zeros(1, n, dtype=torch.int32)
    for documents in ((None, None), (start, start)):
        ends(torch.zeros(1, 2, n), *documents, 256, 16, 2, True)
for dtype in (torch.float32, torch.bfloat16):
    v, weight, a = (torch.zeros(size, requires_grad=True) for size in ((1, 2, 300, 64), (2, 128), (2,)))
    delta, _ = FusedScores.apply(v.to(dtype), weight, a, a, True)
    delta.sum().backward()
"""


def test_kernels_compile_for_a_gpu():
    pytest.importorskip("triton")
    contenders = {"_sample_kernel", "_begin_kernel", "_bound_kernel", "_admit_kernel"}
    selection = contenders | {"_descend_kernel", "_drop_kernel"}
    assert set(compiled(PROGRAM)) == selection | {"_segments_kernel", "_scores_kernel", "_gradients_kernel"}
