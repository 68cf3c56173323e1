"""Prompts that say what must be seen, and whether it was: GenEval's files and its verdict.

A file is GenEval's own (Ghosh et al. 2023, arXiv 2310.11513): a line of JSON a prompt, with its
``tag``, what a picture must ``include`` (class, count, and if asked colour and position relative to
an earlier one of these) and must ``exclude``. A detector tells what is in a picture: the digit
reader, or ``module:name`` of one's own.

A figure a tag is the share of its pictures that are right; ``overall`` is the mean over tags, as
GenEval reports it. Thresholds are GenEval's.
"""

import hashlib
import importlib
import inspect
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixart_models.digits import DIGIT_NAMES, READER, evaluation_reader
from pixart_platform.errors import PixartError
from pixart_platform.recipe import digest_of

BUILTIN = "builtin:digits"
_CONFIDENCE = 0.3
_COUNTING_CONFIDENCE = 0.9  # of the tag "counting"
_MAX_OBJECTS = 16  # of a class in a picture
_POSITION_SLACK = 0.1  # of both objects' sizes
_MAX_PROMPTS, _MAX_CHARACTERS, _MAX_TAGS = 100_000, 2_000, 32
_TAG = re.compile(r"[A-Za-z0-9_-]{1,40}")
POSITIONS = ("left of", "right of", "above", "below")


class PromptFileError(PixartError):
    """A prompts file that cannot be read as GenEval's; names the file and the line."""


class DetectorError(PixartError):
    """A detector that cannot be used, or that answers something else than objects."""


@dataclass(frozen=True)
class Wanted:
    """Objects of a class that a picture must show, or of which it must show fewer."""

    name: str
    count: int
    color: str = ""
    position: tuple[str, int] | None = None
    """How each lies, to which of the earlier ones."""


@dataclass(frozen=True)
class Task:
    """A line of the file."""

    tag: str
    prompt: str
    include: tuple[Wanted, ...]
    exclude: tuple[Wanted, ...] = ()


@dataclass(frozen=True)
class Seen:
    """An object in a picture; its box is (left, top, right, bottom) in pixels."""

    name: str
    box: tuple[float, float, float, float]
    score: float = 1.0
    color: str = ""


Detector = Callable[[NDArray[np.uint8]], Sequence[Seen]]


def read_tasks(path: Path) -> list[Task]:
    """All lines of a prompts file. Raises PromptFileError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8"
        raise PromptFileError(f"prompts:{path}: cannot be read ({why})") from error
    tasks = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                tasks.append(_parse(line))
            except (ValueError, RecursionError) as error:
                raise PromptFileError(f"prompts:{path}: line {number}: {error}") from error
    tags = {task.tag for task in tasks}
    for what, found, most in (("prompts", tasks, _MAX_PROMPTS), ("tags", tags, _MAX_TAGS)):
        if not 0 < len(found) <= most:
            raise PromptFileError(f"prompts:{path}: holds {len(found)} {what}; 1 to {most} will do")
    return tasks


def _parse(line: str) -> Task:
    """Raises ValueError, json's among them."""
    raw = json.loads(line)
    if not isinstance(raw, dict):
        raise ValueError(f"is {type(raw).__name__}, not an object")
    tag, prompt = raw.get("tag", "untagged"), raw.get("prompt")
    if not (isinstance(tag, str) and _TAG.fullmatch(tag)):
        raise ValueError(f"tag = {tag!r}: must be 1 to 40 letters, digits, _ or -")
    if not (isinstance(prompt, str) and prompt.strip() and len(prompt) <= _MAX_CHARACTERS):
        shown = str(prompt)[:60]
        raise ValueError(f"prompt = {shown!r}: must be 1 to {_MAX_CHARACTERS} characters")
    groups = []
    for key in ("include", "exclude"):
        found = raw.get(key, [])
        if not isinstance(found, list) or len(found) > _MAX_OBJECTS:
            raise ValueError(f"{key} = {str(found)[:60]}: must be a list of at most {_MAX_OBJECTS}")
        groups.append(tuple(_parse_wanted(key, k, entry) for k, entry in enumerate(found)))
    include, exclude = groups
    if not (include or exclude):
        raise ValueError("names nothing to include or exclude, so nothing can be judged")
    return Task(tag, prompt, include, exclude)


def _parse_wanted(key: str, k: int, raw: Any) -> Wanted:
    where = f"{key}[{k}]"
    if not isinstance(raw, dict):
        raise ValueError(f"{where} = {str(raw)[:60]}: must be an object")
    name, count, color = raw.get("class"), raw.get("count", 1), raw.get("color", "")
    if not (isinstance(name, str) and name):
        raise ValueError(f"{where}.class = {name!r}: must name a class")
    if type(count) is not int or not 1 <= count <= _MAX_OBJECTS + 1:
        raise ValueError(f"{where}.count = {count!r}: must be 1 to {_MAX_OBJECTS + 1}")
    if not isinstance(color, str):
        raise ValueError(f"{where}.color = {color!r}: must be a colour's name")
    place = raw.get("position")
    if place is None:
        return Wanted(name, count, color)
    match place:
        case [str(relation), int(target)] if relation in POSITIONS and 0 <= target < k:
            return Wanted(name, count, color, (relation, target))
    raise ValueError(
        f"{where}.position = {str(place)[:60]}: must be [one of {', '.join(POSITIONS)}, the number "
        f"of an earlier entry from 0]"
    )


