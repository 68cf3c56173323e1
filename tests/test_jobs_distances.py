"""Distances of features: torchmetrics' own figures, by faster ways where resamples need them."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from pixart_jobs import distances
from pixart_jobs.distances import (
    _resample_kid,
    covered,
    frechet,
    measure_fid,
    measure_kid,
)

Array = NDArray[np.float64]


def draw(count: int, width: int, shift: float = 0.0, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    return rng.normal(shift, 1, (count, width)) @ np.diag(np.linspace(0.2, 2, width))


def theirs(metric: Any, drawn: Array, real: Array) -> float:
    for features, is_real in ((drawn, False), (real, True)):
        for batch in np.array_split(features, 3):
            metric.update(torch.from_numpy(batch), real=is_real)
    found = metric.compute()
    return float(found[0] if isinstance(found, tuple) else found)


def given(width: int) -> Any:
    network: Any = nn.Identity()
    network.num_features = width
    return network


@pytest.mark.parametrize(("drawn", "real", "width"), [(60, 80, 9), (12, 30, 40), (40, 25, 30)])
def test_fid_is_torchmetrics_own_with_more_pictures_than_features_and_with_fewer(
    drawn: int, real: int, width: int
) -> None:
    a, b = draw(drawn, width, 0.3, seed=1), draw(real, width, seed=2)
    wanted = theirs(FrechetInceptionDistance(feature=given(width)), a, b)
    assert frechet(a, b) == pytest.approx(wanted, rel=1e-6)
    found = measure_fid(a, b)
    assert found.value == pytest.approx(wanted, rel=1e-6)
    assert found.low < found.value < found.high


def test_kid_is_torchmetrics_own_whole_and_in_subsets(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = draw(50, 6, 0.3, seed=1), draw(50, 6, seed=2)
    whole = KernelInceptionDistance(given(6), subsets=1, subset_size=50)
    assert measure_kid(a, b).value == pytest.approx(theirs(whole, a, b), rel=1e-6)
    monkeypatch.setattr(distances, "_KID_SUBSET_SIZE", 20)
    parts = KernelInceptionDistance(given(6), subsets=100, subset_size=20)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wanted = theirs(parts, a, b)
    found = measure_kid(a, b)
    assert found.value == pytest.approx(wanted, rel=1e-6)
    assert found.low < found.value < found.high


def test_resampled_kid_leaves_out_a_pictures_own_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "_CHUNK", 4)
    a, b = draw(9, 3, 0.5, seed=1), draw(11, 3, seed=2)
    found = _resample_kid(a, b, seed=3)[:5]
    rng = np.random.default_rng([3, 1])
    often = [
        rng.multinomial(len(x), np.full(len(x), 1 / len(x)), size=distances.KID_RESAMPLES)[:5]
        for x in (a, b)
    ]

    def kernel(x: Array, y: Array) -> Array:
        result: Array = (x @ y.T / 3 + 1) ** 3
        return result

    for r in range(5):
        i, j = (np.repeat(np.arange(len(times[r])), times[r]) for times in often)
        apart_a, apart_b = i[:, None] != i[None], j[:, None] != j[None]
        wanted = (
            kernel(a[i], a[i])[apart_a].mean() + kernel(b[j], b[j])[apart_b].mean()
            - 2 * kernel(a[i], b[j]).mean()
        )  # fmt: skip
        assert found[r] == pytest.approx(wanted, rel=1e-9)


def test_the_interval_of_fid_tells_how_it_varies_between_draws() -> None:
    real = draw(200, 8, seed=99)
    values = [frechet(draw(200, 8, 0.2, seed=s), draw(200, 8, seed=1000 + s)) for s in range(60)]
    found = measure_fid(draw(200, 8, 0.2, seed=7), real)
    spread = np.percentile(values, 97.5) - np.percentile(values, 2.5)
    assert 0.5 < (found.high - found.low) / spread < 2


def test_precision_and_recall_are_by_the_third_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "_CHUNK", 7)
    points, others = draw(40, 5, 0.8, seed=1), draw(30, 5, seed=2)
    wanted = []
    for point in points:
        within = False
        for other in others:
            reach = sorted(np.linalg.norm(others - other, axis=1))[3]
            within |= bool(np.linalg.norm(point - other) <= reach)
        wanted.append(within)
    assert 0 < sum(wanted) < len(wanted)
    assert covered(points, others).tolist() == wanted
    assert covered(others, others).all()
    assert not covered(others + 100, others).any()


def test_the_same_features_are_no_distance_apart() -> None:
    a = draw(30, 4)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert measure_fid(a, a).value == pytest.approx(0, abs=1e-5)
