"""Dynamic atoms: the laws that every one of them obeys, beside static ones too."""

from weakref import ref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attnsieve import Pattern, Spans, UserError, attend, compile_layout
from attnsieve.patterns import (
    columns,
    dense,
    diagonals,
    random_blocks,
    sink,
    top_blocks,
    vertical_slash,
    window,
)
from attnsieve.patterns.dynamic import CallAtom
from attnsieve.selection import choose
from attnsieve.selection.choose import _static_part
from attnsieve.testing import relative_error
from tests.laws.samples import atom_classes, dam
from tests.selection_samples import BLOCK, BLOCKWISE, SAMPLES, VOTING, mask, random_qk, shared


def test_every_dynamic_atom_has_a_sample():
    used = {type(atom) for pattern in SAMPLES for atom in pattern}
    assert atom_classes(CallAtom) <= used


@pytest.mark.parametrize("pattern", SAMPLES, ids=str)
def test_text_round_trips(pattern):
    assert Pattern.parse(str(pattern)) == pattern
    assert pattern.dynamic


@pytest.mark.parametrize("pattern", SAMPLES, ids=str)
def test_batch_mates_and_padding_do_not_matter(pattern):
    n, pads = 80, [0, 23, 64]
    q, k = random_qk(3, 4, 2, n)
    for b, pad in enumerate(pads):
        q[b, :, :pad], k[b, :, :pad] = torch.nan, torch.nan
    layout = choose([pattern] * 4, q, k, spans=Spans.left_padded(torch.tensor(pads), n, n))
    for b, pad in enumerate(pads):
        alone = choose([pattern] * 4, q[b : b + 1, :, pad:], k[b : b + 1, :, pad:])
        rows = torch.arange(n - pad)
        assert torch.equal(layout.dense(rows, rows)[b], alone.dense(rows, rows)[0])


@pytest.mark.parametrize("pattern", SAMPLES, ids=str)
def test_packed_documents_choose_alone(pattern):
    lengths = [30, 50]
    q, k = random_qk(1, 2, 1, 80)
    v = torch.randn_like(k)
    spans = Spans.packed(lengths)
    packed = attend(q, k, v, choose([pattern] * 2, q, k, spans=spans), spans=spans)
    start = 0
    for n in lengths:
        part = [tensor[:, :, start : start + n] for tensor in (q, k, v)]
        alone = attend(*part, choose([pattern] * 2, *part[:2]))
        assert relative_error(packed[:, :, start : start + n], alone) < 1e-6
        start += n


@pytest.mark.parametrize("pattern", SAMPLES, ids=str)
def test_masks_are_causal(pattern):
    assert not mask(pattern, *random_qk(1, 2, 2, 70)).triu(1).any()


@pytest.mark.parametrize("pattern", BLOCKWISE, ids=str)
def test_chunks_cut_at_block_borders_choose_the_same(pattern):
    n = 5 * BLOCK + 7
    q, k = random_qk(1, 2, 1, n)
    whole = mask(pattern, q, k)
    for start, stop in [(0, 2 * BLOCK), (2 * BLOCK, 4 * BLOCK), (4 * BLOCK, n)]:
        part = mask(pattern, q[:, :, start:stop], k[:, :, :stop])
        assert torch.equal(part, whole[:, :, start:stop, :stop])


@pytest.mark.parametrize("pattern", SAMPLES, ids=str)
def test_decode_chooses_for_its_own_row(pattern):
    q, k = random_qk(1, 2, 1, 61)
    alone = mask(pattern, q[:, :, -1:], k)
    noisy = q.clone()
    noisy[:, :, :-1] = 0
    assert torch.equal(alone, mask(pattern, noisy[:, :, -1:], k))
    assert alone.any()


