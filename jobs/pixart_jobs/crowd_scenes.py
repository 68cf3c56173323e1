"""Crowds as pictures: up to four scans in the places of a square of 64 pixels, the harder task.

Made as digit scenes are (``scenes``), of the same scans, colours and noise, and held out alike:
training shows no digit in the colour that ``is_unseen_pair`` names, and of the other captions all
but one in ten, by hash.
"""

import hashlib

import numpy as np

from pixart_jobs.scenes import Scene, Split, is_unseen_pair, paint
from pixart_models.crowds import NUMBERS, PLACES, Crowd, Kind, describe_crowd
from pixart_models.digits import COLORS, DIGIT_NAMES

CROWD_SIZE = 64  # pixels a side
_KINDS: tuple[tuple[Kind, float], ...] = (("alike", 0.3), ("related", 0.3), ("placed", 0.4))
_PAIRS = ((0, 1), (2, 3), (0, 2), (1, 3))  # places in a relation


def is_held_out(crowd: Crowd) -> bool:
    """Whether this crowd belongs to evaluation."""
    unseen = any(is_unseen_pair(digit, color) for digit, color in crowd.shown)
    words = hashlib.sha256(describe_crowd(crowd).encode()).digest()
    return unseen or words[0] % 10 == 0


def sample_crowd(rng: np.random.Generator, *, held_out: bool) -> Crowd:
    """A random crowd, of training's or of those that are held out."""
    kind = _KINDS[rng.choice(len(_KINDS), p=[share for _, share in _KINDS])][0]
    while True:
        if kind == "related":
            taken = _PAIRS[rng.integers(len(_PAIRS))]
        else:
            least = 2 if kind == "alike" else 1
            count = int(rng.integers(least, len(PLACES) + 1))
            taken = tuple(rng.permutation(len(PLACES))[:count].tolist())
        digits, colors = rng.integers(0, 10, len(taken)), rng.choice(list(COLORS), len(taken))
        if kind == "alike":
            digits[:], colors[:] = digits[0], colors[0]
        shown = {place: (int(d), str(c)) for place, d, c in zip(taken, digits, colors, strict=True)}
        crowd = Crowd(tuple(shown.get(i) for i in range(len(PLACES))))
        if crowd.kind == kind and is_held_out(crowd) == held_out:
            return crowd


def compose(crowd: Crowd, split: Split, rng: np.random.Generator) -> Scene[Crowd]:
    """Draw ``crowd`` with random scans of ``split``, sizes, places, ground and noise."""
    half = CROWD_SIZE / 2
    centers = {i: (half * (i // 2 + 0.5), half * (i % 2 + 0.5)) for i in crowd.taken}
    image = paint(crowd.shown, list(centers.values()), (24, 28), CROWD_SIZE, split, rng)
    number, (digit, color) = int(rng.integers(1, 9999)), crowd.shown[0]
    raw = (f"IMG_{number:04d}.png", f"digits {number}", DIGIT_NAMES[digit], f"{color} digits",
           f"{NUMBERS.get(len(crowd.shown), 'one')} digits")  # fmt: skip
    return Scene(image, crowd, str(rng.choice(raw)))


def compose_crowd(index: int, *, seed: int, split: Split = "train") -> Scene[Crowd]:
    """Crowd ``index`` of the endless set ``(split, seed)``; never a held-out one in train."""
    rng = np.random.default_rng([seed, 2 if split == "train" else 3, index])
    return compose(sample_crowd(rng, held_out=split == "test"), split, rng)
