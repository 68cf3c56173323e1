"""Captioning: rows stay aligned, and what has no caption says why, with vLLM as without."""

import json
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from builders import write_table
from pydantic import ValidationError
from test_models_captioner import open_captioner, write_llava

from pixart_jobs.caption import _Caption, measure_accuracy, settle
from pixart_jobs.recipe import CaptionSettings
from pixart_jobs.scenes import compose_scene
from pixart_models.captioner import Caption, captioner_revision
from pixart_models.digits import Reading, describe
from pixart_models.text import ModelNotFound
from pixart_platform.tables import SCHEMAS

pytestmark = pytest.mark.filterwarnings(  # ray.data.llm's own classes
    "ignore::pydantic.warnings.PydanticDeprecatedSince20"
)
RED_THREE, PAIR = Reading((3,), ("red",)), Reading((1, 2), ("red", "blue"), "above")
PROMPTS = ("Describe it", "Name it")


def make_row(name: str, raw_caption: str | None, **values: Any) -> dict[str, Any]:
    """A row as captioners get it, with a picture of 5 x 4 pixels."""
    row = {"id": name, "status": "ok", "raw_caption": raw_caption}
    return row | {"pixels": bytes(range(60)), "width": 5, "height": 4} | values


def make_table(rows: list[dict[str, Any]]) -> pa.Table:
    table = pa.Table.from_pylist(rows)
    place = table.column_names.index("pixels")
    return table.set_column(place, "pixels", table["pixels"].cast(pa.large_binary()))


ROWS = [
    make_row("fox", "a fox"),
    make_row("broken", "lost", status="rejected: empty file", pixels=b"", width=0, height=0),
    make_row("mute", None),
    make_row("hen", "a hen"),
]


def test_every_row_comes_back_in_its_place_with_a_caption_or_a_reason() -> None:
    caption = _Caption("builtin:raw", CaptionSettings(batch_images=2))
    found = caption(make_table(ROWS))
    assert found.schema == SCHEMAS["captions/2"]
    assert found.to_pylist() == [
        {"id": "fox", "status": "ok", "captions": ["a fox"]},
        {"id": "broken", "status": "rejected: empty file", "captions": []},
        {"id": "mute", "status": "rejected: no caption (no raw caption)", "captions": []},
        {"id": "hen", "status": "ok", "captions": ["a hen"]},
    ]


def test_captioners_see_each_rows_own_pixels() -> None:
    scenes = [compose_scene(i, seed=3) for i in range(3)]
    rows = [
        make_row(
            str(i), "a lie", pixels=scene.image.tobytes(), width=scene.image.shape[1],
            height=scene.image.shape[0],
        )
        for i, scene in enumerate(scenes)
    ]  # fmt: skip
    blank = np.zeros((20, 30, 3), np.uint8)
    rows.insert(1, make_row("blank", "", pixels=blank.tobytes(), width=30, height=20))
    table = pa.concat_tables([make_table(rows[:2]), make_table(rows[2:])])
    found = _Caption("builtin:digits", CaptionSettings())(table)["captions"].to_pylist()
    assert found.pop(1) == []
    assert found == [[describe(scene.reading)] for scene in scenes]


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_llava(tmp_path_factory.mktemp("llava")))


def test_a_row_holds_a_caption_for_each_prompt_and_then_the_raw_one(llava: str) -> None:
    settings = CaptionSettings(
        captioner=llava, prompts=PROMPTS, keep_raw=True, show_raw=False, max_new_tokens=5
    )
    found = _Caption(llava, settings)(make_table(ROWS))["captions"].to_pylist()
    captioner = open_captioner(Path(llava), prompts=PROMPTS, show_raw=False, max_new_tokens=5)
    pixels = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    written = [caption.text for caption in captioner.caption([pixels], [""])[0]]
    assert found == [[*written, "a fox"], [], [*written, ""], [*written, "a hen"]]


def test_another_revision_on_a_worker_stops_it(llava: str) -> None:
    settings = CaptionSettings(captioner=llava)
    with pytest.raises(ModelNotFound, match=r"here it is revision \w{16}, but .* made with abc"):
        _Caption(llava, settings, "abc")
    _Caption("builtin:raw", CaptionSettings(), captioner_revision("builtin:raw"))


@pytest.mark.parametrize(
    ("captions", "raw", "status", "texts"),
    [
        ([Caption("a"), Caption("b")], None, "ok", ["a", "b"]),
        ([Caption(problem="x"), Caption("b")], "raw", "ok", ["", "b", "raw"]),
        ([Caption("a"), Caption(problem="y")], "", "ok", ["a", "", ""]),
        ([Caption(problem="x"), Caption(problem="y")], "r", "ok", ["", "", "r"]),
        ([Caption(problem="x"), Caption(problem="y")], "", "rejected: no caption (x)", []),
    ],
)
def test_a_row_is_rejected_when_no_caption_is_left(
    captions: list[Caption], raw: str | None, status: str, texts: list[str]
) -> None:
    assert settle(captions, raw) == (status, texts)


