"""Schedules of the Triton backend, interpreted: every kept pair is served once, by lists that hold no more than they must; layouts
chosen from the input are scheduled without reading the device; every kernel that builds a schedule compiles for an H100."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attnsieve import attend, compile_layout
from attnsieve.bench.masks import selected
from attnsieve.layout import Layout
from attnsieve.patterns import (
    Atom,
    Pattern,
    columns,
    dam_online,
    diagonals,
    heavy_hitters,
    pooled_blocks,
    probed_keys,
    random_blocks,
    sink,
    vertical_slash,
    voted_keys,
    window,
)
from attnsieve.selection import choose
from attnsieve.testing import relative_error
from tests.gpu_compiler import compiled
from tests.interpreter import INTERPRETED, needs_interpreter
from tests.laws.samples import dam

N = 120
ROWS, KEYS = 32, 16


def chosen(pattern, n=N):
    return choose([pattern] * 2, 2 * torch.randn(1, 2, n, 8), torch.randn(1, 1, n, 8))


@dataclass(frozen=True, repr=False)
class Chunk(Atom):
    """A user's own rule, whose ends are not those of a window: keys of the query's own chunk."""

    tokens: int
    name = "chunk"

    def keep(self, i, j):
        return i // self.tokens == j // self.tokens

    def end(self, n):
        return (torch.arange(n) // self.tokens + 1) * self.tokens

    def arguments(self):
        return [self.tokens], {}


def irregular():
    """Ends of every kind: columns, keys that die anywhere, keys that nothing sees."""
    end = torch.randint(0, 200, (2, 2, N)).masked_fill_(torch.rand(2, 2, N) < 0.05, 2**31 - 1)
    return Layout(N, end.int(), torch.rand(2, 2, N) < 0.02)


LAYOUTS = {
    "windows": lambda: compile_layout([window(40), sink(3) | window(9)], N),
    "columns": lambda: compile_layout([columns(0, 21, 90) | window(9), columns(*range(40, 60), 100)], N),
    "diagonals": lambda: compile_layout([diagonals(*range(50, 120)) | window(3), diagonals(0, 77) | columns(5, 40)], N),
    "blocks": lambda: compile_layout([random_blocks(2, block=16), random_blocks(1, block=32, seed=1) | columns(7)], N),
    "narrow blocks of queries": lambda: compile_layout([random_blocks(2, block=24)], N),
    "corner": lambda: compile_layout([dam(40, (3, 90), (0, 1, 60)), window(5)], N),
    "selected": lambda: selected(N, 2, "cpu", 12),
    "selected, with offsets": lambda: replace(selected(N, 2, "cpu", 12), offset=torch.rand(1, 2, N) < 0.1),
    "irregular": irregular,
    "chosen columns and offsets": lambda: chosen(vertical_slash(mass=0.3, probe=8) | window(4)),
    "chosen blocks": lambda: chosen(pooled_blocks(ratio=0.5, block=16) | sink(2)),
    "chosen keys": lambda: chosen(probed_keys(mass=0.6, block=32, rows=3) | window(12)),
    "chosen ends": lambda: chosen(heavy_hitters(6, 5, block=16)),
}
BEYOND_END = ("corner", "narrow blocks of queries", "irregular", "chosen ends")


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch):
    """Several programs for the keys of a head, as in long layouts."""
    if INTERPRETED:
        from attnsieve.backends.triton import survey, vectors

        monkeypatch.setattr(survey, "CHUNK", 64)
        monkeypatch.setattr(vectors, "CHUNK", 64)


def entries(lists, index):
    """The wholly kept items and the others of one list."""
    start, whole, count = (int(part.flatten()[index]) for part in (lists.start, lists.whole, lists.count))
    items = lists.items.flatten()[start : start + count].tolist()
    return items[:whole], items[whole:]


def listed_pairs(layout, built, z, h, keep):
    """bool [n, n]: pairs that a query tile's list of single keys serves."""
    pairs = torch.zeros_like(keep)
    if built.singles is None:
        return pairs
    rows = torch.arange(N)[:, None]
    end, by_end = layout.end[z, h], rows < layout.end[z, h]
    if layout.offset is not None:
        by_end = by_end | layout.offset[z, h][(rows - torch.arange(N)).clamp_min(0)]
    for t in range(built.mask.tiles):
        i = slice(t * ROWS, (t + 1) * ROWS)
        whole, rest = entries(built.singles, (z * layout.heads + h) * built.mask.tiles + t)
        assert len({*whole, *rest}) == len(whole) + len(rest)
        of_list = torch.zeros(N, dtype=torch.bool)
        of_list[whole + rest] = True
        serves = keep[i] & of_list & (~by_end[i] if built.listed == 3 else rows[i] < end)
        assert serves[:, whole].all()
        pairs[i] = serves
    return pairs


