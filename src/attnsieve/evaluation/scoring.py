"""What a model makes of a prompt: likelihood of a given answer, free generation, logits at chosen positions."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from attnsieve.errors import require
from attnsieve.evaluation.tokens import encode, shared_length, split_answer

# Cache layers whose update makes new tensors instead of writing into old ones: copying the references is enough.
APPENDING = ("DynamicLayer", "DynamicSlidingWindowLayer")


@dataclass(frozen=True)
class AnswerScore:
    """Teacher-forced score of one answer: mean negative log-likelihood per token (nats), and whether every token was the
    most likely one."""

    nll: float
    exact: bool


@torch.inference_mode()
def score_answers(model: Any, tokenizer: Any, questions: Sequence[tuple[str, str]]) -> list[AnswerScore]:
    """Teacher-forced scores of (prompt, answer) pairs. What all prompts have in common is computed once.

    Answers are fed token by token, as in generation: masks chosen from the input must not see answer tokens ahead of time.
    Prompts of equal length go through the model as one batch.
    Raises UserError if the model returns NaN or infinite likelihoods.
    """
    parts = [split_answer(tokenizer, prompt, answer) for prompt, answer in questions]
    shared, cache = _prefill(model, [prompt for prompt, _ in parts])
    scores: dict[int, AnswerScore] = {}
    for length in sorted({len(prompt) for prompt, _ in parts}):
        batch = [index for index, (prompt, _) in enumerate(parts) if len(prompt) == length]
        answers = [parts[index][1] for index in batch]
        logits = _answer_logits(model, [parts[index][0][shared:] for index in batch], answers, fork(cache, len(batch)))
        for index, answer, row in zip(batch, answers, logits, strict=True):
            scores[index] = _answer_score(row[: len(answer)].float(), torch.tensor(answer, device=model.device))
    return [scores[index] for index in range(len(parts))]


@torch.inference_mode()
def generate(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, stop: str | None = None) -> str:
    """Greedy continuation of `prompt`, at most `max_new_tokens`, ended by EOS or by the last token of `stop`."""
    ids = torch.tensor([encode(tokenizer, prompt)], device=model.device)
    settings = copy.deepcopy(model.generation_config)
    settings.update(do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None, max_length=None)
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    if stop is not None:
        ends = [*ends, encode(tokenizer, stop)[-1]]
    settings.update(eos_token_id=[end for end in ends if end is not None] or None, max_new_tokens=max_new_tokens)
    settings.pad_token_id = settings.pad_token_id if settings.pad_token_id is not None else 0
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    text: str = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return text


@torch.inference_mode()
def log_probs_at(model: Any, ids: Sequence[int], positions: Tensor) -> Tensor:
    """float32 [positions, vocabulary]: log-probabilities of the token after each of `positions` (int64, ascending)."""
    tokens = torch.tensor([list(ids)], device=model.device)
    logits = model(tokens, use_cache=False, logits_to_keep=positions.to(model.device)).logits[0]
    require(logits.shape[0] == len(positions), f"{type(model).__name__} does not honour logits_to_keep with positions")
    log_probs: Tensor = logits.float().log_softmax(-1)
    require(bool(log_probs.isfinite().all()), "the model returned NaN or infinite logits: check its weights and dtype")
    return log_probs


def spread(length: int, most: int) -> Tensor:
    """int64: at most `most` of the positions 0 .. length - 1, evenly spread, the last one always among them."""
    count = min(length, most)
    return length - 1 - torch.arange(count - 1, -1, -1) * length // count


def fork(cache: Any, copies: int = 1) -> Any:
    """A cache that can grow without changing `cache`, its batch repeated `copies` times; None stays None."""
    if cache is None:
        return None
    fresh = copy.copy(cache)
    fresh.layers = [copy.copy(layer) if type(layer).__name__ in APPENDING else copy.deepcopy(layer) for layer in cache.layers]
    if copies > 1:
        fresh.batch_repeat_interleave(copies)
    return fresh


def _prefill(model: Any, prompts: Sequence[Sequence[int]]) -> tuple[int, Any]:
    """How many leading tokens the prompts share, and the cache that holds them; 0 and None for a single prompt."""
    if len(prompts) == 1:
        return 0, None
    # Every prompt keeps a token of its own, whose forward pass gives the answer's first logits.
    shared = min(shared_length(prompts), min(map(len, prompts)) - 1)
    if shared == 0:
        return 0, None
    ids = torch.tensor([list(prompts[0][:shared])], device=model.device)
    return shared, model(ids, use_cache=True, logits_to_keep=1).past_key_values


def _answer_logits(model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], cache: Any) -> Tensor:
    """[question, longest answer, vocabulary]: logits before each answer token, given the rest of the prompt and the answer
    tokens before it. Prompts of one length; a shorter answer is followed by copies of its last token, which nothing reads."""
    longest = max(map(len, answers))
    ids = [[*prompt, *answer, *[answer[-1]] * (longest - len(answer))] for prompt, answer in zip(prompts, answers, strict=True)]
    tokens, start = torch.tensor(ids, device=model.device), len(prompts[0])
    steps = []
    for seen_tokens, upto in pairwise([0, *range(start, start + longest)]):
        seen = model(tokens[:, seen_tokens:upto], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = seen.past_key_values
        steps.append(seen.logits[:, -1])
    return torch.stack(steps, dim=1)


def _answer_score(logits: Tensor, answer: Tensor) -> AnswerScore:
    chosen = logits.log_softmax(-1).gather(1, answer[:, None])
    nll = float(-chosen.mean())
    require(nll < float("inf"), f"the model gives the answer a likelihood of {-nll}: check its weights and dtype")
    return AnswerScore(nll, bool((logits.argmax(-1) == answer).all()))
