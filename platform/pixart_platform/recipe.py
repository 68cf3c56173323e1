"""Reading recipes: one YAML file, overrides by path, errors by place.

The sections themselves are pydantic models that live beside their owners; this file knows how to
load any of them. A recipe's *digest* names what was asked for, so equal work is found again.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError

from pixart_platform.errors import RecipeError

_SUFFIX = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}


class Section(BaseModel):
    """Base of every recipe section: frozen, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def parse_count(value: object) -> object:
    """``2M`` -> 2000000; other types pass through for pydantic to judge."""
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMB]?)", value.strip().replace("_", ""))
        if not match:
            raise ValueError(f"{value!r} is not a count; write 2000000, 2_000_000 or 2M (k, M, B)")
        scaled = Decimal(match[1]) * _SUFFIX[match[2]]
        if scaled != int(scaled):
            raise ValueError(f"{value!r} is not a whole number")
        return int(scaled)
    return value


Count = Annotated[int, BeforeValidator(parse_count)]
"""A whole number that may be written with a suffix: ``50k``, ``2M``, ``1.7B``."""


def _check_labels(labels: dict[str, str]) -> dict[str, str]:
    for key, value in labels.items():
        if not re.fullmatch(r"[\w./-]{1,253}", key) or not re.fullmatch(
            r"!?[\w.(), -]{1,63}", value
        ):
            raise ValueError(
                f"{key}: {value!r} is not a label; write {{ray.io/accelerator-type: A100}}"
            )
    return labels


NodeLabels = Annotated[dict[str, str], AfterValidator(_check_labels)]
"""What Ray's labels of a node must be, as ``{ray.io/accelerator-type: A100}``; empty, any node."""

Model = TypeVar("Model", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """PyYAML's, but a key given twice is an error: it would drop the first and say nothing."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        names = [str(key.value) for key, _ in node.value]
        for i, name in enumerate(names):
            if name in names[:i]:
                mark = node.value[i][0].start_mark
                raise yaml.MarkedYAMLError(problem=f"{name} is given twice", problem_mark=mark)
        return node


def find_file(name_or_path: str, built_in: Path, what: str) -> Path:
    """A .yaml file as it is given, or one of ``built_in`` by name. Raises RecipeError."""
    path = Path(name_or_path)
    if path.suffix:
        return path
    path = built_in / f"{name_or_path}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in built_in.glob("*.yaml")))
        raise RecipeError(
            f"{what} {name_or_path!r} is not built in (there is: {known}); give a .yaml file"
        )
    return path


def load_recipe(path: Path, schema: type[Model], overrides: Iterable[str] = ()) -> Model:
    """Read ``path``, apply ``a.b.c=value`` overrides, validate. Raises RecipeError."""
    try:
        raw = yaml.load(path.read_text(), _Loader)
    except OSError as error:
        raise RecipeError(f"recipe {path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = ""
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
            line = f" at line {error.problem_mark.line + 1}: {error.problem}"
        raise RecipeError(f"recipe {path}: not valid YAML{line}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"recipe {path}: must be a mapping of sections, not {type(raw).__name__}")
    for override in overrides:
        _apply(raw, override)
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(_explain(error, path, schema)) from error


def _apply(raw: dict[str, Any], override: str) -> None:
    """Set one ``a.b.c=value`` in place; the value is YAML."""
    dotted, separator, text = override.partition("=")
    keys = dotted.split(".")
    if not separator or not all(keys):
        raise RecipeError(f"--set {override}: write it as path.to.key=value")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override}: the value is not valid YAML") from error
    node = raw
    for key in keys[:-1]:
        child = node.get(key, {})
        if not isinstance(child, dict):
            raise RecipeError(f"--set {override}: {key} is a value, not a section")
        node[key] = dict(child)  # a copy: YAML aliases share one
        node = node[key]
    node[keys[-1]] = value


def _explain(error: ValidationError, path: Path, schema: type[BaseModel]) -> str:
    """One line for each fault: place, value, what would be right."""
    lines = []
    for fault in error.errors():
        place = ".".join(str(part) for part in fault["loc"])
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            keys = _siblings(schema, fault["loc"])
            near = difflib.get_close_matches(str(fault["loc"][-1]), keys, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(keys)}"
            message = f"unknown key; {hint}"
            lines.append(f"recipe {path}: {place}: {message}")
        elif fault["type"] == "missing":
            lines.append(f"recipe {path}: {place}: is required")
        elif isinstance(fault["input"], dict) and fault["type"] == "value_error":
            lines.append(": ".join(filter(None, (f"recipe {path}", place, message))))
        else:
            lines.append(f"recipe {path}: {place} = {fault['input']!r}: {message}")
    return "\n".join(lines)


def _siblings(schema: type[BaseModel], place: tuple[int | str, ...]) -> list[str]:
    """The keys a schema knows in the section that holds ``place``."""
    root = schema.model_json_schema()
    node = root
    for part in place[:-1]:
        named = node.get("patternProperties", {}).values()
        others = next(iter(named), node.get("additionalProperties"))
        node = node.get("properties", {}).get(part) or others or {}
        if "$ref" in node:
            node = root["$defs"][node["$ref"].rpartition("/")[2]]
    return sorted(node.get("properties", {}))


def digest_of(document: Mapping[str, Any]) -> str:
    """16 hex digits naming a JSON-like document, whatever the order of its keys."""
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
