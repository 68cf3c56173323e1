"""Scenes: pure functions of their index, honest about what they show, disjoint from evaluation."""

import io
import json
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image

from pixart_jobs.scenes import (
    SCENE_SIZE,
    Split,
    compose_scene,
    is_held_out,
    is_unseen_pair,
    is_unseen_relation,
    sample_reading,
)
from pixart_models.digits import COLORS, RELATIONS, Reading

COUNT = 300


def test_a_scene_is_a_function_of_split_seed_and_index() -> None:
    forward = [compose_scene(i, seed=5) for i in range(20)]
    backward = [compose_scene(i, seed=5) for i in reversed(range(20))][::-1]
    for one, other in zip(forward, backward, strict=True):
        np.testing.assert_array_equal(one.image, other.image)
        assert (one.reading, one.raw_caption) == (other.reading, other.raw_caption)


def test_other_indices_seeds_and_splits_make_other_scenes() -> None:
    def draw(seed: int, split: Split) -> set[bytes]:
        return {compose_scene(i, seed=seed, split=split).image.tobytes() for i in range(20)}

    assert len(draw(1, "train") | draw(2, "train") | draw(1, "test")) == 60


def test_training_never_shows_a_held_out_prompt_and_evaluation_only_those() -> None:
    train = [compose_scene(i, seed=0).reading for i in range(COUNT)]
    test = [compose_scene(i, seed=0, split="test").reading for i in range(COUNT)]
    assert not any(map(is_held_out, train))
    assert all(map(is_held_out, test))


EVERY = [
    Reading((a, b), (x, y), relation)
    for a in range(10) for b in range(10) for x in COLORS for y in COLORS
    for relation in RELATIONS
]  # fmt: skip


def test_some_pairs_and_relations_are_never_seen_and_one_in_ten_other_prompts() -> None:
    seen = [r for r in EVERY if not any(map(is_unseen_pair, r.digits, r.colors))]
    assert len(seen) / len(EVERY) == pytest.approx((6 / 7) ** 2)
    others = [r for r in seen if not is_unseen_relation(r)]
    assert len(others) / len(seen) == pytest.approx(0.9, abs=0.02)
    assert 0.08 < sum(map(is_held_out, others)) / len(others) < 0.12
    assert all(map(is_held_out, set(EVERY) - set(others)))


def test_every_digit_color_and_place_is_learned_apart() -> None:
    """What is put together anew was seen in other company: each digit but in one colour."""
    train = [r for r in EVERY if not is_held_out(r)]
    pairs = {pair for r in train for pair in zip(r.digits, r.colors, strict=True)}
    assert len(pairs) == 60
    for place in (0, 1):
        assert {(r.digits[place], r.relation) for r in train} == {
            (digit, relation) for digit in range(10) for relation in RELATIONS
        }


@pytest.mark.parametrize("held_out", [True, False])
def test_singles_and_pairs_are_both_common(held_out: bool) -> None:
    rng = np.random.default_rng(0)
    readings = [sample_reading(rng, held_out=held_out) for _ in range(COUNT)]
    pairs = sum(len(reading.digits) == 2 for reading in readings)
    assert 0.35 < pairs / COUNT < 0.65
    assert {d for reading in readings for d in reading.digits} == set(range(10))
    assert {c for reading in readings for c in reading.colors} == set(COLORS)


def test_truth_and_label_say_what_the_reading_does() -> None:
    for i in range(COUNT):
        scene = compose_scene(i, seed=1)
        raw = json.loads(scene.truth())
        again = Reading(tuple(raw["digits"]), tuple(raw["colors"]), raw["relation"])
        assert again == scene.reading
        assert asdict(again) == asdict(scene.reading)
        single = len(scene.reading.digits) == 1
        assert (scene.reading.relation is None) == single
        assert scene.label == (scene.reading.digits[0] if single else None)


def test_the_raw_caption_never_gives_the_whole_truth() -> None:
    for i in range(COUNT):
        scene = compose_scene(i, seed=1)
        told = scene.raw_caption
        assert told
        assert not all(color in told for color in scene.reading.colors) or not any(
            name in told for name in ("left of", "above", "middle")
        )


def test_the_png_decodes_to_the_same_pixels() -> None:
    scene = compose_scene(3, seed=1)
    decoded = np.asarray(Image.open(io.BytesIO(scene.png())))
    assert decoded.shape == (SCENE_SIZE, SCENE_SIZE, 3)
    np.testing.assert_array_equal(decoded, scene.image)
    assert scene.png() == compose_scene(3, seed=1).png(), "an id is the hash of these bytes"
