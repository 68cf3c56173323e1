"""How far two sets of features lie apart: FID, KID, precision and recall, with their intervals.

FID and KID are torchmetrics' on features in fp64. Their intervals come from resamples of both
sides' pictures, moved to the figure, since repetition alone raises FID; for them there are faster
ways than torchmetrics', shown to agree by the tests.

Legend: N, M pictures, D features, R resamples.
"""

import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pixart_jobs.certainty import CONFIDENCE, Figure

FID_RESAMPLES, KID_RESAMPLES = 100, 1000
_KID_SUBSETS, _KID_SUBSET_SIZE = 100, 1000
_NEIGHBOURS = 3
_CHUNK = 1024  # rows of a matrix of distances at a time

Features = NDArray[np.float64]
"""(N, D)."""


class _Given(nn.Identity):
    """Stands where torchmetrics has a network: features go in as they are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width


def measure_fid(drawn: Features, real: Features, seed: int = 0) -> Figure:
    """torchmetrics' FID of features (N, D) and (M, D), and its interval."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Given(drawn.shape[1]))
    for features, is_real in ((real, True), (drawn, False)):
        metric.update(torch.from_numpy(features), real=is_real)
    rng = np.random.default_rng(seed)
    found = [
        frechet(*(side[rng.integers(len(side), size=len(side))] for side in (drawn, real)))
        for _ in range(FID_RESAMPLES)
    ]
    return _centred(float(metric.compute()), np.array(found))


def frechet(a: Features, b: Features) -> float:
    """FID of features (N, D) and (M, D), fast: through the smaller of pictures and dimensions.

    tr sqrt(S_a S_b) is the sum of the singular values of A B^T, where S_a = A^T A (centred, over
    N - 1); with as many pictures as dimensions, of the roots of a symmetric matrix's eigenvalues.
    """
    means = a.mean(axis=0) - b.mean(axis=0)
    left, right = ((x - x.mean(axis=0)) / np.sqrt(len(x) - 1) for x in (a, b))
    if min(len(a), len(b)) < a.shape[1]:
        shared = np.linalg.svd(left @ right.T, compute_uv=False).sum()
    else:
        values, vectors = np.linalg.eigh(left.T @ left)
        root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
        inner = root @ (right.T @ right) @ root
        shared = np.sqrt(np.linalg.eigvalsh(inner).clip(0)).sum()
    return float(means @ means + (left**2).sum() + (right**2).sum() - 2 * shared)


def measure_kid(drawn: Features, real: Features, seed: int = 0) -> Figure:
    """torchmetrics' KID of features (N, D) and (M, D), and its interval."""
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(len(drawn), len(real), _KID_SUBSET_SIZE)
    subsets = 1 if size == max(len(drawn), len(real)) else _KID_SUBSETS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it keeps all features, which are in memory anyway
        metric = KernelInceptionDistance(_Given(drawn.shape[1]), subsets=subsets, subset_size=size)
    for features, is_real in ((real, True), (drawn, False)):
        metric.update(torch.from_numpy(features), real=is_real)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        value = float(metric.compute()[0])
    return _centred(value, _resample_kid(drawn, real, seed))


def _resample_kid(drawn: Features, real: Features, seed: int) -> NDArray[np.float64]:
    """KID of resamples, where no picture is compared with its own copies."""
    rng = np.random.default_rng([seed, 1])
    often = [
        rng.multinomial(len(side), np.full(len(side), 1 / len(side)), size=KID_RESAMPLES)
        for side in (drawn, real)
    ]  # of each resample (R), how often each picture is in it (N)
    total = np.zeros(KID_RESAMPLES)
    for i, j in ((0, 0), (1, 1), (0, 1)):
        a, b = ((drawn, real)[k] for k in (i, j))
        w, v = often[i].astype(np.float64), often[j].astype(np.float64)
        sums = np.zeros(KID_RESAMPLES)
        for start in range(0, len(a), _CHUNK):
            kernel = (a[start : start + _CHUNK] @ b.T / a.shape[1] + 1) ** 3
            if i == j:
                kernel[np.arange(len(kernel)), start + np.arange(len(kernel))] = 0
            sums += ((w[:, start : start + _CHUNK] @ kernel) * v).sum(axis=1)
        pairs = w.sum(axis=1) ** 2 - (w**2).sum(axis=1) if i == j else len(a) * len(b)
        total += sums / pairs * (1 if i == j else -2)
    return total


def _centred(value: float, resampled: NDArray[np.float64]) -> Figure:
    """The resamples' spread around the figure itself."""
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(resampled - resampled.mean(), [tail, 100 - tail])
    return Figure(value, value + float(low), value + float(high))


def covered(points: Features, others: Features) -> NDArray[np.bool_]:
    """Which of (N, D) lie within the third nearest neighbour's distance of any of (M, D).

    Of drawn pictures among real ones the share is precision, the other way round recall
    (Kynkaanniemi et al. 2019, arXiv 1904.06991, equations 1 and 2).
    """
    centres = torch.from_numpy(others)
    nearest = [
        torch.cdist(centres[i : i + _CHUNK], centres).kthvalue(_NEIGHBOURS + 1).values
        for i in range(0, len(centres), _CHUNK)
    ]  # the first is the point itself
    reach = torch.cat(nearest)
    asked = torch.from_numpy(points)
    held = [
        (torch.cdist(asked[i : i + _CHUNK], centres) <= reach).any(dim=1)
        for i in range(0, len(asked), _CHUNK)
    ]
    return np.asarray(torch.cat(held))