def test_captioners_that_are_asked_nothing_take_one_prompt() -> None:
    with pytest.raises(ValidationError, match="auto is asked nothing and writes one caption"):
        CaptionSettings(prompts=PROMPTS)
    assert CaptionSettings(prompts=PROMPTS, captioner="some/vlm").prompts == PROMPTS


def test_vllm_gets_a_request_for_each_prompt_and_its_answers_become_rows_again() -> None:
    from pixart_jobs.caption_vllm import gather, request, spread

    settings = CaptionSettings(
        captioner="vllm:some/vlm", prompts=PROMPTS, keep_raw=True, max_new_tokens=9
    )
    requests = [
        spread_row | request(spread_row, settings)
        for row in ROWS
        for spread_row in spread(row | {"partition": 7}, settings)
    ]
    assert all(row["pixels"] == b"" for row in requests)
    assert [row.get("__inference_error__", "") for row in requests[:4]] == [
        "", "", *["rejected: empty file"] * 2,
    ]  # fmt: skip
    first = requests[0]
    assert first["messages"][0]["content"] == [
        {"type": "image"},
        {"type": "text", "text": 'Given the caption of this image "a fox", describe it'},
    ]
    picture = np.asarray(first["multimodal_data"]["image"])
    assert picture.tobytes() == bytes(range(60))
    assert first["sampling_params"] == {"max_tokens": 9, "temperature": 0.0}
    assert requests[5]["messages"][0]["content"][1]["text"] == "Name it"

    said = [("A fox. It", 9, ""), ("Fox", 2, ""), ("", None, "rejected: empty file")]
    said += [said[-1], ("", 0, "ValueError: too long\nTraceback"), (" A picture", 3, "")]
    said += [("", 0, "ValueError: too long\nTraceback"), ("", 1, "")]
    answers = [
        {"kept": row["kept"], "generated_text": text, "num_generated_tokens": count,
         "__inference_error__": problem}
        for row, (text, count, problem) in zip(requests, said, strict=True)
    ]  # fmt: skip
    found = gather(pa.Table.from_pylist(answers), settings).to_pylist()
    assert found == [
        {"id": "fox", "status": "ok", "partition": 7, "captions": ["A fox.", "Fox", "a fox"]},
        {"id": "broken", "status": "rejected: empty file", "partition": 7, "captions": []},
        {"id": "mute", "status": "ok", "partition": 7, "captions": ["", "A picture", ""]},
        {"id": "hen", "status": "ok", "partition": 7, "captions": ["", "", "a hen"]},
    ]
    alone = gather(pa.Table.from_pylist(answers), settings.model_copy(update={"keep_raw": False}))
    assert alone["status"].to_pylist()[3] == "rejected: no caption (ValueError: too long)"


def test_vllms_engine_is_the_one_that_the_recipe_asks_for(tmp_path: Path) -> None:
    from pixart_jobs.caption_vllm import configure

    settings = CaptionSettings(captioner="vllm:a/b", num_gpus=4, num_workers=3, batch_images=64)
    config = configure("a/b", settings, "0123abc")
    assert (config.model_source, config.concurrency, config.batch_size) == ("a/b", 3, 64)
    assert config.engine_kwargs["revision"] == "0123abc"
    assert config.engine_kwargs["tensor_parallel_size"] == 4
    assert config.should_continue_on_error
    local = configure(str(tmp_path), settings, "digest of a folder")
    assert (local.model_source, "revision" in local.engine_kwargs) == (str(tmp_path), False)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_extra_is_named() -> None:
    from pixart_jobs.caption_vllm import build

    settings = CaptionSettings(captioner="vllm:a/b")
    with pytest.raises(ModelNotFound, match=r"'vllm:a/b': no vLLM here; .*\[vllm\].* 'a/b'"):
        build("vllm:a/b", settings, "0123abc")


def test_accuracy_is_the_share_of_captions_that_say_exactly_the_truth(tmp_path: Path) -> None:
    truths = [RED_THREE, RED_THREE, PAIR, PAIR]
    written = [[describe(RED_THREE), "raw"], ["a red five"], [describe(PAIR)], []]
    images = [{"truth": json.dumps(asdict(truth))} for truth in truths]
    captions = [{"captions": texts} for texts in written]
    found = measure_accuracy(
        write_table(tmp_path / "images", "images/2", [images[:3], images[3:]]),
        write_table(tmp_path / "captions", "captions/2", [captions[:3], captions[3:]]),
    )
    assert found == 0.5
