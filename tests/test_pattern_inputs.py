"""Patterns and layouts refuse what they cannot be made of, with a sentence that says what was given."""

import pytest
import torch

from attnsieve import Pattern, compile_layout
from attnsieve.errors import UserError
from attnsieve.patterns import random_blocks, window
from attnsieve.patterns.base import FOREVER


@pytest.mark.parametrize("given", [None, 3, b"window(4)", ["window(4)"], window(4)], ids=str)
def test_a_pattern_is_parsed_from_text(given):
    with pytest.raises(UserError, match="parsed from text such as"):
        Pattern.parse(given)


@pytest.mark.parametrize(
    "text", ["window({})", "sink({})", "probed_keys(block={})", "heavy_hitters({0}, {0})", "columns(1, start={})"]
)
def test_numbers_beyond_positions_are_refused(text):
    with pytest.raises(UserError, match=f"to {FOREVER - 1}, got {FOREVER}"):
        Pattern.parse(text.format(FOREVER))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("window(-1)", "window's tokens must be a whole number from 1 to .*, got -1"),
        ("columns(0, -2)", r"columns takes whole numbers from 0, got \[-2\]"),
        ("probed_keys(mass=-0.5)", "mass must be above 0 and at most 1, got -0.5"),
        ("window(-'a')", "must be plain numbers or strings"),
    ],
)
def test_numbers_below_0_are_refused_for_what_they_are(text, wanted):
    with pytest.raises(UserError, match=wanted):
        Pattern.parse(text)


@pytest.mark.parametrize("name", ["probed_keys", "probed_blocks"])
def test_no_more_rows_of_a_block_are_probed_than_it_has(name):
    Pattern.parse(f"{name}(block=64, rows=64)")
    with pytest.raises(UserError, match="at most its block of 64, got 65: give fewer rows or a larger block"):
        Pattern.parse(f"{name}(block=64, rows=65)")


def test_more_random_blocks_than_there_are_take_the_room_of_all():
    blocks = random_blocks(FOREVER - 1, block=2).atoms[0].blocks(6)
    assert blocks.index.shape == (3, 3)
    rows = torch.arange(6)
    assert (
        compile_layout([random_blocks(FOREVER - 1, block=2)], 6).dense(rows, rows)[0, 0].equal(torch.ones(6, 6).tril().bool())
    )


@pytest.mark.parametrize("given", ["window(4)", ["window(4)"], window(4), None], ids=str)
def test_a_layout_is_made_of_patterns(given):
    with pytest.raises(UserError, match="a list with a Pattern per head"):
        compile_layout(given, 8)


@pytest.mark.parametrize("device", ["foo", None, "cuda:x"])
def test_a_layout_is_made_for_a_device(device):
    with pytest.raises(UserError, match=r"unknown device .*: give a torch.device or its name, such as cpu or cuda:0"):
        compile_layout([window(4)], 8, device)


@pytest.mark.parametrize("number", [0, -3, 2.5, "8", FOREVER])
def test_a_layout_has_whole_numbers_of_positions(number):
    with pytest.raises(UserError, match="length must be a whole number from 1"):
        compile_layout([window(4)], number)
    with pytest.raises(UserError, match="window must be a whole number from 1"):
        compile_layout([window(4)], 8, window=number)
