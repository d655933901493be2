"""Artefacts read strictly: every damaged or made-up file is a UserError or the same artefact, never anything else."""

import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from attnsieve.errors import UserError
from tests.artefact_samples import MAKERS, load, resign, save


@pytest.fixture(params=MAKERS)
def saved(request, tmp_path):
    return save(request.param, tmp_path / "it")


edits = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), st.floats(0, 1), st.integers(1, 255)),
        st.tuples(st.just("cut"), st.floats(0, 1), st.integers(1, 40)),
        st.tuples(st.just("insert"), st.floats(0, 1), st.binary(min_size=1, max_size=9)),
        st.tuples(st.just("truncate"), st.floats(0, 1), st.none()),
        st.tuples(st.just("swap"), st.floats(0, 1), st.integers(1, 64)),
    ),
    min_size=1,
    max_size=3,
)


def damage(data, changes):
    for kind, where, what in changes:
        at = int(where * len(data))
        if kind == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ what]) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at] + data[at + what :]
        elif kind == "insert":
            data = data[:at] + what + data[at:]
        elif kind == "truncate":
            data = data[:at]
        elif kind == "swap":
            data = data[:at] + data[at + what : at + 2 * what] + data[at : at + what] + data[at + 2 * what :]
    return data


def loaded_or_refused(made, folder):
    """What loading gives, None if it is refused; any other error passes through."""
    try:
        return load(made, folder)
    except UserError:
        return None


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=edits)
def test_random_damage_is_refused_or_harmless(saved, name, changes):
    made, folder = saved
    before = (folder / name).read_bytes()
    try:
        (folder / name).write_bytes(damage(before, changes))
        assert loaded_or_refused(made, folder) in (made, None)
    finally:
        (folder / name).write_bytes(before)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=edits, in_header=st.booleans())
def test_random_damage_under_a_matching_digest_raises_nothing_else(saved, changes, in_header):
    made, folder = saved
    path = folder / "model.safetensors"
    before, config = path.read_bytes(), (folder / "config.json").read_bytes()
    cut = 8 + struct.unpack("<Q", before[:8])[0]
    try:
        data = damage(before[:cut], changes) + before[cut:] if in_header else before[:cut] + damage(before[cut:], changes)
        path.write_bytes(data)
        resign(folder)
        loaded_or_refused(made, folder)
    finally:
        path.write_bytes(before)
        (folder / "config.json").write_bytes(config)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), value=json_values)
def test_any_json_in_any_field_raises_nothing_else(saved, data, value):
    made, folder = saved
    before = (folder / "config.json").read_bytes()
    config = json.loads(before)
    place, parents = config, []
    while isinstance(place, (dict, list)) and place and (not parents or data.draw(st.booleans())):
        key = (
            data.draw(st.sampled_from(sorted(place))) if isinstance(place, dict) else data.draw(st.integers(0, len(place) - 1))
        )
        parents.append((place, key))
        place = place[key]
    parents[-1][0][parents[-1][1]] = value
    try:
        resign(folder, config)
        loaded_or_refused(made, folder)
    finally:
        (folder / "config.json").write_bytes(before)


def rewrite(folder, change):
    """Replace the tensors by `change(tensors)` and sign the result."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    resign(folder)


def first_float(tensors):
    return next(name for name, tensor in sorted(tensors.items()) if tensor.is_floating_point())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"more": torch.zeros(1)}, "bytes, expected"),
        (lambda t: {name: value for name, value in t.items() if name != first_float(t)}, "bytes, expected"),
        (lambda t: {("x" if name == first_float(t) else name): value for name, value in t.items()}, "must hold the tensors"),
        (lambda t: t | {first_float(t): t[first_float(t)].view(torch.int32)}, "must be F32"),
        (lambda t: t | {first_float(t): t[first_float(t)].half()}, "bytes, expected"),
        (lambda t: t | {first_float(t): t[first_float(t)].flatten()}, "must be F32"),
        (lambda t: t | {first_float(t): t[first_float(t)] * torch.nan}, "NaN or infinity"),
        (lambda t: t | {first_float(t): t[first_float(t)] + torch.inf}, "NaN or infinity"),
        (lambda t: t | {first_float(t): t[first_float(t)] - 2}, "must"),
        (lambda t: t | {first_float(t): t[first_float(t)] + 100}, "must"),
    ],
)
def test_wrong_tensors_are_refused(saved, change, message):
    made, folder = saved
    rewrite(folder, change)
    with pytest.raises(UserError, match=message):
        load(made, folder)


def write_header(folder, header, body=None, length=None):
    """A safetensors file with this header text, the old body, and a matching digest."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    body = data[8 + struct.unpack("<Q", data[:8])[0] :] if body is None else body
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + body)
    resign(folder)


