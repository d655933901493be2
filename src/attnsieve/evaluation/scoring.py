"""What a model makes of a prompt: likelihood of a given answer, free generation, logits at chosen positions."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from attnsieve.errors import require
from attnsieve.evaluation.tokens import encode, shared_length, split_answer, stop_options
from attnsieve.hf.texts import ids_of

# Cache layers whose update makes new tensors instead of writing into old ones: copying the references is enough.
APPENDING = ("DynamicLayer", "DynamicSlidingWindowLayer")
# Prompt tokens that go through the model at once, and cached tokens that questions are asked over at once, in half precision.
PROMPT_TOKENS = {"cpu": 1 << 13, "cuda": 1 << 16}
CACHED_TOKENS = {"cpu": 1 << 17, "cuda": 1 << 18}
# A prompt and its answer, as text and as token ids.
Question = tuple[str, str]
Tokens = tuple[list[int], list[int]]


@dataclass(frozen=True, eq=False)
class AnswerScore:
    """Teacher-forced score of one answer: mean negative log-likelihood per token (nats), whether every token was the most
    likely one, and the logits [answer tokens, vocabulary] that say so."""

    nll: float
    exact: bool
    logits: Tensor | None = None


@torch.inference_mode()
def score_documents(model: Any, tokenizer: Any, documents: Iterable[Sequence[Question]]) -> Iterator[list[AnswerScore]]:
    """Teacher-forced scores of the (prompt, answer) pairs of every document, in order.

    What all prompts of a document have in common is computed once, but for models with recurrent states. Answers are fed token
    by token, as in generation: masks chosen from the input must not see answer tokens ahead of time. Neighbouring documents
    whose common parts are equally long go through the model as one batch, and so do their questions that are equally long; no
    result depends on batch mates.
    Raises UserError if the model returns NaN or infinite likelihoods, and for models that fill no cache of keys.
    """
    cut = ([split_answer(tokenizer, prompt, answer) for prompt, answer in questions] for questions in documents)
    stateful = False
    for batch in _batches(cut, _most(PROMPT_TOKENS, model)):
        cache = None if stateful else _read_shared(model, batch)
        stateful = stateful or _has_states(cache)
        yield from _score_batch(model, batch, None if stateful else cache)


def _most(tokens: dict[str, int], model: Any) -> int:
    """Half as many where numbers take twice the memory."""
    return 2 * tokens.get(model.device.type, tokens["cuda"]) // int(model.dtype.itemsize)


def _batches(documents: Iterable[list[Tokens]], most: int) -> Iterator[list[list[Tokens]]]:
    """Neighbours with equally long common parts, of at most `most` tokens together."""
    for _, alike in groupby(documents, _shared):
        batch: list[list[Tokens]] = []
        for document in alike:
            longest = max(len(prompt) for member in [*batch, document] for prompt, _ in member)
            if batch and (len(batch) + 1) * longest > most:
                yield batch
                batch = []
            batch.append(document)
        yield batch


def _shared(document: list[Tokens]) -> int:
    """How many leading tokens are computed once for all questions; none for a single one."""
    prompts = [prompt for prompt, _ in document]
    # Every prompt keeps a token of its own, whose forward pass gives the answer's first logits.
    return min(shared_length(prompts), min(map(len, prompts)) - 1) if len(prompts) > 1 else 0


def _read_shared(model: Any, batch: list[list[Tokens]]) -> Any:
    """The cache of what the questions of each document have in common, or None if that is nothing."""
    shared = _shared(batch[0])
    if not shared:
        return None
    ids = ids_of(model, [document[0][0][:shared] for document in batch])
    return _read(model, ids, None)[1]


def _read(model: Any, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """Logits after the last of `tokens`, and the cache that holds them too; None is a fresh one."""
    seen = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    if "past_key_values" not in seen and cache is None:
        # RecurrentGemma returns no cache, but fills one that it is given; a pass without any makes it forget its states.
        model(tokens[:, :1], use_cache=False)
        cache = DynamicCache(config=model.config)
        seen = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        require(
            any(getattr(layer, "is_initialized", False) for layer in cache.layers),
            f"{type(model).__name__} fills no cache of keys (past_key_values), with which answers are scored token by token: use "
            "tasks without answers, such as perplexity and fidelity",
        )
    return seen.logits[:, -1], seen.get("past_key_values", cache)


def _score_batch(model: Any, batch: list[list[Tokens]], cache: Any) -> list[list[AnswerScore]]:
    """cache: that of `_read_shared`, or None to read everything with each question."""
    shared = 0 if cache is None else _shared(batch[0])
    scores: dict[tuple[int, int], AnswerScore] = {}
    for places in _question_batches(batch, _most(CACHED_TOKENS if shared else PROMPT_TOKENS, model)):
        questions = [batch[row][number] for row, number in places]
        answers = [answer for _, answer in questions]
        rest = [prompt[shared:] for prompt, _ in questions]
        logits = _answer_logits(model, rest, answers, fork(cache, [row for row, _ in places]))
        for place, answer, seen in zip(places, answers, logits, strict=True):
            scores[place] = _answer_score(seen[: len(answer)], torch.tensor(answer, device=model.device))
    return [[scores[row, number] for number in range(len(document))] for row, document in enumerate(batch)]


def _has_states(cache: Any) -> bool:
    """Whether a cache has recurrent states, in its layers or (MiniMax) of its own: many models (Jamba, Bamba, Zamba) forget them when
    several tokens follow at once, so that questions over a shared document would be asked without it."""
    layers = () if cache is None else cache.layers
    return hasattr(cache, "linear_cache") or any(hasattr(layer, "recurrent_states") for layer in layers)


def _question_batches(batch: list[list[Tokens]], most: int) -> Iterator[list[tuple[int, int]]]:
    """(document, question) of questions whose prompts are equally long, of at most `most` tokens together."""
    lengths = {(row, number): len(prompt) for row, document in enumerate(batch) for number, (prompt, _) in enumerate(document)}
    for length in sorted(set(lengths.values())):
        places = [place for place, own in lengths.items() if own == length]
        step = max(1, most // length)
        yield from (places[start : start + step] for start in range(0, len(places), step))


@torch.inference_mode()
def generate(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, stop: str | None = None) -> str:
    """Greedy continuation of `prompt`, at most `max_new_tokens`, ended by EOS or by the last token of `stop`; with `stop`, which some
    models begin with, one token at least comes before (as in LongBench)."""
    ids = ids_of(model, [encode(tokenizer, prompt)])
    settings = copy.deepcopy(model.generation_config)
    settings.update(do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None, max_length=None)
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    if stop is not None:
        ends = [*ends, encode(tokenizer, stop)[-1]]
        settings.update(min_new_tokens=1)
    settings.update(eos_token_id=[end for end in ends if end is not None] or None, max_new_tokens=max_new_tokens)
    settings.pad_token_id = settings.pad_token_id if settings.pad_token_id is not None else 0
    stops = stop_options(settings, tokenizer)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings, **stops)
    text: str = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return text


@torch.inference_mode()
def log_probs_at(model: Any, ids: Sequence[int], positions: Tensor) -> Tensor:
    """float32 [positions, vocabulary]: log-probabilities of the token after each of `positions` (int64, ascending).

    Raises UserError for a model that ignores positions, and where one is NaN or infinite.
    """
    tokens = ids_of(model, [list(ids)])
    logits = model(tokens, use_cache=False, logits_to_keep=positions.to(model.device)).logits[0]
    require(logits.shape[0] == len(positions), f"{type(model).__name__} does not honour logits_to_keep with positions")
    log_probs: Tensor = logits.float().log_softmax(-1)
    require(bool(log_probs.isfinite().all()), "the model returned NaN or infinite logits: check its weights and dtype")
    return log_probs


def spread(length: int, most: int) -> Tensor:
    """int64: at most `most` of the positions 0 .. length - 1, evenly spread, the last one always among them."""
    count = min(length, most)
    return length - 1 - torch.arange(count - 1, -1, -1) * length // count


def fork(cache: Any, rows: Sequence[int] | None = None) -> Any:
    """A cache that can grow without changing `cache`, with these batch rows of it (all by default); None stays None."""
    if cache is None:
        return None
    fresh = copy.copy(cache)
    fresh.layers = [copy.copy(layer) if type(layer).__name__ in APPENDING else copy.deepcopy(layer) for layer in cache.layers]
    if rows is not None:
        # Selecting batch rows would leave recurrent states as they are; on the CPU: a bounded cache has no keys to be beside.
        fresh.reorder_cache(torch.tensor(rows))
    return fresh


def _answer_logits(model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], cache: Any) -> Tensor:
    """[question, longest answer, vocabulary]: logits before each answer token, given the rest of the prompt and the answer
    tokens before it. Prompts of one length; a shorter answer is followed by copies of its last token, which nothing reads."""
    longest = max(map(len, answers))
    ids = [[*prompt, *answer, *[answer[-1]] * (longest - len(answer))] for prompt, answer in zip(prompts, answers, strict=True)]
    tokens, start = ids_of(model, ids), len(prompts[0])
    steps = []
    for seen_tokens, upto in pairwise([0, *range(start, start + longest)]):
        last, cache = _read(model, tokens[:, seen_tokens:upto], cache)
        steps.append(last)
    return torch.stack(steps, dim=1)


def _answer_score(logits: Tensor, answer: Tensor) -> AnswerScore:
    chosen = logits.float().log_softmax(-1).gather(1, answer[:, None])
    nll = float(-chosen.mean())
    require(nll < float("inf"), f"the model gives the answer a likelihood of {-nll}: check its weights and dtype")
    return AnswerScore(nll, bool((logits.argmax(-1) == answer).all()), logits)