@needs_interpreter
@pytest.mark.parametrize(
    ("name", "listing"), [*((name, True) for name in LAYOUTS), ("columns", False), ("selected, with offsets", False)]
)
@pytest.mark.parametrize("root", [1024, 64], ids=["", "roots"])
def test_every_kept_pair_is_served_once(name, listing, root, monkeypatch):
    from attnsieve.backends.triton import key_lists
    from attnsieve.backends.triton.schedule import schedule, tiles_by_key

    monkeypatch.setattr(key_lists, "ROOT", root)
    monkeypatch.setattr(key_lists, "LONG", root)
    layout = LAYOUTS[name]()
    built = schedule(layout, ROWS, KEYS, listing=listing)
    by_key = None if built.tiles is None else tiles_by_key(layout, built)
    for z in range(layout.sequences):
        for h in range(layout.heads):
            keep = layout.keep(z, h, torch.arange(N)[:, None], torch.arange(N)[None, :])
            left = listed_pairs(layout, built, z, h, keep)
            served, reverse = left.clone(), {}
            for t in range(built.mask.tiles if built.tiles is not None else 0):
                whole, part = entries(built.tiles, (z * layout.heads + h) * built.mask.tiles + t)
                assert sorted(whole) == whole
                assert sorted(part) == part
                for b in whole + part:
                    pairs = slice(t * ROWS, (t + 1) * ROWS), slice(b * KEYS, (b + 1) * KEYS)
                    assert b not in whole or (keep[pairs].all() and not left[pairs].any())
                    assert keep[pairs].any() or name in BEYOND_END
                    served[pairs] |= keep[pairs]
                    reverse.setdefault(b, ([], []))[b not in whole].append(t)
            assert torch.equal(served, keep)
            for b in range(-(-N // KEYS) if by_key is not None else 0):
                assert entries(by_key, (z * layout.heads + h) * -(-N // KEYS) + b) == reverse.get(b, ([], []))


@needs_interpreter
def test_keys_are_listed_where_they_are_too_few_for_their_tile():
    from attnsieve.backends.triton.schedule import schedule

    built = schedule(LAYOUTS["columns"](), ROWS, KEYS)
    # Keys 48 to 59 fill three quarters of a tile.
    for h, expected in enumerate([[0, 21, 90], [*range(40, 48), 100]]):
        assert built.singles.items[0, h, : len(expected) + 1].tolist() == [*expected, 2**31 - 1]


class Reading(TorchDispatchMode):
    """Counts values that the host asks for."""

    reads = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        self.reads += operation is torch.ops.aten._local_scalar_dense.default
        return operation(*arguments, **(options or {}))


@needs_interpreter
@pytest.mark.parametrize(
    "pattern",
    [
        vertical_slash(mass=0.3, probe=8) | window(4),
        dam_online(tau=0.05, mu=0.3, probe=8),
        pooled_blocks(ratio=0.5, block=16) | sink(2),
        probed_keys(mass=0.3, block=32, rows=3) | window(4),
    ],
    ids=str,
)
def test_chosen_layouts_are_not_read(pattern):
    from attnsieve.backends.triton.schedule import schedule, tiles_by_key

    layout = chosen(pattern)
    with Reading() as host:
        built = schedule(layout, ROWS, KEYS)
        tiles_by_key(layout, built)
    assert host.reads == 0
    with Reading() as host:
        schedule(replace(layout, passing=False, windows=False), ROWS, KEYS)
    assert host.reads > 0


@needs_interpreter
@pytest.mark.parametrize(("rule", "windows"), [(Pattern.of(Chunk(20)), False), (window(20) | sink(3), True)], ids=str)
def test_rules_beside_a_choice_may_have_ends_of_any_kind(rule, windows):
    q, k, v = (torch.randn(1, 2, N, 16) for _ in range(3))
    layout = choose([voted_keys(5, probe=4) | rule, window(7)], q, k)
    assert layout.windows == windows
    assert relative_error(attend(q, k, v, layout, backend="triton"), attend(q, k, v, layout, backend="reference")) < 1e-5


@needs_interpreter
@pytest.mark.parametrize("root", [1024, 64], ids=["", "roots"])
def test_words_say_which_rows_keep_the_listed_keys_that_not_all_keep(root, monkeypatch):
    n, rows, keys = 300, 32, 16
    from attnsieve.backends.triton import key_lists
    from attnsieve.backends.triton.schedule import schedule

    monkeypatch.setattr(key_lists, "ROOT", root)
    monkeypatch.setattr(key_lists, "LONG", root)
    layout = selected(n, 2, "cpu", 70)
    built = schedule(layout, rows, keys)
    kept = layout.dense(torch.arange(n), torch.arange(n))[0]
    words = built.marks.words.view(2, -1, built.marks.chunks, rows)
    start, whole, count, items = built.singles
    for head, tile in torch.cartesian_prod(torch.arange(2), torch.arange(-(-n // rows))).tolist():
        listed = items[start.view(2, -1)[head, tile] + torch.arange(int(count[0, head, tile]))]
        assert torch.equal(listed.sort().values, kept[head, tile * rows : (tile + 1) * rows].any(0).nonzero()[:, 0].int())
        assert kept[head, tile * rows : (tile + 1) * rows, listed[: int(whole[0, head, tile])].long()].all()
        first = int(whole[0, head, tile]) // keys * keys
        listed = items[start.view(2, -1)[head, tile] + torch.arange(first, int(count[0, head, tile]))].long()
        place = torch.arange(len(listed))
        bits = (words[head, tile, place // keys] >> (place % keys)[:, None]) & 1
        expected = kept[head, tile * rows : (tile + 1) * rows, listed].T
        assert torch.equal(bits[:, : expected.shape[1]].bool(), expected)


@needs_interpreter
def test_stretches_as_long_as_roots_are_the_roots(monkeypatch):
    n, root = 300, 64
    from attnsieve.backends.triton import key_lists
    from attnsieve.backends.triton.schedule import schedule, stretches

    monkeypatch.setattr(key_lists, "ROOT", root)
    monkeypatch.setattr(key_lists, "LONG", root)
    layout = selected(n, 2, "cpu", 70)
    built = schedule(layout, 32, 16)
    made = layout.schedule("triton root", lambda: pytest.fail("query tiles are listed without roots"))
    lists, longest = stretches(layout, built, root)
    assert lists.items is made.items
    kept = layout.dense(torch.arange(n), torch.arange(n))[0]
    for head, tile in torch.cartesian_prod(torch.arange(2), torch.arange(-(-n // root))).tolist():
        rows = kept[head, tile * root : (tile + 1) * root]
        whole, rest = entries(lists, head * -(-n // root) + tile)
        assert len(whole) + len(rest) <= longest
        assert sorted(whole + rest) == rows.any(0).nonzero()[:, 0].tolist()
        assert rows[:, whole].all()


@needs_interpreter
def test_kernels_compute_the_rule_where_words_would_be_too_many(monkeypatch):
    from attnsieve.backends.triton import schedule as room

    monkeypatch.setattr(room, "_MOST_WORDS", 0)
    layout = selected(150, 2, "cpu", 40)
    q, k, v = (torch.randn(1, heads, 150, 16, requires_grad=True) for heads in (4, 2, 2))
    results = []
    for backend in ("triton", "reference"):
        out = attend(q, k, v, layout, backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert all(relative_error(ours, oracle) < 1e-5 for ours, oracle in zip(*results, strict=True))
    assert all(built.marks is None for built in layout.schedules.values() if isinstance(built, room.Schedule))


PROGRAM = """
from dataclasses import replace
import torch
from attnsieve.backends.triton.schedule import schedule, stretches, tiles_by_key
from attnsieve.bench.masks import MASKS
from attnsieve.layout import Blocks

for name, positions in (("B", 128), ("blocks-10", 32)):
    layout = replace(MASKS[name](4096, 2, "cpu"), passing=True, windows=True)
    tiles_by_key(layout, schedule(layout, positions, 64))
selected = MASKS["dma-512"](16384, 2, "cpu")
stretches(selected, schedule(selected, 128, 64), 256)
index = torch.zeros(1, 2, 32, 9, dtype=torch.int32)
keys = Blocks(128, 1, torch.ones(1, 2, 32, dtype=torch.int32), index)
schedule(replace(layout, blocks=keys), 128, 64)
"""


def test_kernels_compile_for_a_gpu():
    of_bits = {"_survey_kernel", "_distances_kernel", "_count_kernel", "_blocks_kernel"}
    of_lists = {"count_tiles", "fill_tiles", "list_keys", "list_block_keys", "count_lasting", "list_lasting"}
    assert set(compiled(PROGRAM)) == of_bits | of_lists
