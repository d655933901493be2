"""Run by torchrun in two gloo processes: one Trainer run, and one FSDP2 step against the unsharded model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from attnsieve.nn.training import train
from tests.nn_text import characters, sentences
from tests.test_nn_training import fresh, settings


def together(tensor: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.stack(parts)


def sharded_step() -> tuple[float, int]:
    """Relative gradient error of FSDP2 against one process, and the elements of A on this rank."""
    ids = torch.randint(2, 30, (1, 40), generator=torch.Generator().manual_seed(0))
    plain, model = fresh(), fresh()
    plain(ids, labels=ids).loss.backward()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    model(ids, labels=ids).loss.backward()
    errors = []
    for expected, parameter in zip(plain.parameters(), model.parameters(), strict=True):
        difference = parameter.grad.full_tensor() - expected.grad
        errors.append(float(difference.norm() / expected.grad.norm().clamp_min(1e-12)))
    return max(errors), model.model.layers[0].self_attn.A.to_local().numel()


def main(folder: Path) -> None:
    model = fresh()
    log = train(model, characters(), [sentences(200)], folder / "run", settings(steps=10, learning_rate=1e-2))
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    agree = bool((together(flat)[0] == together(flat)[1]).all())
    error, elements = sharded_step()
    if dist.get_rank() == 0:
        losses = [row["loss"] for row in log if "loss" in row]
        report = {"ranks_agree": agree, "losses": losses, "sharded_error": error, "sharded_A": elements}
        (folder / "report.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
