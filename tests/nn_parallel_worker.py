"""Run by torchrun in two gloo processes: models sharded by transformers' tensor parallelism against whole ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers.distributed.configuration_utils import DistributedConfig

from attnsieve import UserError
from attnsieve.nn import DmaForCausalLM
from tests.nn_tiny import distinct_tokens, dma
from tests.test_nn_layers import OPTIONS


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded(model: DmaForCausalLM, folder: Path) -> DmaForCausalLM:
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    return DmaForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2), dtype=torch.float64)


def compare(attention: str, folder: Path) -> dict[str, float | bool]:
    """Errors of logits and gradients (relative), equal generation, and the elements of v_proj in this process."""
    model = dma(torch.float64, attention=attention, **{**OPTIONS[attention], "attention_bias": attention != "nsa"})
    split = sharded(model, folder / attention)
    ids = distinct_tokens(1, 30)
    text = [some.generate(ids, max_new_tokens=8, do_sample=False).tolist() for some in (model, split)]
    logits = (model(ids).logits - split(ids).logits).norm() / model(ids).logits.norm()
    for some in (model, split):
        some.train()(ids, labels=ids).loss.backward()
    grads = [
        float((whole(b.grad) - a.grad).norm() / a.grad.norm().clamp_min(1e-9))
        for a, b in zip(model.parameters(), split.parameters(), strict=True)
    ]
    first = split.model.layers[0]
    local = first.mlp.up_proj.weight.to_local().numel() / first.mlp.up_proj.weight.numel()
    return {"logits": float(logits), "gradients": max(grads), "same_text": text[0] == text[1], "share": local}


def refusal(folder: Path) -> str:
    """What one KV head in two processes is answered with."""
    try:
        sharded(dma(attention="mqa", num_key_value_heads=None), folder / "mqa")(distinct_tokens(1, 9))
    except UserError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    report = {attention: compare(attention, folder) for attention in ("dma", "gqa", "mla", "nsa")}
    answer = refusal(folder)
    if dist.get_rank() == 0:
        (folder / "report.json").write_text(json.dumps({"models": report, "refusal": answer}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
