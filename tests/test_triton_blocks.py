"""Single keys listed for blocks of queries, interpreted: prefill, chunks, decode, shared and own masks, against the oracle."""

import pytest
import torch

from attnsieve import Pattern, Spans, UserError, attend
from attnsieve.backends.call import Call
from attnsieve.selection import choose
from attnsieve.testing import assert_within_budget
from tests.interpreter import needs_interpreter

pytestmark = [needs_interpreter, pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")]
KEYS = "sink(2) | window(9) | probed_keys(mass=0.7, block=32, rows=4{})"


def make(text, *, batch=1, group=4, kv_heads=1, q_len=None, n=150, spans=None, patterns=None):
    q_len = n if q_len is None else q_len
    q = 2 * torch.randn(batch, kv_heads * group, q_len, 24, dtype=torch.float16)
    k, v = (torch.randn(batch, kv_heads, n, 24, dtype=torch.float16) for _ in range(2))
    rows = patterns or [Pattern.parse(text)] * (kv_heads * group)
    spans = Spans.full(batch, q_len, n) if spans is None else spans
    return Call(q, k, v, choose(rows, q, k, spans=spans), spans, 24**-0.5, None)


def check(call):
    out, lse = attend(call.q, call.k, call.v, call.layout, spans=call.spans, backend="triton", return_lse=True)
    assert_within_budget(out, lse, call)


@pytest.mark.parametrize("share", ["", ', share="kv"'])
@pytest.mark.parametrize("q_len", [150, 77, 1])
def test_equals_the_oracle(share, q_len):
    check(make(KEYS.format(share), q_len=q_len, kv_heads=2))


def test_beside_offsets_static_heads_and_other_blocks():
    texts = [KEYS.format("") + " | diagonals(40, 41)", "window(3)", "probed_blocks(block=64, mass=0.5)", "dense()"]
    check(make("", patterns=[Pattern.parse(text) for text in texts]))


def test_sequences_choose_alone():
    check(make(KEYS.format(""), batch=2, n=120, spans=Spans.left_padded(torch.tensor([0, 51]), 120, 120)))


def test_gradients_are_refused():
    call = make(KEYS.format(""))
    with pytest.raises(UserError, match="no gradients"):
        attend(call.q.requires_grad_(), call.k, call.v, call.layout, backend="triton")
