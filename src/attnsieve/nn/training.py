"""Train a decoder on text with transformers' Trainer: one process, or several through torchrun or accelerate."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_utils import get_last_checkpoint

from attnsieve.errors import NotFiniteError, UserError, require
from attnsieve.nn.corpus import Endless, TokenBlocks, beginning, open_text
from attnsieve.nn.monitor import SelectionMonitor


@dataclass(frozen=True)
class TrainingSettings:
    """steps: optimizer steps, each of batch_size x accumulation x processes blocks of `length` tokens.

    learning_rate: its peak, reached after `warmup` steps, then a cosine to 0; AdamW, betas (0.9, 0.95), weight decay 0.1 on
    matrices only, gradients clipped to norm 1. precision: "float32" or "bfloat16" (autocast, float32 weights).
    log_every, save_every: in steps. checkpointing: recompute activations in the backward pass.
    """

    steps: int
    length: int
    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float = 1e-3
    warmup: int = 0
    precision: str = "float32"
    checkpointing: bool = False
    log_every: int = 10
    save_every: int = 500
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "length", "batch_size", "accumulation", "log_every", "save_every"):
            require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        require(self.learning_rate > 0, f"learning_rate must be positive, got {self.learning_rate}")
        require(0 <= self.warmup <= self.steps, f"warmup must lie between 0 and {self.steps} steps, got {self.warmup}")
        require(self.precision in ("float32", "bfloat16"), f"precision must be float32 or bfloat16, got {self.precision!r}")


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Path | Iterable[str],
    out: str | Path,
    settings: TrainingSettings,
    *,
    resume: bool = False,
) -> list[dict[str, Any]]:
    """Train `model` in place on `text` (see `open_text`) and save it, its tokenizer and log.jsonl in `out`.

    Returns the log: rows with step, loss, grad_norm, learning_rate and, for "dma" layers, the statistics of
    `selection_statistics` and the mean, least and largest A. Weights are safetensors. Checkpoints for `resume=True`, which
    continues the newest one, lie in `out`/checkpoint-STEP; their optimizer state is read with weights_only. run.json holds
    the settings, the model's configuration and a digest of the text's beginning. Text that runs out is read again.

    Raises UserError for text shorter than a block, blocks longer than the model's positions, a folder that already holds a
    run or a model (or no run, to resume), a resumed run whose settings, configuration or text differ, and a loss, gradient or
    weight that is not finite: what is seen when a row is logged or weights are to be saved, so that no checkpoint holds any.
    DMA's scores and biases are looked at in every step on a CPU.
    """
    most = getattr(model.config, "max_position_embeddings", settings.length)
    require(
        settings.length <= most, f"length {settings.length} is more than the model's {most} positions (max_position_embeddings)"
    )
    out = Path(out)
    newest = get_last_checkpoint(str(out)) if out.is_dir() else None
    require(not resume or newest is not None, f"{str(out)!r} holds no checkpoint to resume from")
    require(resume or newest is None, f"{str(out)!r} already holds a run: resume it, or choose another folder")
    require(
        resume or not (out / "config.json").exists(),
        f"{str(out)!r} holds a model, which this one would replace: choose another folder",
    )
    pieces = open_text(text)
    blocks = TokenBlocks(pieces, tokenizer, settings.length)
    _same_run(out / "run.json", asdict(settings) | {"text": beginning(pieces)}, model.config.to_diff_dict(), resume)
    if settings.checkpointing:
        # Renamed: the old name goes with transformers 6, versions that we still support lack the new one.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    with SelectionMonitor(model) as monitor:
        trainer = _MonitoredTrainer(
            model,
            _arguments(settings, out),
            data_collator=default_data_collator,  # blocks are full: nothing to pad
            train_dataset=Endless(blocks),
            processing_class=tokenizer,
        )
        trainer.watch(monitor)
        # Trainer's own callbacks print every logged row on stdout.
        trainer.remove_callback(ProgressCallback if settings.progress else PrinterCallback)
        if settings.progress:
            trainer.add_callback(_Progress())
        if newest is not None and int(newest.rpartition("-")[2]) >= settings.steps:
            _read_finished(trainer, model, newest)
        else:
            trainer.train(resume_from_checkpoint=newest)
    trainer.save_model(str(out))
    if trainer.is_world_process_zero():
        (out / "training_args.bin").unlink()  # a pickle that nobody needs
        rows = "".join(json.dumps(row) + "\n" for row in trainer.state.log_history)
        (out / "log.jsonl").write_text(rows, encoding="utf-8")
    return trainer.state.log_history


def _read_finished(trainer: Trainer, model: PreTrainedModel, checkpoint: str) -> None:
    """Weights and log of a run's last step; Trainer itself would take one step more."""
    model.load_state_dict(type(model).from_pretrained(checkpoint).state_dict())
    trainer.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))


