"""The API's description is complete and true, and its page needs nothing but itself."""

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from fastapi.testclient import TestClient
from test_serve_api import GENERATE, SETTINGS
from test_serve_jobs import BODY, Replica

from pixart_serve.contract import GenerationRequest
from pixart_serve.docs_page import render
from pixart_serve.jobs import JOBS
from pixart_serve.keys import ApiKeys, make_key
from pixart_serve.studio import PATHS

HIDDEN = {*PATHS, "/docs", "/openapi.json"}


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    made = Replica(str(tmp_path_factory.mktemp("jobs")), {"max_side": SETTINGS.max_side}).open()
    yield made
    made.close()


@pytest.fixture(scope="module")
def document(replica: Replica) -> Any:
    return replica.client.get("/openapi.json").json()


def test_every_route_is_described_and_no_other(replica: Replica, document: Any) -> None:
    app: Any = replica.client.app
    real = {
        (method.lower(), route.path_format)
        for route in app.routes
        for method in route.methods - {"HEAD"}
        if route.path not in HIDDEN
    }
    described = {(method, path) for path, found in document["paths"].items() for method in found}
    assert described == real


def test_every_reference_leads_somewhere(document: Any) -> None:
    names = set(re.findall(r'"\$ref": "#/components/schemas/(\w+)"', json.dumps(document)))
    assert names <= document["components"]["schemas"].keys()
    assert json.dumps(document).count('"$ref"') > 20


def strict(document: Any) -> Any:
    """The document, in which shapes have no fields but those they name."""
    copy = json.loads(json.dumps(document))
    for schema in copy["components"]["schemas"].values():
        if "properties" in schema:
            schema["additionalProperties"] = False
    return copy


def check(document: Any, method: str, path: str, response: Any) -> None:
    """Hold a real answer against what is said of its route."""
    answers = document["paths"][path][method]["responses"]
    status = str(response.status_code)
    content = (answers.get(status) or answers[f"{status[0]}XX"])["content"]
    schema = content[response.headers["content-type"].partition(";")[0]]["schema"]
    if schema.get("format") == "binary":
        assert response.content
        return
    events = re.findall(r"^data: (.*)$", response.text, re.M) or [response.text]
    for event in events:
        jsonschema.validate(
            json.loads(event), schema | {"components": strict(document)["components"]}
        )


def test_answers_are_as_described(replica: Replica, document: Any) -> None:
    client = replica.client
    job = replica.create(n=2, name="k").json()
    replica.finish(job)
    one = f"{JOBS}/{{id}}"
    for method, path, real, options in (
        ("post", GENERATE, GENERATE, {"json": BODY | {"n": 2, "user": "u"}}),
        ("post", GENERATE, GENERATE, {"json": BODY | {"stream": True, "partial_images": 1,
                                                       "num_inference_steps": 3}}),
        ("post", GENERATE, GENERATE, {"json": {}}),
        ("get", "/v1/models", "/v1/models", {}),
        ("get", "/v1/models/{model}", "/v1/models/digits@7", {}),
        ("get", "/v1/models/{model}", "/v1/models/none", {}),
        ("get", "/healthz", "/healthz", {}),
        ("post", JOBS, JOBS, {"json": BODY}),
        ("post", JOBS, JOBS, {"json": BODY, "headers": {"Idempotency-Key": "k"}}),
        ("get", JOBS, JOBS, {}),
        ("get", JOBS, f"{JOBS}?limit=x", {}),
        ("get", one, f"{JOBS}/{job['id']}", {}),
        ("get", f"{one}/images/{{k}}", f"{JOBS}/{job['id']}/images/1", {}),
        ("get", f"{one}/images/{{k}}", f"{JOBS}/{job['id']}/images/2", {}),
        ("post", f"{one}/cancel", f"{JOBS}/{job['id']}/cancel", {}),
        ("delete", one, f"{JOBS}/{job['id']}", {}),
    ):  # fmt: skip
        check(document, method, path, client.request(method, real, **options))


def test_bodies_are_those_that_are_parsed(document: Any) -> None:
    schemas = document["components"]["schemas"]
    fields = schemas["GenerationRequest"]["properties"]
    assert (
        fields.keys()
        == GenerationRequest.model_fields.keys()
        == (schemas["JobRequest"]["properties"].keys())
    )
    wrapped = {"$ref": "#/components/schemas/JobRequest", "components": document["components"]}
    jsonschema.validate(BODY | {"n": 100}, wrapped)
    for bad in ({"stream": True}, {"n": 0}, {"nonsense": 1}, {"guidance_scale": 21}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(BODY | bad, wrapped)


class Links(HTMLParser):
    """What a page refers to, and which of its parts can be referred to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.targets: set[str] = set()
        self.ids: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        found = dict(attrs)
        self.targets |= {str(found[name]) for name in ("href", "src", "action") if name in found}
        self.ids |= {f"#{found['id']}"} if "id" in found else set()


def test_the_page_shows_all_and_loads_nothing(replica: Replica, document: Any) -> None:
    response = replica.client.get("/docs")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in response.headers["content-security-policy"]
    links = Links(response.text)
    assert links.targets <= links.ids | {"openapi.json"}
    assert not links.tags & {"script", "img", "link", "iframe", "form"}
    assert "url(" not in response.text
    assert "@import" not in response.text
    for path in document["paths"]:
        assert path in response.text
    for schema in document["components"]["schemas"].values():
        for name in schema.get("properties", {}):
            assert f"<code>{name}" in response.text


def test_the_page_escapes_what_it_shows(document: Any) -> None:
    evil = "<script>alert('x')</script>"
    poisoned = json.loads(json.dumps(document).replace("The job's.", evil))
    poisoned["info"]["title"] = evil
    page = render(poisoned)
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_with_keys_the_description_asks_for_one(tmp_path: Path) -> None:
    key, line = make_key("studio")
    (tmp_path / "keys").write_text(line)
    made = Replica(str(tmp_path), {"api_keys_file": "keys"}, ApiKeys(tmp_path / "keys"))
    client: TestClient = made.client
    for path in ("/docs", "/openapi.json"):
        assert client.get(path).status_code == 401
    headers = {"Authorization": f"Bearer {key}"}
    document = client.get("/openapi.json", headers=headers).json()
    assert document["security"] == [{"key": []}]
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert document["paths"]["/healthz"]["get"]["security"] == []
    assert "Authorization: Bearer KEY" in client.get("/docs", headers=headers).text
    made.close()
