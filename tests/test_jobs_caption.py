"""Captioning: rows stay aligned, and what has no caption says why."""

import io
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
from builders import write_table
from PIL import Image

from pixart_jobs.caption import _Caption, measure_accuracy
from pixart_models.digits import Reading, describe
from pixart_platform.tables import SCHEMAS

RED_THREE, PAIR = Reading((3,), ("red",)), Reading((1, 2), ("red", "blue"), "above")


def make_png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(buffer, format="png")
    return buffer.getvalue()


def test_every_row_comes_back_in_its_place_with_a_caption_or_a_reason() -> None:
    fox = {"id": "fox", "status": "ok", "bytes": make_png(), "raw_caption": "a fox"}
    rows = [
        fox,
        {"id": "broken", "status": "rejected: empty file", "bytes": b"", "raw_caption": "lost"},
        fox | {"id": "mute", "raw_caption": ""},
        fox | {"id": "hen", "raw_caption": "a hen"},
    ]
    caption = _Caption("builtin:raw", prompt="", max_new_tokens=1, batch_images=2)
    found = caption(pa.Table.from_pylist(rows))
    assert found.schema == SCHEMAS["captions/1"]
    assert found.to_pylist() == [
        {"id": "fox", "status": "ok", "caption": "a fox"},
        {"id": "broken", "status": "rejected: empty file", "caption": ""},
        {"id": "mute", "status": "rejected: no caption (no raw caption)", "caption": ""},
        {"id": "hen", "status": "ok", "caption": "a hen"},
    ]


def test_accuracy_is_the_share_of_captions_that_say_exactly_the_truth(tmp_path: Path) -> None:
    truths = [RED_THREE, RED_THREE, PAIR, PAIR]
    written = [describe(RED_THREE), "a red five", describe(PAIR), ""]
    images = [{"truth": json.dumps(asdict(truth))} for truth in truths]
    captions = [{"caption": caption} for caption in written]
    found = measure_accuracy(
        write_table(tmp_path / "images", "images/1", [images[:3], images[3:]]),
        write_table(tmp_path / "captions", "captions/1", [captions[:3], captions[3:]]),
    )
    assert found == 0.5


def test_without_a_known_truth_there_is_no_accuracy(tmp_path: Path) -> None:
    images = write_table(tmp_path / "images", "images/1", [[{"truth": None}]])
    captions = write_table(tmp_path / "captions", "captions/1", [[{"caption": "a fox"}]])
    assert measure_accuracy(images, captions) is None
