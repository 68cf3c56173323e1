"""Reading digit scenes: accurate from pixels alone, honest about what is not there."""

import re
from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pixart_jobs.scenes import Scene, compose, compose_scene
from pixart_jobs.suites import measure_reader
from pixart_models.digits import (
    COLORS,
    DIGIT_NAMES,
    RELATIONS,
    DigitReader,
    Reading,
    UnreadableImage,
    describe,
    evaluation_reader,
    load_scans,
)

Split = Literal["train", "test"]
COLOR, DIGIT = "|".join(COLORS), "|".join(DIGIT_NAMES)
CAPTION = re.compile(
    rf"a ({COLOR}) ({DIGIT}) "
    rf"(?:in the middle of a|(to the left of|above) a ({COLOR}) ({DIGIT}) on a) dark picture"
)
_NOUNS = st.tuples(st.integers(0, 9), st.sampled_from(list(COLORS)))
READINGS = st.one_of(
    _NOUNS.map(lambda n: Reading((n[0],), (n[1],))),
    st.tuples(_NOUNS, _NOUNS, st.sampled_from(RELATIONS)).map(
        lambda p: Reading((p[0][0], p[1][0]), (p[0][1], p[1][1]), p[2])
    ),
)


@pytest.fixture(scope="module")
def reader() -> DigitReader:
    return DigitReader("train")


def parse(caption: str) -> Reading:
    match = CAPTION.fullmatch(caption)
    assert match, caption
    color, digit, relation, second_color, second_digit = match.groups()
    first = DIGIT_NAMES.index(digit)
    if relation is None:
        return Reading((first,), (color,))
    second = DIGIT_NAMES.index(second_digit)
    named = RELATIONS[["to the left of", "above"].index(relation)]
    return Reading((first, second), (color, second_color), named)


def share_read(reader: DigitReader, scenes: list[Scene[Reading]]) -> float:
    readings = reader.read_many([scene.image for scene in scenes])
    right = [r == scene.reading for r, scene in zip(readings, scenes, strict=True)]
    return sum(right) / len(right)


@pytest.mark.parametrize(("fitted_on", "shown"), [("train", "test"), ("test", "train")])
def test_a_reader_reads_95_percent_of_scenes_of_the_other_split(
    fitted_on: Split, shown: Split
) -> None:
    scenes = [compose_scene(i, seed=5, split=shown) for i in range(150)]
    assert {len(scene.reading.digits) for scene in scenes} == {1, 2}
    assert share_read(DigitReader(fitted_on), scenes) >= 0.95


def test_scenes_scaled_to_32_pixels_can_be_read(reader: DigitReader) -> None:
    """The serving size of the demo."""
    scenes = [compose_scene(i, seed=6, split="test") for i in range(100)]
    small = [
        np.asarray(Image.fromarray(scene.image).resize((32, 32), Image.Resampling.BICUBIC))
        for scene in scenes
    ]
    readings = reader.read_many(small)
    right = sum(r == scene.reading for r, scene in zip(readings, scenes, strict=True))
    assert right >= 90


@pytest.mark.parametrize(
    "blank",
    [
        lambda _: np.zeros((48, 48, 3)),
        lambda _: np.full((48, 48, 3), 255),
        lambda rng: rng.normal(25, 3, (48, 48, 3)),
    ],
    ids=["black", "white", "noise"],
)
def test_a_picture_without_a_digit_is_unreadable(
    reader: DigitReader, blank: Callable[[np.random.Generator], np.ndarray]
) -> None:
    image = blank(np.random.default_rng(0)).clip(0, 255).astype(np.uint8)
    with pytest.raises(UnreadableImage, match="no digit found"):
        reader.read(image)


def test_pictures_of_different_sizes_are_read_together(reader: DigitReader) -> None:
    scenes = [compose_scene(i, seed=7) for i in range(3)]
    padded = np.pad(scenes[1].image, ((4, 4), (4, 4), (0, 0)), mode="edge")
    together = reader.read_many([scenes[0].image, padded, scenes[2].image])
    alone = [reader.read(i) for i in (scenes[0].image, padded, scenes[2].image)]
    assert together == alone


@settings(deadline=None, derandomize=True)
@given(reading=READINGS)
def test_a_caption_says_everything_in_one_grammar(reading: Reading) -> None:
    assert parse(describe(reading)) == reading


def test_captions_read_as_english() -> None:
    assert describe(Reading((3,), ("red",))) == "a red three in the middle of a dark picture"
    pair = Reading((3, 8), ("red", "blue"), "left of")
    assert describe(pair) == "a red three to the left of a blue eight on a dark picture"


def test_train_and_test_scans_are_disjoint_and_complete() -> None:
    train, train_labels = load_scans("train")
    test, test_labels = load_scans("test")
    assert (len(train), len(test)) == (1198, 599)
    assert len(train_labels) == 1198
    assert set(test_labels) == set(range(10))
    assert train.min() == 0
    assert train.max() == 1
    both = np.concatenate([train, test]).reshape(1797, 64)
    assert len(np.unique(both, axis=0)) == 1797, "a scan occurs once in all"


def test_what_is_found_has_the_colour_and_place_it_was_painted_with() -> None:
    reader = evaluation_reader()
    rng = np.random.default_rng(1)
    pair = compose(Reading((3, 8), ("red", "cyan"), "above"), "train", rng)
    upper, lower = reader.find(pair.image)
    assert (upper.color, lower.color) == ("red", "cyan")
    assert upper.box[3] <= lower.box[1]
    for found in (upper, lower):
        left, top, right, bottom = found.box
        assert 0 <= left < right <= 48
        assert 0 <= top < bottom <= 48
        assert 12 <= bottom - top <= 24
    assert reader.find(np.zeros((48, 48, 3), np.uint8)) == []


def test_the_evaluations_reader_errs_on_less_than_2_percent_of_unseen_scans() -> None:
    figure = measure_reader()
    assert figure.low > 0.98, f"digits read right: {figure}"