def _same_run(path: Path, settings: dict[str, Any], model: dict[str, Any], resume: bool) -> None:
    """Write down what a run is; raise UserError where a resumed one is another."""
    now = json.loads(json.dumps(settings | {f"model.{name}": value for name, value in model.items()}))
    for irrelevant in ("progress", "model.transformers_version"):
        now.pop(irrelevant, None)
    if not resume:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
        return
    require(path.exists(), f"{path} is missing: without it nobody knows whether this is the run to be resumed")
    then = json.loads(path.read_text(encoding="utf-8"))
    then.setdefault("text", now["text"])  # older runs did not note it
    changed = [name for name in {**then, **now} if now.get(name) != then.get(name)]
    told = ", ".join(f"{name} {now.get(name)!r} (was {then.get(name)!r})" for name in changed)
    require(not changed, f"cannot resume with {told}: use the first settings, or another folder")


def _arguments(settings: TrainingSettings, out: Path) -> TrainingArguments:
    gpu, several = torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE", "1")) > 1
    return TrainingArguments(
        output_dir=str(out),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup,
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=settings.precision == "bfloat16",
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,  # it would show the mean of earlier losses instead
        save_steps=settings.save_every,
        save_total_limit=2,
        seed=settings.seed,
        use_cpu=not gpu,
        ddp_backend="gloo" if several and not gpu else None,
        dataloader_pin_memory=gpu,
        report_to="none",
        disable_tqdm=not settings.progress,
    )


class _MonitoredTrainer(Trainer):
    """Adds the monitor's numbers to every logged row and spares vectors from weight decay."""

    monitor: SelectionMonitor | None = None

    def watch(self, monitor: SelectionMonitor) -> None:
        self.monitor = monitor
        self.add_callback(_WatchLoggedSteps(monitor))
        self.add_callback(_RefuseToSaveNaN())

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices only: decay would pull A and the residual scales to 0."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One pass, in which layers may find numbers that are not finite before there is a loss."""
        try:
            loss: Tensor = super().training_step(*args, **kwargs)
        except NotFiniteError as error:
            if self.state.global_step == 0:  # the model came like this
                raise
            raise _diverged(error.found, self.args, self.state) from error
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        for name in ("loss", "grad_norm"):
            _require_finite(torch.as_tensor(logs.get(name, 0.0)), f"{name} is {logs.get(name)}", self.args, self.state)
        if self.monitor is not None and "loss" in logs:
            logs.update(self.monitor.take())
        super().log(logs, *args, **kwargs)


class _WatchLoggedSteps(TrainerCallback):
    """Watching costs a second selection, so it is done in steps that are logged."""

    def __init__(self, monitor: SelectionMonitor) -> None:
        self.monitor = monitor

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.monitor.active = (state.global_step + 1) % args.logging_steps == 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.monitor.active = False


class _RefuseToSaveNaN(TrainerCallback):
    """A step can spoil the weights between two that are logged."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if control.should_save:
            for name, parameter in model.named_parameters():
                values = parameter.detach()
                here = values.to_local() if isinstance(values, DTensor) else values
                _require_finite(here, f"{name} holds NaN or infinities", args, state)


def _require_finite(values: Tensor, told: str, args: Any, state: Any) -> None:
    if not bool(values.isfinite().all()):
        raise _diverged(told, args, state)


def _diverged(told: str, args: Any, state: Any) -> UserError:
    advice = f"take a lower learning rate (it was {args.learning_rate:g}) or more warmup"
    return UserError(f"training has diverged by step {state.global_step}: {told}; {advice}")


class _Progress(TrainerCallback):
    """A bar on stderr with the last loss."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        hidden = not state.is_world_process_zero
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="train", unit="step", disable=hidden)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()
