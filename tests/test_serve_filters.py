"""Filters of the operator's: what they refuse is not drawn or not sent, and they fail closed."""

import logging
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from test_serve_api import GENERATE, SETTINGS, Service, build_service, decode, error_of
from test_serve_snapshots import Gate

from pixart_serve.filters import FilterError, load_filters

_NUMBERS = count()
PROMPT_FILTER = """
def judge(prompt, negative_prompt):
    if "blood" in f"{prompt} {negative_prompt}":
        return "no violence here"
    if "five" in prompt:
        raise ValueError(f"cannot read {prompt}")
    return "" if "six" in prompt else True if "seven" in prompt else None
"""
PICTURE_FILTER = """
seen = []

def judge(picture):
    seen.append((picture.shape, str(picture.dtype)))
    if picture.shape[1] == 48:
        return "too wide to be shown"
    if picture.shape[1] == 16:
        raise KeyError("no class for this")
"""
Named = Callable[[str], str]


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Named:
    """Writes a module where replicas find it, and gives the name of its ``judge``."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(text: str) -> str:
        module = f"filter_{next(_NUMBERS)}"
        (tmp_path / f"{module}.py").write_text(text)
        return f"{module}:judge"

    return write


@pytest.fixture
def guard() -> Iterator[Callable[..., Service]]:
    made: list[Service] = []

    def build(**filters: str) -> Service:
        made.append(build_service(settings=SETTINGS.model_copy(update=filters)))
        return made[-1]

    yield build
    for service in made:
        service.engine.close()


Guard = Callable[..., Service]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_a_prompt_that_is_refused_is_never_worked_on(
    guard: Guard, named: Named, field: str, streaming: bool
) -> None:
    service = guard(prompt_filter=named(PROMPT_FILTER))
    gate = Gate(service.drawer.network, permits=100)
    error = error_of(service.generate(stream=streaming, **{field: "a pool of blood"}), 400)
    assert error == {
        "message": "the prompt was refused: no violence here", "type": "invalid_request_error",
        "param": "prompt", "code": "content_policy_violation",
    }  # fmt: skip
    # Before a version is looked for, which may load one.
    assert error_of(service.generate(model="other", prompt="blood"), 400)["code"]
    assert gate.batches == []
    assert service.generate().status_code == 200


@pytest.mark.parametrize(
    ("prompt", "fault"),
    [
        ("a secret five", "raised ValueError in judge, "),
        ("a secret six", "answered with str, not None or a reason"),
        ("a secret seven", "answered with bool, not None or a reason"),
    ],
)
def test_a_filter_that_fails_refuses_and_is_logged_without_the_prompt(
    guard: Guard, named: Named, caplog: pytest.LogCaptureFixture, prompt: str, fault: str
) -> None:
    caplog.set_level(logging.DEBUG)
    service = guard(prompt_filter=named(PROMPT_FILTER))
    gate = Gate(service.drawer.network, permits=100)
    response = service.generate(prompt=prompt)
    error = error_of(response, 500)
    assert (error["code"], error["type"]) == ("filter_failed", "server_error")
    assert response.headers["x-should-retry"] == "false"
    assert gate.batches == []
    assert f"serve.prompt_filter {fault}" in caplog.text
    assert "secret" not in caplog.text + response.text


def test_a_picture_that_is_refused_is_never_sent(guard: Guard, named: Named) -> None:
    name = named(PICTURE_FILTER)
    service = guard(picture_filter=name)
    error = error_of(service.generate(size="48x32"), 400)
    assert error["message"] == "the picture was drawn and held back: too wide to be shown"
    assert (error["param"], error["code"]) == ("prompt", "moderation_blocked")
    assert error_of(service.generate(size="16x16"), 500)["code"] == "filter_failed"
    answer = service.generate(n=2, size="32x48").json()
    assert [decode(entry).size for entry in answer["data"]] == [(32, 48)] * 2
    seen = load_filters(SETTINGS.model_copy(update={"picture_filter": name})).picture
    assert seen
    shapes = seen.__globals__["seen"]  # loaded once: the same module as the service's
    assert shapes == [((h, w, 3), "uint8") for h, w in ((32, 48), (16, 16), (48, 32), (48, 32))]


def test_a_stream_holds_previews_back_and_ends_in_the_refusal(guard: Guard, named: Named) -> None:
    service = guard(picture_filter=named(PICTURE_FILTER))
    asked: dict[str, Any] = {"stream": True, "partial_images": 3, "num_inference_steps": 4}
    good = service.generate(**asked).text
    assert [line for line in good.split("\n") if line.startswith("event")] == [
        "event: image_generation.completed"
    ]
    for size, code in (("48x32", "moderation_blocked"), ("16x16", "filter_failed")):
        refused = service.generate(**asked, size=size).text
        assert refused.startswith("event: error\n")
        assert code in refused
        assert "b64_json" not in refused


BAD_NAMES = [
    ("judge", "must be module:function"), ("a:b:c", "must be module:function"),
    (":judge", "must be module:function"), ("os:", "must be module:function"),
    ("no_such_module:judge", r"cannot import no_such_module \(ModuleNotFoundError.*PYTHONPATH"),
    ("..relative:judge", "cannot import"), ("os:no_such", "os has no function 'no_such'"),
    ("os:name", "os has no function 'name'"),
]  # fmt: skip


@pytest.mark.parametrize("setting", ["prompt_filter", "picture_filter"])
@pytest.mark.parametrize(("name", "says"), BAD_NAMES)
def test_a_name_that_is_no_filter_stops_the_start(setting: str, name: str, says: str) -> None:
    with pytest.raises(FilterError, match=rf"^serve\.{setting} = '{name}': {says}"):
        build_service(live=False, settings=SETTINGS.model_copy(update={setting: name}))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def judge(prompt): pass", r"must take \(prompt, negative_prompt\): too many positional"),
        ("async def judge(prompt, negative_prompt): pass", "must be a plain function"),
        ("raise RuntimeError('no model file')", r"cannot import .*RuntimeError: no model file"),
        ("def judge(", r"cannot import .*SyntaxError"),
    ],
)
def test_what_cannot_be_called_stops_the_start(named: Named, text: str, says: str) -> None:
    with pytest.raises(FilterError, match=rf"serve\.prompt_filter = .*{says}"):
        load_filters(SETTINGS.model_copy(update={"prompt_filter": named(text)}))


def test_without_filters_nothing_is_asked(guard: Guard) -> None:
    filters = load_filters(SETTINGS)
    assert (filters.prompt, filters.picture) == (None, None)
    body = {"prompt": "a pool of blood", "num_inference_steps": 1}
    assert guard().client.post(GENERATE, json=body).status_code == 200
