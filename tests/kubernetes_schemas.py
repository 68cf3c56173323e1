"""What Kubernetes takes, strictly: its own kinds by their schemas, KubeRay's by its definitions."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest

SCHEMAS = Path(__file__).parents[2] / "shared" / "schemas" / "kuberay"
_VERSION = "1.34"  # of Kubernetes
_KINDS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}


def validate(document: dict[str, Any]) -> None:
    """Raise jsonschema's ValidationError, or kubernetes_validate's, for what would be refused."""
    if document["kind"] in _KINDS:
        ray_validator(document["kind"]).validate(document)
    else:
        kubernetes_validate.validate(document, _VERSION, strict=True)


@cache
def ray_validator(kind: str) -> jsonschema.Draft202012Validator:
    """Of KubeRay's v1, made once: checking the schema itself takes ten seconds.

    Skips where the definitions are not beside this checkout.
    """
    path = SCHEMAS / f"{_KINDS[kind]}.json"
    if not path.exists():
        pytest.skip(f"{path} is not beside this checkout")  # KubeRay's CRDs are not ours to ship
    return jsonschema.Draft202012Validator(_closed(json.loads(path.read_text())["versions"]["v1"]))


def _closed(schema: Any) -> Any:
    """The schema with unknown fields forbidden, and Kubernetes' own words in JSON Schema's."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: _closed(part) for key, part in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    is_open = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and not is_open:
        inner["additionalProperties"] = False
    return inner