def test_heads_choose_for_themselves_and_static_heads_stay_static():
    q, k = random_qk(2, 4, 2, 70)
    patterns = [dense(), vertical_slash(mass=0.5, probe=4), window(3), top_blocks(1, block=BLOCK) | sink(1)]
    layout = choose(patterns, q, k)
    rows = torch.arange(70)
    written = layout.dense(rows, rows)
    for h in (0, 2):
        assert torch.equal(written[:, h], patterns[h].keep(rows[:, None], rows[None, :]).expand(2, 70, 70))
    for h in (1, 3):
        alone = choose([patterns[h]], q[:, h : h + 1], k[:, h // 2 : h // 2 + 1])
        assert torch.equal(written[:, h], alone.dense(rows, rows)[:, 0])


def test_a_static_row_needs_no_choice():
    q, k = random_qk(2, 2, 1, 20)
    assert choose([window(3), dense()], q, k).sequences == 1


def test_late_starts_are_refused():
    q, k = random_qk(1, 1, 1, 20)
    with pytest.raises(UserError, match="without start"):
        choose([columns(0, start=4) | top_blocks(1)], q, k)


@pytest.mark.parametrize(
    "text",
    [
        "vertical_slash(mass=0)",
        "vertical_slash(band=0)",
        "probed_keys(rows=0)",
        "top_blocks(0)",
        "antidiagonal_blocks(block=30)",
        "pooled_blocks(ratio=2)",
    ],
)
def test_bad_settings_are_refused(text):
    with pytest.raises(UserError):
        Pattern.parse(text)


@pytest.mark.parametrize("pattern", VOTING, ids=str)
def test_a_group_that_shares_has_one_mask(pattern):
    q, k = random_qk(2, 6, 2, 70)
    layout = choose([shared(pattern)] * 6, q, k)
    assert layout.heads == 2
    rows = torch.arange(70)
    written = layout.dense(rows, rows)
    # Beside a head that has another rule the layout is per query head; the choice stays the same.
    mixed = choose([shared(pattern)] * 3 + [window(2)] * 2 + [window(3)], q, k)
    assert mixed.heads == 6
    assert torch.equal(mixed.dense(rows, rows)[:, :3], written[:, :1].expand(-1, 3, -1, -1))
    # A group of equal queries shares what each of them would choose.
    alike = q[:, ::3].repeat_interleave(3, 1)
    together, alone = (choose([rule] * 6, alike, k) for rule in (shared(pattern), pattern))
    assert torch.equal(together.dense(rows, rows).repeat_interleave(3, 1), alone.dense(rows, rows))
    v = torch.randn_like(k)
    assert relative_error(attend(alike, k, v, together), attend(alike, k, v, alone)) < 1e-6


def test_sharing_goes_by_the_mean_attention_of_the_group():
    q, k = random_qk(1, 2, 1, 50)
    kept = mask(shared(vertical_slash(mass=0.7, probe=50)), q, k)[0, 0]
    rows = torch.arange(50)
    attention = (q[0] @ k[0].mT * 8**-0.5).masked_fill(rows > rows[:, None], -torch.inf).softmax(-1)
    assert float((attention * kept).sum()) >= 0.7 * 100 - 1e-3


def test_sharing_needs_the_whole_group():
    q, k = random_qk(1, 4, 2, 30)
    rule = top_blocks(1, block=BLOCK, share="kv")
    with pytest.raises(UserError, match="whole KV groups of 2"):
        choose([rule, window(1), rule, rule], q, k)
    with pytest.raises(UserError, match="share must be"):
        top_blocks(1, share="all")


class Operations(TorchDispatchMode):
    """Names of the operations that a device would be given, and of those that wait for it or copy to it."""

    def __init__(self):
        super().__init__()
        self.names, self.waits = [], []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = str(operation)
        if not operation.is_view:
            self.names.append(name)
        if any(part in name for part in ("_local_scalar", "nonzero", "unique", "bincount", "lift_fresh", "masked_select")):
            self.waits.append(name)
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("pattern", SAMPLES, ids=str)
def test_a_choice_is_a_fixed_number_of_operations_and_never_waits(pattern):
    counts = []
    for batch, heads, kv_heads, spans in ((1, 4, 2, None), (3, 4, 2, None), (2, 12, 3, Spans.full(2, 70, 70))):
        q, k = random_qk(batch, heads, kv_heads, 70)
        choose([pattern] * heads, q, k, spans=spans)
        with Operations() as seen:
            choose([pattern] * heads, q, k, spans=spans)
        # DAM's threshold is rounded on the host; the longest list of single keys is read back.
        assert len(seen.waits) <= ("probed_keys" in str(pattern)) or "dam_online" in str(pattern)
        counts.append(len(seen.names))
    assert len(set(counts)) == 1
    assert counts[0] < 160


@pytest.mark.parametrize("n", [7, 20, 61, 300])
def test_static_heads_are_what_compiling_gives(n):
    """Static parts are compiled for more positions and cut, captured rows and blocks included."""
    row = [dam(33, (0, 7), (0, 1, 6)), random_blocks(1, block=8), sink(2) | window(5), columns(3) | diagonals(0, 4)]
    exact = compile_layout(row, n)
    q, k = random_qk(1, 4, 4, n)
    chosen = choose(row, q, k)
    rows = torch.arange(n)
    assert (chosen.length, chosen.pairs().tolist()) == (n, exact.pairs().tolist())
    assert torch.equal(chosen.dense(rows, rows), exact.dense(rows, rows))
    for tensor in (chosen.end, chosen.offset, chosen.corner, chosen.blocks.count, chosen.blocks.index):
        assert tensor.is_contiguous()
    v = torch.randn_like(k)
    assert relative_error(attend(q, k, v, chosen), attend(q, k, v, exact)) < 1e-6
    beside = choose([*row[:3], vertical_slash(mass=1.0, probe=2)], q, k)
    assert torch.equal(beside.dense(rows, rows)[:, :3], exact.dense(rows, rows)[:, :3])


def test_static_parts_go_with_their_patterns():
    """They lie on the device: without their plan nobody would free them."""
    q, k = random_qk(1, 2, 2, 20)
    row = [sink(3) | top_blocks(1), window(7) | top_blocks(1)]
    choose(row, q, k)
    kept = ref(_static_part(tuple(row), 256, q.device).layout)
    assert kept() is _static_part(tuple(row), 256, q.device).layout
    del row
    assert kept() is None
