"""Crowds: what a caption says of one, what the reader sees, what is held out, what is scored."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixart_jobs.certainty import ratio
from pixart_jobs.crowd_scenes import CROWD_SIZE, compose_crowd, is_held_out, sample_crowd
from pixart_jobs.crowd_suite import CrowdsSuite, held_out_crowds, judge_crowd
from pixart_jobs.recipe import SUITE_METRICS
from pixart_jobs.scenes import is_unseen_pair
from pixart_jobs.suites import collect
from pixart_models.captioner import CROWDS, load_captioner
from pixart_models.crowds import Crowd, CrowdReader, describe_crowd, describe_truth
from pixart_models.digits import COLORS, UnreadableImage, evaluation_reader
from pixart_platform.storage import LocalFolder

COUNT = 200
SHOWN = st.none() | st.tuples(st.integers(0, 9), st.sampled_from(list(COLORS)))
CROWDS_OF_ALL_KINDS = st.tuples(*[SHOWN] * 4).filter(any).map(Crowd)
ALIKE = Crowd(((5, "green"), None, (5, "green"), (5, "green")))
RELATED = Crowd((None, (3, "red"), None, (7, "cyan")))
PLACED = Crowd(((3, "red"), None, None, (7, "cyan")))
ONE = Crowd((None, None, (2, "red"), None))


@pytest.mark.parametrize(
    ("crowd", "caption"),
    [
        (ALIKE, "three green fives on a dark picture"),
        (Crowd(((6, "blue"), (6, "blue"), None, None)), "two blue sixes on a dark picture"),
        (Crowd(((0, "red"),) * 4), "four red zeroes on a dark picture"),
        (RELATED, "a red three above a cyan seven on a dark picture"),
        (PLACED, "a red three at the top left and a cyan seven at the bottom right "
                 "on a dark picture"),
        (ONE, "a red two at the bottom left of a dark picture"),
    ],
)  # fmt: skip
def test_a_caption_counts_relates_or_places(crowd: Crowd, caption: str) -> None:
    assert describe_crowd(crowd) == caption
    assert describe_truth(json.dumps(asdict(crowd))) == caption


@given(CROWDS_OF_ALL_KINDS, CROWDS_OF_ALL_KINDS)
@settings(max_examples=200, deadline=None)
def test_equal_captions_are_right_in_everything_and_only_those(a: Crowd, b: Crowd) -> None:
    judged = judge_crowd(a, b)["attribute_accuracy"]
    assert (describe_crowd(a) == describe_crowd(b)) == (judged[0] == judged[1])
    assert describe_truth(json.dumps(asdict(a))) == describe_crowd(a)


def test_training_never_shows_what_is_held_out_and_every_kind_is_common() -> None:
    for held_out in (True, False):
        rng = np.random.default_rng(3)
        crowds = [sample_crowd(rng, held_out=held_out) for _ in range(COUNT)]
        assert all(is_held_out(crowd) == held_out for crowd in crowds)
        kinds = [crowd.kind for crowd in crowds]
        assert all(kinds.count(kind) > 0.2 * COUNT for kind in ("alike", "related", "placed"))
        unseen = [is_unseen_pair(*shown) for crowd in crowds for shown in crowd.shown]
        assert any(unseen) == held_out
    scenes = [compose_crowd(i, seed=1) for i in range(20)]
    assert not any(is_held_out(scene.reading) for scene in scenes)
    again = [compose_crowd(i, seed=1) for i in range(20)]
    assert all(np.array_equal(a.image, b.image) for a, b in zip(scenes, again, strict=True))


def test_pixels_are_captioned_exactly_and_scores_of_the_truth_are_full() -> None:
    scenes = [compose_crowd(i, seed=2) for i in range(COUNT)]
    captions = load_captioner(CROWDS, prompts=()).caption([s.image for s in scenes], [""] * COUNT)
    truths = [describe_truth(scene.truth()) for scene in scenes]
    assert np.mean([c.text == t for (c,), t in zip(captions, truths, strict=True)]) > 0.97
    reader = CrowdReader(evaluation_reader())
    judged = [judge_crowd(s.reading, reader.read(s.image)) for s in scenes]
    outcomes = collect(judged)
    assert set(outcomes) == set(SUITE_METRICS["crowds"]) - {"unseen_pair_accuracy"}
    scores = {m: ratio(np.array(pairs, np.float64)) for m, pairs in outcomes.items()}
    assert min(scores.values()) > 0.97, scores


def test_what_is_scored() -> None:
    def score(want: Crowd, got: Crowd | None) -> dict[str, float]:
        pairs = judge_crowd(want, got)
        return {m: right / total for m, (right, total) in pairs.items() if total}

    elsewhere = Crowd((None, *ALIKE.shown))
    assert set(score(ALIKE, elsewhere).values()) == {1}, "three are three wherever they stand"
    beside = Crowd(((3, "red"), None, (7, "cyan"), None))
    assert score(RELATED, beside)["relation_accuracy"] == 1
    assert score(RELATED, Crowd(((3, "red"), (7, "cyan"), None, None)))["relation_accuracy"] == 0
    swapped = score(RELATED, Crowd((None, (7, "cyan"), None, (3, "red"))))
    assert (swapped["digit_accuracy"], swapped["relation_accuracy"]) == (0, 1)
    moved = score(PLACED, beside)
    assert (moved["digit_accuracy"], moved["place_accuracy"]) == (1, 0)
    assert moved["attribute_accuracy"] == (2 + 2 + 0 + 1) / 6
    for got in (None, Crowd((*PLACED.places[:2], (1, "red"), (7, "cyan")))):
        assert set(score(PLACED, got).values()) == {0}


def test_the_suite_asks_only_held_out_captions_and_reads_what_it_wrote() -> None:
    suite = CrowdsSuite(12, seed=4)
    wanted = held_out_crowds(12, 4)
    assert list(suite.prompts) == list(map(describe_crowd, wanted))
    scenes = [compose_crowd(i, seed=0, split="test") for i in range(2)]
    blank = np.full((CROWD_SIZE, CROWD_SIZE, 3), 20, np.uint8)
    seen = suite.make_judge()([*(s.image for s in scenes), blank], [""] * 3)
    assert [Crowd.load(json.loads(text)) for text, _ in seen[:2]] == [s.reading for s in scenes]
    assert seen[2] == ("", b"")
    with pytest.raises(UnreadableImage):
        CrowdReader(evaluation_reader()).read(blank)
    rows = [{"seen": json.dumps(crowd.places)} for crowd in wanted[:11]] + [{"seen": ""}]
    found = suite.measure(rows, LocalFolder(Path("unused"))).figures["count_accuracy"]
    assert found.value == pytest.approx(11 / 12)
