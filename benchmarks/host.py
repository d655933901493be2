"""What one call costs the host beside what it costs the device: attend and a plan's layer against torch's dense attention.

    python benchmarks/host.py [--seconds 35] [--out rows.jsonl]

A row's host_us is the time until a call returns, median over calls that find the device idle enough to take them; device_us is that
of a CUDA graph of the call; wall_us that of a call in a long row of them, the larger of the two if nothing is wrong.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from attnsieve import attend, compile_layout
from attnsieve.environment import environment
from attnsieve.hf import apply, fingerprint
from attnsieve.hf.geometry import attention_layers
from attnsieve.patterns import Pattern, columns, sink, window
from attnsieve.plan import Plan

# SmolLM2-135M's layers.
HEADS, KV_HEADS, WIDTH = 9, 3, 64
ROWS: dict[str, list[Pattern]] = {
    "sink(4) | window(1024)": [sink(4) | window(1024)] * HEADS,
    "a rule per head": [columns(*range(0, 4096, 97 + h)) | window(512 + 64 * h) for h in range(HEADS)],
}


def tensors(q_len: int, n: int) -> list[torch.Tensor]:
    sides = ((HEADS, q_len), (KV_HEADS, n), (KV_HEADS, n))
    return [torch.randn(1, t, heads, WIDTH, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for heads, t in sides]


def runs(q_len: int, n: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call."""
    q, k, v = tensors(q_len, n)
    dense = SDPBackend.CUDNN_ATTENTION if q_len > 1 else SDPBackend.FLASH_ATTENTION

    def sdpa() -> torch.Tensor:
        with sdpa_kernel(dense):
            return scaled_dot_product_attention(q, k, v, is_causal=q_len > 1, enable_gqa=True)

    yield f"sdpa {dense.name.lower()}", sdpa
    for name, row in ROWS.items():
        layout = compile_layout(row, n, "cuda")
        for backend in ("triton", "auto"):
            yield f"attend {backend}, {name}", lambda layout=layout, backend=backend: attend(q, k, v, layout, backend=backend)
        yield f"layer auto, {name}", layer(row, q, k, v)


def layer(row: list[Pattern], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], object]:
    """A call of transformers' attention interface under a plan; of the only layer, so spans are made at every call."""
    sizes = {"num_hidden_layers": 1, "intermediate_size": 16, "vocab_size": 16, "max_position_embeddings": 2**17}
    config = LlamaConfig(hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    apply(model, Plan(fingerprint(model), (tuple(row),), {}))
    module, function = attention_layers(model)[0].module, ALL_ATTENTION_FUNCTIONS["attnsieve"]
    return lambda: function(module, q, k, v, None, dropout=0.0, scaling=WIDTH**-0.5)


def host_us(run: Callable[[], object], calls: int = 60) -> float:
    times = []
    for call in range(calls):
        if call % 8 == 0:
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def wall_us(run: Callable[[], object], calls: int = 100) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls * 1e6


def device_us(run: Callable[[], object]) -> float:
    calls = 10
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    graph.replay()
    return wall_us(graph.replay, 10) / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=35.0, help="no row is begun later")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    start, about = time.monotonic(), environment()
    torch.set_grad_enabled(False)
    for q_len, n in ((8192, 8192), (1, 4096), (1, 8192), (256, 256)):
        for name, run in runs(q_len, n):
            if time.monotonic() - start > arguments.seconds:
                return
            for _ in range(5):
                run()
            times = {"host_us": host_us(run), "wall_us": wall_us(run)}
            try:
                times["device_us"] = device_us(run)
            except RuntimeError as error:
                times["device_us"] = None
                print(f"{name}: no graph ({str(error).splitlines()[0]})")
                torch.cuda.synchronize()
            row = {"run": name, "queries": q_len, "keys": n} | {key: us and round(us, 1) for key, us in times.items()}
            print(json.dumps(row), flush=True)
            if arguments.out:
                with arguments.out.open("a") as file:
                    file.write(json.dumps(row | {"environment": about}) + "\n")


if __name__ == "__main__":
    main()
