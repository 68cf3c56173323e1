"""Evaluation: what counts as right, and prompts that no training scene has shown."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixart_jobs.evaluate import (
    EvaluationPlan,
    _parse,
    _write_sheet,
    held_out_prompts,
    load,
    score,
)
from pixart_jobs.scenes import is_held_out
from pixart_models.digits import Reading

THREE = Reading((3,), ("red",))
PAIR = Reading((3, 5), ("red", "blue"), "left of")


def test_a_picture_read_as_wanted_scores_one() -> None:
    assert score([THREE, PAIR], [THREE, PAIR]) == {
        "digit_accuracy": 1, "color_accuracy": 1, "relation_accuracy": 1,
    }  # fmt: skip


def test_swapped_digits_are_wrong_though_both_are_there() -> None:
    found = score([PAIR], [Reading((5, 3), ("red", "blue"), "left of")])
    assert found == {"digit_accuracy": 0, "color_accuracy": 1, "relation_accuracy": 1}


def test_swapped_colours_are_wrong_though_both_are_there() -> None:
    found = score([PAIR], [Reading((3, 5), ("blue", "red"), "left of")])
    assert found == {"digit_accuracy": 1, "color_accuracy": 0, "relation_accuracy": 1}


def test_one_of_two_digits_is_half_right() -> None:
    found = score([PAIR], [Reading((3, 8), ("red", "blue"), "above")])
    assert found == {"digit_accuracy": 0.5, "color_accuracy": 1, "relation_accuracy": 0}


def test_a_picture_that_cannot_be_read_is_wrong_in_everything() -> None:
    assert score([THREE, PAIR], [THREE, None]) == {
        "digit_accuracy": pytest.approx(1 / 3), "color_accuracy": pytest.approx(1 / 3),
        "relation_accuracy": 0,
    }  # fmt: skip


def test_another_number_of_digits_is_wrong_in_all() -> None:
    assert set(score([PAIR], [THREE]).values()) == {0}
    assert set(score([THREE], [PAIR]).values()) == {0}


def test_without_pairs_there_is_no_relation_to_score() -> None:
    assert score([THREE], [THREE]) == {"digit_accuracy": 1, "color_accuracy": 1}


def test_prompts_are_those_of_their_seed_and_all_held_out() -> None:
    prompts = held_out_prompts(60, seed=4)
    assert prompts == held_out_prompts(60, seed=4)
    assert prompts[:20] == held_out_prompts(20, seed=4)
    assert prompts != held_out_prompts(60, seed=5)
    assert all(map(is_held_out, prompts))
    assert {len(reading.digits) for reading in prompts} == {1, 2}


def test_a_reading_survives_the_trip_through_a_table() -> None:
    for reading in (THREE, PAIR):
        assert _parse(json.dumps([reading.digits, reading.colors, reading.relation])) == reading
    assert _parse("") is None


def make_png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (value, 0, 0)).save(buffer, format="png")
    return buffer.getvalue()


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (8, 1), (9, 2), (32, 4), (100, 4)])
def test_a_sheet_shows_the_first_pictures_row_by_row(tmp_path: Path, count: int, rows: int) -> None:
    _write_sheet(tmp_path / "deep" / "sheet.png", [make_png(i) for i in range(count)])
    sheet = np.asarray(Image.open(tmp_path / "deep" / "sheet.png"))
    assert sheet.shape == (4 * rows, 6 * 8, 3)
    shown = sheet[2::4, 3::6, 0].reshape(-1)
    assert shown[:count].tolist() == list(range(min(count, 32)))


def test_an_evaluation_is_finished_when_its_result_is_there(tmp_path: Path) -> None:
    plan = EvaluationPlan(tmp_path, tmp_path / "snapshot", {})
    (tmp_path / "sheet.png").write_bytes(make_png(1))
    finished = [plan.is_finished]
    result = {"metrics": {"digit_accuracy": 0.5}, "prompts": ["a red three"]}
    plan.result_path.write_text(json.dumps(result))
    finished.append(plan.is_finished)
    assert finished == [False, True]
    found = load(plan)
    assert (found.metrics, found.prompts) == (result["metrics"], ("a red three",))
