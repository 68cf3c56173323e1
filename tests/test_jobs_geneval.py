"""GenEval's prompts and verdict: files refused by line, objects judged as GenEval judges them."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluations import write_prompts

from pixart_jobs import geneval
from pixart_jobs.geneval import (
    DetectorError,
    PromptFileError,
    Seen,
    Task,
    Wanted,
    is_right,
    load_detector,
    read_tasks,
    relate,
)
from pixart_jobs.scenes import compose
from pixart_jobs.suites import PromptsSuite
from pixart_models.digits import Reading
from pixart_platform.storage import LocalFolder

GRAY = np.full((8, 8, 3), 50, np.uint8)


def at(x: float, y: float, name: str = "cat", size: float = 2, **more: Any) -> Seen:
    return Seen(name, (x, y, x + size, y + size), **more)


def test_a_file_of_genevals_own_is_read(tmp_path: Path) -> None:
    tasks = read_tasks(write_prompts(tmp_path / "x.jsonl"))
    assert [t.tag for t in tasks] == ["single_object"] * 2 + ["counting"] * 2 + ["position"]
    assert tasks[2].exclude == (Wanted("two", 3),)
    assert tasks[4].include[1] == Wanted("two", 1, "white", ("above", 0))


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "Expecting property name"),
        ("[1]", "is list, not an object"),
        ('{"include": [{"class": "cat"}]}', "prompt = 'None': must be 1 to 2000 characters"),
        ('{"prompt": "x"}', "names nothing to include or exclude"),
        ('{"prompt": "x", "tag": "a b", "include": []}', "tag = 'a b': must be"),
        ('{"prompt": "x", "include": {}}', "include = {}: must be a list"),
        ('{"prompt": "x", "include": ["cat"]}', "include[0] = cat: must be an object"),
        ('{"prompt": "x", "include": [{"class": ""}]}', "include[0].class = '': must name a class"),
        (
            '{"prompt": "x", "include": [{"class": "c", "count": 1e9}]}',
            "count = 1000000000.0: must",
        ),
        ('{"prompt": "x", "include": [{"class": "c", "count": true}]}', "count = True: must be 1"),
        ('{"prompt": "x", "exclude": [{"class": "c", "color": 3}]}', "exclude[0].color = 3: must"),
        (
            '{"prompt": "x", "include": [{"class": "c", "position": ["above", 0]}]}',
            "include[0].position = ['above', 0]: must be [one of left of, right of, above, below",
        ),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / "bad.jsonl"
    good = json.dumps({"prompt": "x", "include": [{"class": "cat"}]})
    path.write_text(f"{good}\n\n{line}\n")
    with pytest.raises(PromptFileError, match=re.escape(f"{path}: line 3: ")) as caught:
        read_tasks(path)
    assert why in str(caught.value)


def test_a_file_that_is_not_there_empty_or_of_too_many_tags_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptFileError, match=r"no.jsonl: cannot be read \(No such file"):
        read_tasks(tmp_path / "no.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(PromptFileError, match="holds 0 prompts; 1 to 100000"):
        read_tasks(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(PromptFileError, match="not UTF-8"):
        read_tasks(tmp_path / "latin.jsonl")
    lines = [{"tag": f"t{i}", "prompt": "x", "include": [{"class": "c"}]} for i in range(33)]
    (tmp_path / "tags.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(PromptFileError, match="holds 33 tags; 1 to 32"):
        read_tasks(tmp_path / "tags.jsonl")


def judge(objects: list[Seen], *include: Wanted, tag: str = "x", **more: Any) -> bool:
    return is_right(Task(tag, "p", include, **more), objects)


def test_enough_of_a_class_are_right_and_more_unless_excluded() -> None:
    cats = [at(0, 0), at(5, 0)]
    assert judge(cats, Wanted("cat", 2))
    assert judge(cats, Wanted("cat", 1))
    assert not judge(cats, Wanted("cat", 3))
    assert not judge(cats, Wanted("dog", 1))
    assert not judge(cats, Wanted("cat", 1), exclude=(Wanted("cat", 2),))
    assert judge(cats, Wanted("cat", 2), exclude=(Wanted("cat", 3),))


def test_what_the_detector_is_not_sure_of_is_not_there_and_counting_asks_more() -> None:
    assert not judge([at(0, 0, score=0.3)], Wanted("cat", 1))
    assert judge([at(0, 0, score=0.31)], Wanted("cat", 1))
    assert not judge([at(0, 0, score=0.9)], Wanted("cat", 1), tag="counting")
    assert judge([at(0, 0, score=0.91)], Wanted("cat", 1), tag="counting")


def test_colour_is_asked_of_the_surest_of_a_class() -> None:
    both = [at(0, 0, color="red", score=0.8), at(5, 0, color="blue", score=0.9)]
    assert judge(both, Wanted("cat", 1, "blue"))
    assert not judge(both, Wanted("cat", 1, "red"))
    assert not judge(both, Wanted("cat", 2, "blue"))


def test_position_is_asked_of_all_against_all_of_the_group() -> None:
    dog, cat = at(0, 0, "dog"), at(10, 1)
    asked = (Wanted("dog", 1), Wanted("cat", 1, "", ("right of", 0)))
    assert judge([dog, cat], *asked)
    assert not judge([at(20, 0, "dog"), cat], *asked)
    two = (Wanted("dog", 2), Wanted("cat", 1, "", ("right of", 0)))
    assert not judge([dog, at(20, 0, "dog", score=0.5), cat], *two)


@pytest.mark.parametrize(
    ("x", "y", "wanted"),
    [
        (-10, 0, {"left of"}), (10, 0, {"right of"}), (0, -10, {"above"}), (0, 10, {"below"}),
        (10, 10, {"right of", "below"}), (0.1, 0.1, set()), (10, 2, {"right of"}),
    ],
)  # fmt: skip
def test_where_one_lies_from_another(x: float, y: float, wanted: set[str]) -> None:
    assert relate(at(x, y), at(0, 0)) == wanted


def test_the_digit_reader_finds_digits_with_colour_and_place() -> None:
    detect = load_detector(geneval.BUILTIN)
    rng = np.random.default_rng(3)
    scenes = [
        compose(Reading((4, 0), ("red", "white"), relation), "train", rng).image
        for relation in ("left of", "above") for _ in range(4)
    ]  # fmt: skip
    left = Task("p", "x", (Wanted("zero", 1, "white"), Wanted("four", 1, "red", ("left of", 0))))
    above = Task("p", "x", (Wanted("zero", 1), Wanted("four", 1, "", ("above", 0))))
    found = [detect(scene) for scene in scenes]
    assert sum(is_right(left, seen) for seen in found[:4]) >= 3
    assert sum(is_right(above, seen) for seen in found[4:]) >= 3
    assert not any(is_right(left, seen) for seen in found[4:])
    assert detect(np.zeros((32, 32, 3), np.uint8)) == []


def test_a_detector_of_ones_own_is_a_function_or_a_class() -> None:
    for name in ("find_bright", "CountingDetector"):
        detect = load_detector(f"evaluations:{name}")
        assert detect(GRAY) == [Seen("three", (0, 0, 8, 8), 0.95)]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("builtin:cats", "must be builtin:digits or module:name"),
        ("evaluations", "must be builtin:digits or module:name"),
        ("no_such_module:find", "cannot be loaded (ModuleNotFoundError"),
        ("evaluations:find_nothing", "cannot be loaded (AttributeError"),
        ("evaluations:GRAY", "cannot be loaded"),
        ("json:__doc__", "is str, which cannot be called"),
    ],
)
def test_a_detector_that_cannot_be_used_is_named(name: str, why: str) -> None:
    with pytest.raises(DetectorError, match=re.escape(f"evaluate.detector = '{name}': {why}")):
        load_detector(name)


def test_a_detector_that_answers_something_else_or_fails_is_named() -> None:
    detect = load_detector("evaluations:find_nonsense")
    with pytest.raises(DetectorError, match=r"find_nonsense'.*a box of four finite numbers"):
        detect(GRAY)
    with pytest.raises(DetectorError, match=r"'json:loads': failed on a picture \(TypeError"):
        load_detector("json:loads")(GRAY)


def test_figures_are_a_tag_each_and_overall_weighs_tags_alike(tmp_path: Path) -> None:
    suite = PromptsSuite.open(
        str(write_prompts(tmp_path / "My five.jsonl")), 2, "evaluations:find_bright"
    )
    assert (suite.name, suite.copies, len(suite.prompts)) == ("prompts-my-five", 2, 5)
    # Of ten pictures: the first prompt's both right, of the third (two twos) one.
    three, twos = [at(0, 0, "three")], [at(0, 0, "two"), at(9, 0, "two")]
    seen = [three, three, [], [], twos, [], [], [], [], []]
    rows = [{"seen": geneval.dump_objects(objects)} for objects in seen]
    found = suite.measure(rows, LocalFolder(tmp_path))
    values = {name: figure.value for name, figure in found.figures.items()}
    assert values == {
        "my-five_single_object": 0.5, "my-five_counting": 0.25, "my-five_position": 0.0,
        "my-five_overall": pytest.approx(0.25),
    }  # fmt: skip
    assert found.outcomes["my-five_counting"] == [[0, 0], [0, 0], [1, 2], [0, 2], [0, 0]]
    assert all(len(pairs) == 5 for pairs in found.outcomes.values())


def test_another_detector_or_file_is_another_basis(tmp_path: Path) -> None:
    path = str(write_prompts(tmp_path / "x.jsonl"))
    first = PromptsSuite.open(path, 2, "evaluations:find_bright").settings
    second = PromptsSuite.open(path, 2, "evaluations:CountingDetector").settings
    assert first["tasks"] == second["tasks"]
    assert first["detector"] != second["detector"]
    (tmp_path / "y.jsonl").write_text(Path(path).read_text().replace("white", "cyan"))
    other = PromptsSuite.open(str(tmp_path / "y.jsonl"), 2, "evaluations:find_bright").settings
    assert other["tasks"] != first["tasks"]
