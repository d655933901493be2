"""Box-Cox against scipy, literal against closed form, threshold against cut."""

import math

import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnsieve.dam import cut, transform
from attnsieve.dam.boxcox import at_least, transform_literal
from attnsieve.errors import UserError

LAMBDAS = [-1.0, -0.5, 0.0, 1e-9, 0.25, 0.5, 1.0, 2.0]
EPS = 1e-10


def maps(dtype=torch.float64):
    x = torch.logspace(-10, 0, 2001, dtype=torch.float64).clamp(1e-10, 1)
    return torch.cat([x, torch.zeros(3, dtype=torch.float64)]).to(dtype)


@pytest.mark.parametrize("lam", LAMBDAS)
def test_literal_equals_scipy(lam):
    x = maps().clamp_min(EPS).numpy()
    expected = scipy.special.boxcox(x, lam)
    expected -= expected.min()
    torch.testing.assert_close(transform_literal(maps(), lam, EPS), torch.from_numpy(expected), rtol=1e-13, atol=1e-13)
    expected = scipy.stats.boxcox(x, lam)
    expected -= expected.min()
    torch.testing.assert_close(transform_literal(maps(), lam, EPS), torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_closed_form_equals_literal(lam, dtype):
    assert torch.equal(transform(maps(dtype), lam, EPS), transform_literal(maps(dtype), lam, EPS))


def test_closed_form_error_at_the_papers_lambda():
    for dtype, bound in ((torch.float64, 4.5e-16), (torch.float32, 2.4e-7)):
        x = maps(dtype)
        exact = 2 * (x.double().clamp_min(EPS).sqrt() - math.sqrt(EPS))
        assert (transform(x, 0.5, EPS).double() - exact).abs().max() <= bound


@pytest.mark.parametrize(
    ("tau", "expected", "most"), [(0.1, 0.002501, 399), (0.2, 0.010002, 99), (0.3, 0.022503, 44), (0.5, 0.062505, 15)]
)
def test_cut_of_the_papers_table(tau, expected, most):
    assert cut(tau, 0.5, EPS) == pytest.approx((math.sqrt(EPS) + tau / 2) ** 2, rel=1e-14)
    assert cut(tau, 0.5, EPS) == pytest.approx(expected, abs=5e-7)
    assert math.floor(1 / cut(tau, 0.5, EPS)) == most


@given(tau=st.floats(-1, 3), lam=st.sampled_from(LAMBDAS), value=st.floats(0, 1))
def test_cut_decides_as_the_transform_does(tau, lam, value):
    amplified = transform(torch.tensor([value, 0.0], dtype=torch.float64), lam, EPS)[0]
    # A difference of numbers as large as eps^lam is no more exact than they are.
    rounding = 1e-9 * max(1.0, float(amplified)) + 1e-15 * EPS ** min(lam, 0.0)
    if value == 0 or abs(amplified - tau) > rounding:
        assert bool(amplified >= tau) == (max(value, EPS) >= cut(tau, lam, EPS))


@pytest.mark.parametrize("lam", LAMBDAS)
def test_cells_of_no_attention_reach_no_positive_threshold(lam):
    for tau in (5e-324, 1e-17, 1.192092896e-07, 0.3):
        assert cut(tau, lam, EPS) > EPS


def test_real_cells_at_the_papers_threshold():
    cells = torch.tensor([1.0, 0.8819133, 0.1180924, 0.0225808, 0.0226026, 0.0223658, 0.0225])
    amplified = transform(cells, 0.5, EPS)
    for place, value in ((0, 1.99998), (1, 1.878185), (2, 0.687272), (6, 0.29998)):
        assert amplified[place].item() == pytest.approx(value, abs=1e-5)
    assert at_least(cells, cut(0.3, 0.5, EPS)).tolist() == [True] * 5 + [False] * 2


def test_threshold_is_not_rounded_to_the_precision_of_the_maps():
    below = torch.tensor([0.1])  # float32 0.1 is above the double 0.1
    assert at_least(below, 0.1).item()
    assert not at_least(below, float(below.double()) + 1e-12).item()
    assert at_least(below, float(below.double())).item()


def test_extremes_stay_defined():
    assert cut(1e9, 0.5, EPS) > 1
    assert cut(1e6, 1e-3, EPS) == math.inf
    assert cut(20.1, -0.5, 1e-2) == cut(101.0, -1.0, 1e-2) == math.inf
    assert cut(1e4, 0.0, EPS) == math.inf
    assert cut(0.0, 0.5, EPS) == cut(-1.0, 0.0, EPS) == 0.0


@pytest.mark.parametrize("eps", [0.0, -1e-3, 1.0, math.nan])
def test_bad_eps_is_refused(eps):
    with pytest.raises(UserError, match="eps"):
        cut(0.3, 0.5, eps)
    with pytest.raises(UserError, match="eps"):
        transform(torch.rand(3), 0.5, eps)