def is_right(task: Task, objects: Sequence[Seen]) -> bool:
    """GenEval's verdict: all that is included is there, as it should be, and nothing excluded.

    Colour and position are asked of the ``count`` objects of a class the detector is surest of.
    """
    least = _COUNTING_CONFIDENCE if task.tag == "counting" else _CONFIDENCE
    by_name: dict[str, list[Seen]] = {}
    for seen in sorted(objects, key=lambda o: -o.score):
        if seen.score > least and len(by_name.setdefault(seen.name, [])) < _MAX_OBJECTS:
            by_name[seen.name].append(seen)
    matched: list[list[Seen]] = []
    for wanted in task.include:
        found = by_name.get(wanted.name, [])[: wanted.count]
        if len(found) < wanted.count:
            return False
        if wanted.color and any(seen.color != wanted.color for seen in found):
            return False
        if wanted.position:
            relation, target = wanted.position
            if any(relation not in relate(a, b) for a in found for b in matched[target]):
                return False
        matched.append(found)
    return all(len(by_name.get(w.name, [])) < w.count for w in task.exclude)


def relate(a: Seen, b: Seen) -> set[str]:
    """Where a lies as seen from b: none to two of POSITIONS, none where they lie together."""
    box_a, box_b = (np.reshape(o.box, (2, 2)).astype(float) for o in (a, b))
    offset = box_a.mean(axis=0) - box_b.mean(axis=0)
    slack = _POSITION_SLACK * (np.abs(np.diff(box_a, axis=0)) + np.abs(np.diff(box_b, axis=0)))[0]
    apart = np.maximum(np.abs(offset) - slack, 0) * np.sign(offset)
    if (np.abs(apart) < 1e-3).all():
        return set()
    x, y = apart / np.linalg.norm(offset)
    held = (x < -0.5, x > 0.5, y < -0.5, y > 0.5)
    return {name for name, holds in zip(POSITIONS, held, strict=True) if holds}


def load_detector(name: str) -> Detector:
    """``builtin:digits``, or ``module:name`` of a function, or of a class made once a worker.

    It is called with a picture (H, W, 3) uint8 and answers with mappings: ``class``, ``box`` (left,
    top, right, bottom), and if it can ``score`` (0 to 1) and ``color``. Raises DetectorError.
    """
    if name == BUILTIN:
        reader = evaluation_reader()
        return lambda picture: [
            Seen(DIGIT_NAMES[found.digit], found.box, 1.0, found.color)
            for found in reader.find(picture)
        ]
    where = f"evaluate.detector = {name!r}"
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute.isidentifier()) or module == "builtin":
        raise DetectorError(f"{where}: must be {BUILTIN} or module:name")
    try:
        found = getattr(importlib.import_module(module), attribute)
        detect = found() if isinstance(found, type) else found
    except Exception as error:  # a module of others may raise anything
        raise DetectorError(f"{where}: cannot be loaded ({_first_line(error)})") from error
    if not callable(detect):
        raise DetectorError(f"{where}: is {type(detect).__name__}, which cannot be called")
    return lambda picture: _detect(where, detect, picture)


def detector_revision(name: str) -> str:
    """What tells a detector from another of the same name: its module's file."""
    if name == BUILTIN:
        return READER
    file = inspect.getsourcefile(importlib.import_module(name.partition(":")[0]))
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] if file else ""


def _detect(where: str, detect: Callable[..., Any], picture: NDArray[np.uint8]) -> list[Seen]:
    try:
        answer = detect(picture)
    except Exception as error:  # a function of others may raise anything
        raise DetectorError(f"{where}: failed on a picture ({_first_line(error)})") from error
    try:
        return [_read_object(entry) for entry in answer]
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise DetectorError(
            f"{where}: answered {str(answer)[:80]}, but each object must have a class, a box of "
            f"four finite numbers, and may have a score and a color ({_first_line(error)})"
        ) from error


def _read_object(raw: Any) -> Seen:
    left, top, right, bottom = (float(value) for value in raw["box"])
    score = float(raw.get("score", 1.0))
    if not all(map(math.isfinite, (left, top, right, bottom, score))):
        raise ValueError("a number is not finite")
    return Seen(str(raw["class"]), (left, top, right, bottom), score, str(raw.get("color") or ""))


def _first_line(error: Exception) -> str:
    said = (str(error).strip() or "no reason given").splitlines()[0][:200]
    return f"{type(error).__name__}: {said}"


def dump_objects(objects: Sequence[Seen]) -> str:
    """As kept in a table."""
    return json.dumps([asdict(seen) for seen in objects])


def load_objects(text: str) -> list[Seen]:
    """Inverse of dump_objects."""
    return [Seen(**raw | {"box": tuple(raw["box"])}) for raw in json.loads(text)]


def digest_tasks(tasks: Sequence[Task]) -> str:
    """Names everything that decides what is right."""
    return digest_of({"tasks": [asdict(task) for task in tasks]})