def header_of(folder):
    data = (folder / "model.safetensors").read_bytes()
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


def test_entries_in_another_order_are_the_same_file(saved):
    made, folder = saved
    write_header(folder, json.dumps(dict(reversed(header_of(folder).items()))).encode())
    assert load(made, folder) == made


def test_duplicate_names_are_refused(saved):
    made, folder = saved
    header = json.dumps(header_of(folder))
    name, entry = next(iter(header_of(folder).items()))
    write_header(folder, f'{{"{name}": {json.dumps(entry)}, {header[1:]}'.encode())
    with pytest.raises(UserError, match="appears twice"):
        load(made, folder)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text('{"kind": "attnsieve plan", ' + text[1:])
    with pytest.raises(UserError, match="appears twice"):
        load(made, folder)


def test_overlapping_tensors_and_odd_entries_are_refused(saved):
    made, folder = saved
    good = header_of(folder)
    names = sorted(good)
    sizes = {name: good[name]["data_offsets"][1] - good[name]["data_offsets"][0] for name in names}
    twin = next((a, b) for a in names for b in names if a < b and sizes[a] == sizes[b])
    bad = {
        "overlap": good | {twin[0]: good[twin[0]] | {"data_offsets": good[twin[1]]["data_offsets"]}},
        "dtype, shape": good | {twin[0]: good[twin[0]] | {"extra": 1}},
        "must be": good | {twin[0]: good[twin[0]] | {"shape": [True]}},
        "number of bytes": good | {twin[0]: good[twin[0]] | {"data_offsets": [5.0, 9.0]}},
        "metadata": good | {"__metadata__": {"pickle": "x"}},
        "JSON object": [good],
    }
    for message, header in bad.items():
        write_header(folder, json.dumps(header).encode())
        with pytest.raises(UserError, match=message):
            load(made, folder)


def test_broken_headers_are_refused(saved):
    made, folder = saved
    cases = [(b"{}", None, 1 << 62, "announces"), (b"", b"", 0, "announces"), (b"[" * 4000, None, None, "bytes, expected|JSON")]
    for header, body, length, message in cases:
        write_header(folder, header, body, length)
        with pytest.raises(UserError, match=message):
            load(made, folder)
    (folder / "model.safetensors").write_bytes(b"\x01\x02")
    with pytest.raises(UserError, match="truncated"):
        load(made, folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[]", "JSON object"),
        ('{"a": NaN}', "not a number"),
        ('{"a": 1e999}', "too large"),
        ('{"a": ' + "[" * 100_000, "not JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not JSON"),
        ('"\\ud800"', "JSON object"),
        (b"\xff\xfe{}", "not JSON"),
    ],
)
def test_config_that_is_not_sound_json_is_refused(saved, text, message):
    made, folder = saved
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        load(made, folder)


def test_other_kinds_and_future_formats_are_refused(saved):
    made, folder = saved
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"kind": "attnsieve something"}, f"expected a saved {made.kind}"),
        ({"format_version": 2}, "reads 1 to 1: upgrade"),
        ({"format_version": True}, "upgrade"),
        ({"surprise": 1}, "has the fields"),
    ):
        resign(folder, config | change)
        with pytest.raises(UserError, match=message):
            load(made, folder)


def test_huge_claims_are_refused_before_anything_is_allocated(saved):
    made, folder = saved
    config = json.loads((folder / "config.json").read_text())
    config["fingerprint"] |= {"layers": 10**9, "heads": 10**9}
    resign(folder, config)
    with pytest.raises(UserError, match=r"limit|at most"):
        load(made, folder)
