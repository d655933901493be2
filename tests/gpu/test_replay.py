"""DMA's forward pass by its launches alone: what ordinary calls give, bit for bit, wherever it runs."""

import pytest
import torch

from attnsieve import replay
from attnsieve.nn import DynamicMaskAttention, dynamic_mask_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def inputs(n, batch=1, dtype=torch.bfloat16, seed=0, device="cuda"):
    torch.manual_seed(seed)
    make = lambda heads: torch.randn(batch, n, heads, 64, device=device, dtype=dtype).transpose(1, 2)  # noqa: E731
    weight, a = torch.randn(2, 128, device=device) * 0.1, torch.tensor([0.3, -0.2], device=device)
    return make(4), make(2), make(2), weight, a


def attend(q, k, v, weight, a, **rule):
    return dynamic_mask_attention(q, k, v, dt_weight=weight, A=a, backend="triton", **rule)


def ordinary(*tensors, **rule):
    can, replay._can_repeat = replay._can_repeat, lambda inputs: False
    try:
        return attend(*tensors, **rule)
    finally:
        replay._can_repeat = can


def replays():
    return [one for one in replay._known.values() if isinstance(one, replay.Replay)]


@pytest.fixture(autouse=True)
def _nothing_known():
    replay._known.clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("n", "rule"),
    [
        (300, {"keep_window_size": 64}),
        (1500, {"keep_window_size": 100, "window": 30, "sinks": 3}),
        (5001, {"keep_window_size": 256, "window": 16, "union": True}),
        (20000, {"keep_window_size": 512, "exponential": False}),
    ],
)
def test_replays_equal_ordinary_calls(n, rule, dtype):
    for seed in range(5):
        tensors = inputs(n, batch=2, dtype=dtype, seed=seed)
        assert torch.equal(attend(*tensors, **rule), ordinary(*tensors, **rule))
    assert len(replays()) == 1


def test_memory_is_reused_and_nothing_else_is_kept():
    for seed in range(3):
        attend(*inputs(8192, seed=seed), keep_window_size=512)
    tensors = inputs(8192)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = attend(*tensors, keep_window_size=512)
    assert torch.cuda.memory_allocated() - before == out.numel() * out.element_size()


def test_other_addresses_streams_and_graphs():
    rule = {"keep_window_size": 128}
    for _ in range(3):
        attend(*inputs(1000), **rule)
    assert len(replays()) == 1
    q, k, v, weight, a = inputs(1000, seed=7)
    expected = ordinary(q, k, v, weight, a, **rule)
    odd = torch.cat([q.new_zeros(1), v.transpose(1, 2).flatten()])[1:].view(1, 1000, 2, 64).transpose(1, 2)
    assert torch.equal(attend(q, k, odd, weight, a, **rule), expected)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(4):
            assert torch.equal(attend(q, k, v, weight, a, **rule), expected)
    assert len(replays()) == 2
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(q, k, v, weight, a, **rule)
    for seed in range(3):
        fresh = inputs(1000, seed=seed)
        for mine, theirs in zip((q, k, v, weight, a), fresh, strict=True):
            mine.copy_(theirs)
        graph.replay()
        assert torch.equal(out, ordinary(*fresh, **rule))


def test_a_module_in_inference_and_in_training():
    torch.manual_seed(0)
    layer = DynamicMaskAttention(2, 64, 100, bias=True, initial_A=0.3).cuda()
    q, k, v, _, _ = inputs(700, dtype=torch.float32)
    with torch.no_grad():
        found = [layer(q, k, v) for _ in range(4)]
    assert len(replays()) == 1
    out = layer(q, k, v)
    out.sum().backward()
    assert layer.A.grad is not None
    with torch.no_grad():
        layer.A.add_(0.5)
        changed = layer(q, k, v)
    with torch.inference_mode():
        assert torch.equal(layer(q, k, v), changed)
    assert all(torch.equal(one, out) for one in found)
    assert not torch.equal(changed, out)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device():
    for device in ("cuda:0", "cuda:1"):
        tensors = inputs(1000, device=device)
        expected = ordinary(*tensors, keep_window_size=128)
        for _ in range(4):
            assert torch.equal(attend(*tensors, keep_window_size=128), expected)
    assert len(replays()) == 2
