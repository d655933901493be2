"""Profiles: what they accept and refuse."""

import pytest
import torch

from attnsieve.errors import UserError
from attnsieve.fingerprint import Fingerprint
from attnsieve.profiling import LongStatistics, Profile, available_memory, estimate_memory

MODEL = Fingerprint("toy", 2, 3, 1, 16, "0123456789abcdef")
MAPS = torch.eye(4).expand(2, 3, 4, 4).contiguous()
SEEN = torch.tensor([2, 2, 2, 1])


def long(length=9, rows=5, column=None, offset=None):
    even = torch.full((2, 3, length), rows / length)
    return LongStatistics(length, rows, even if column is None else column, even if offset is None else offset)


def test_summary_says_what_was_seen():
    text = str(Profile(MODEL, 4, MAPS, SEEN, (long(),)))
    assert text == (
        "profile of toy: 2 layers x 3 heads, capture length 4\n"
        "maps: 2 documents, 1 of them reach the last row\n"
        "length 9: 5 rows beyond 4"
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: Profile(MODEL, 4, MAPS, SEEN, (long(), long(12)), {"data": "x"}),
        lambda: Profile(MODEL, 4, MAPS, SEEN),
        lambda: Profile(MODEL, 4, long=(long(),)),
    ],
)
def test_saved_is_loaded_equal(make, tmp_path):
    make().save_pretrained(tmp_path)
    assert Profile.from_pretrained(tmp_path) == make()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pcl": 0}, "capture length must be from 1"),
        ({"pcl": 5}, "maps must be"),
        ({"maps": None}, "come together"),
        ({"maps": MAPS.double()}, "maps must be torch.float32"),
        ({"maps": MAPS * 1.1}, "rows of at most 1"),
        ({"maps": -MAPS}, "none negative"),
        ({"maps": MAPS.flip(-1)}, "after the query"),
        ({"maps": MAPS * torch.nan}, "none negative"),
        ({"rows_seen": SEEN.flip(0)}, "never rise"),
        ({"rows_seen": SEEN * 0}, "must be positive"),
        ({"rows_seen": SEEN.int()}, "rows_seen must be torch.int64"),
        ({"long": (long(4),)}, "must exceed the capture length"),
        ({"long": (long(12), long(9))}, "must ascend"),
        ({"long": (long(rows=0),)}, "cover no rows"),
        ({"long": (long(column=torch.ones(2, 3, 8)),)}, "column_mass must be"),
        ({"long": (long(offset=torch.ones(2, 3, 9)),)}, "offset_mass of length 9 must be non-negative"),
        ({"long": (long(column=torch.full((2, 3, 9), torch.nan)),)}, "column_mass of length 9"),
        ({"provenance": {"x": object()}}, "plain JSON"),
    ],
)
def test_what_cannot_be_a_profile_is_refused(arguments, message):
    good = {"fingerprint": MODEL, "pcl": 4, "maps": MAPS, "rows_seen": SEEN}
    Profile(**good)
    with pytest.raises(UserError, match=message):
        Profile(**(good | arguments))


def test_memory_estimates():
    llama = Fingerprint("llama", 28, 24, 8, 128, "0" * 16)
    assert estimate_memory(llama, 512, ()) == 28 * 24 * 512 * 512 * 4
    assert estimate_memory(llama, 512, (2048, 8192), maps=False) == 28 * 24 * 16 * (2048 + 8192)
    free = available_memory()
    assert free is None or 0 < free < 1 << 50
