"""The API's description as a page for people, ``/docs``, made of ``/openapi.json``'s document.

No script, nothing from another place (Swagger's page loads 1.4 MB from a CDN): it must be readable
on a machine without a network. Everything in it is escaped.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from html import escape
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse

from pixart_serve.openapi import describe_api

_STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentcolor 20%, transparent); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
section { border-top: 1px solid var(--line); margin-top: 1.5rem; overflow-wrap: anywhere; }
h2 { margin-top: 2.5rem; } h3 { font: 600 1rem ui-monospace, monospace; }
b { text-transform: uppercase; } code { font-size: .9em; }
table { border-collapse: collapse; width: 100%; } th { text-align: left; }
td, th { border-bottom: 1px solid var(--line); padding: .3rem .8rem .3rem 0; vertical-align: top; }
td p { margin: 0; }
@media (max-width: 40rem) {
  th { display: none; } tr { border-bottom: 1px solid var(--line); }
  tr, td { display: block; border: 0; padding: .1rem 0; }
}
"""
_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
_LIMITS = {
    "minimum": ">= {}", "exclusiveMinimum": "> {}", "maximum": "<= {}", "minLength": "length >= {}",
    "pattern": "matching {}", "default": "default {}",
}  # fmt: skip


def add_docs(app: FastAPI) -> None:
    """Give ``app`` its description, and the page that shows it."""

    async def send_description() -> JSONResponse:
        return JSONResponse(describe_api(_wants_key(app)))

    async def send_page() -> HTMLResponse:
        style = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
        policy = f"{_POLICY}style-src 'sha256-{style}'"
        page = render(describe_api(_wants_key(app)))
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    app.add_api_route("/openapi.json", send_description, methods=["GET"], include_in_schema=False)
    app.add_api_route("/docs", send_page, methods=["GET"], include_in_schema=False)


def _wants_key(app: FastAPI) -> bool:
    return bool(getattr(app.state, "wants_key", False))


def render(document: Mapping[str, Any]) -> str:
    """The page of an OpenAPI document."""
    info, schemas = document["info"], document["components"]["schemas"]
    operations = "".join(
        _operation(method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    )
    title = escape(info["title"])
    key = "<p>All here but <code>/healthz</code> want <code>Authorization: Bearer KEY</code>."
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
        f"<h1>{title} {escape(info['version'])}</h1>{_text(info['description'])}"
        f"{key if 'security' in document else ''}"
        f'<p>The same for programs: <a href="openapi.json">openapi.json</a>'
        f"<h2>Routes</h2>{operations}"
        f"<h2>Shapes</h2><p>Fields with * are required, or always there."
        f"{''.join(_shape(name, schemas[name]) for name in schemas)}</html>"
    )


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> str:
    parameters = [
        (f"{p['name']} ({p['in']})", _type(p["schema"]), p.get("description", ""))
        for p in operation.get("parameters", [])
    ]
    body = operation.get("requestBody", {}).get("content", {})
    takes = f"<p>Takes {_content(body)}" if body else ""
    answers = "".join(
        f"<p>{escape(status)}: {_content(answer['content'])}"
        for status, answer in operation["responses"].items()
    )
    return (
        f"<section><h3><b>{escape(method)}</b> {escape(path)}</h3>"
        f"{_text(operation['summary'] + '. ' + operation.get('description', ''))}"
        f"{_table(parameters)}{takes}{answers}</section>"
    )


def _content(content: Mapping[str, Any]) -> str:
    return ", ".join(
        f"<code>{escape(kind)}</code> {_type(what['schema'])}" for kind, what in content.items()
    )


def _shape(name: str, schema: Mapping[str, Any]) -> str:
    required = schema.get("required", [])
    fields = [
        (field + (" *" if field in required else ""), _type(of), of.get("description", ""))
        for field, of in schema.get("properties", {}).items()
    ]
    about = _text(schema.get("description", ""))
    return f'<section id="{escape(name)}"><h3>{escape(name)}</h3>{about}{_table(fields)}</section>'


def _table(rows: list[tuple[str, str, str]]) -> str:
    if not rows:
        return ""
    lines = "".join(
        f"<tr><td><code>{escape(name)}</code><td>{kind}<td>{_text(about)}"
        for name, kind, about in rows
    )
    return f"<table><tr><th>name<th>type<th>{lines}</table>"


def _type(schema: Mapping[str, Any]) -> str:
    """A JSON Schema in a few words, as HTML."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(map(_type, choices))
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return " or ".join(f"<code>{escape(json.dumps(value))}</code>" for value in values)
    if "prefixItems" in schema:
        return f"[{', '.join(map(_type, schema['prefixItems']))}]"
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}"
    words = [str(schema.get("type", "anything"))]
    words += [
        how.format(schema[name]) for name, how in _LIMITS.items() if schema.get(name) is not None
    ]
    return escape(", ".join(words))


def _text(text: str) -> str:
    """Prose with ``code`` in it."""
    parts = escape(" ".join(text.split())).replace("``", "`").split("`")
    return "<p>" + "".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(parts))
