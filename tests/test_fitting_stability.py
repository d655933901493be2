"""Stability: masks of documents tried on one another, against masks and maps written out."""

import pytest
import torch

from attnsieve import UserError
from attnsieve.dam import mass
from attnsieve.fingerprint import Fingerprint
from attnsieve.fitting import stability
from attnsieve.patterns import Pattern
from attnsieve.profiling import LongStatistics, Profile

MODEL = Fingerprint("llama", 2, 3, 3, 8, "0" * 16)
L, N = 16, 64
SETTINGS = {"threshold": "mass", "share": 0.9, "force_self": False, "force_sink": 0, "floor": 0.0, "local": False}


def softmax_rows(scores):
    n = scores.shape[-1]
    return scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


def profile_of(scores) -> Profile:
    """A profile of one document from causal scores [layers, heads, N, N]."""
    p = softmax_rows(scores)
    late = p[..., L:, :]
    offset = torch.stack([late.diagonal(dim1=-2, dim2=-1, offset=L - d).sum(-1) for d in range(N)], -1)
    long = LongStatistics(N, N - L, late.sum(-2).float(), offset.float())
    return Profile(MODEL, L, p[..., :L, :L].float(), torch.ones(L, dtype=torch.int64), (long,))


def local_scores(width: float) -> torch.Tensor:
    distance = torch.arange(N)[:, None] - torch.arange(N)
    return (-(distance.double()) / width).expand(2, 3, N, N)


def test_equal_documents_agree_in_everything():
    one = profile_of(local_scores(2.0))
    found = stability([one, one, one], **SETTINGS)
    assert found.names == ("document 0", "document 1", "document 2")
    assert found.length == N
    assert (found.overlap == 1).all()
    torch.testing.assert_close(found.retained, found.retained[:1, :1].expand_as(found.retained))
    assert found.fixed(0.5).all()
    assert not found.fixed(0.999).any()


def test_documents_that_look_elsewhere_do_not():
    """Head 1 of layer 0 reads another column in each document; all other heads are local."""
    profiles = []
    for column in (3, 9):
        scores = local_scores(1.0).clone()
        scores[0, 1] = 0.0
        scores[0, 1, :, column] = 12.0
        profiles.append(profile_of(scores))
    found = stability(profiles, names=["a", "b"], min_support=4, **SETTINGS)
    expected = torch.ones(2, 3, dtype=torch.bool)
    expected[0, 1] = False
    assert torch.equal(found.fixed(0.7), expected)
    assert found.mean_overlap()[0, 1] < 0.7 < found.mean_overlap()[expected].min()
    assert found.worst()[0, 1] < 0.4 < found.own()[0, 1]
    maps = [profile.maps[0, 1] for profile in profiles]
    masks = [mass(one[None], share=0.9)[0] for one in maps]
    # The matched column joins the mask of its own document.
    for mask, column in zip(masks, (3, 9), strict=True):
        mask[column:, column] = True
    both, either = (masks[0] & masks[1]).sum(), (masks[0] | masks[1]).sum()
    assert found.overlap[0, 1, 0, 1] == pytest.approx(float(both / either), abs=0.1)


def test_masks_that_keep_nearly_everything_are_not_fixed_masks():
    one = profile_of(torch.zeros(2, 3, N, N, dtype=torch.float64))
    found = stability([one, one], **SETTINGS | {"share": 0.99})
    assert not found.fixed(0.5).any()


def test_what_cannot_be_compared_is_refused():
    one = profile_of(local_scores(2.0))
    with pytest.raises(UserError, match="at least two documents"):
        stability([one])
    with pytest.raises(UserError, match="3 names for 2 profiles"):
        stability([one, one], names=["a", "b", "c"])
    other = Profile(MODEL, L, one.maps, one.rows_seen)
    with pytest.raises(UserError, match="must agree"):
        stability([one, other])


def test_a_window_serves_local_heads():
    """The preset's windows count as fixed masks: what a document's own window keeps is kept of its like."""
    profiles = [profile_of(local_scores(width)) for width in (3.0, 3.3)]
    found = stability(profiles, progress=False)
    assert found.own().min() >= 0.9
    assert found.worst().min() >= 0.85
    written = Pattern.parse("sink(4) | window(16)").keep(torch.arange(N)[:, None], torch.arange(N))
    torch.testing.assert_close(found.density, torch.full((2, 2, 3), float(written.sum() / (N * (N + 1) / 2))))
    masks_alone = stability(profiles, local=False, floor=0.0, progress=False)
    assert masks_alone.worst().min() < found.worst().min()
