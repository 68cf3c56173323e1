"""Requests that no sensible client sends: bodies, headers, paths and bytes gone wrong.

A function of the seed. Most begin as a good request of few steps, of which one to three things are
made wrong, as those come nearest to what a parser forgot.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

PATH = "/v1/images/generations"
GOOD: dict[str, Any] = {
    "prompt": "a red three", "model": "digits", "n": 1, "size": "32x32", "quality": "low",
    "response_format": "b64_json", "output_format": "png", "output_compression": 100,
    "background": "opaque", "moderation": "low", "stream": False, "partial_images": 0,
    "user": "u", "safety_identifier": "s", "seed": 1, "negative_prompt": "", "guidance_scale": 2.0,
    "num_inference_steps": 2, "guidance_interval": [0, 1000], "guidance_rescale": 0.5,
    "max_wait_seconds": 60,
}  # fmt: skip
ODD_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e308, float("nan"),
    float("inf"), -float("inf"), "", " ", "0", "1", "NaN", "null", "true", "auto", "x" * 70_000,
    "\x00", "\ud800", "\u202e\u200b", "é" * 5000, "😀" * 2000, "32x32x32", "0x0", "-8x8", "x",
    "99999x99999", "\u0661\u0666x8", "32X32", " 32x32", "1e1x32", "{}", "${jndi:ldap://a}", "';--",
    "../../etc/passwd", "<script>", "digits@1", "digits@-1", "digits@" + "9" * 400, "digits@../x",
    "digits@champion\n", "@", "digits@", [], [[]], {}, {"a": 1}, [None], [1, 2, 3], [1000, 0],
    ["0", "1000"], [float("nan"), 5], {"$ref": "#"}, {"prompt": "a"},
]  # fmt: skip
_METHODS = ("GET", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "POST")
_PATHS = (
    "/", "//", "/v1", "/v1/", "/v1/models", "/v1/models/", "/v1/models/digits", "/v1/models/%00",
    "/v1/models/digits@99999", "/v1/models/..%2f..%2fetc%2fpasswd", "/v1/models/" + "a" * 5000,
    "/v1/images/generations/", "/v1/images/edits", "/v1/images/jobs", "/v1/images/jobs/x",
    "/v1/images/jobs/%00", "/v1/images/jobs/../../x", "/healthz", "/healthz?x=" + "%ff" * 100,
    "/docs", "/openapi.json", "/%", "/%zz", "/\u00e9", "/v1/images/generations?stream=true",
)  # fmt: skip
_HEADERS = (
    "x-request-id", "idempotency-key", "authorization", "accept", "expect", "content-encoding",
)  # fmt: skip
_HEADER_VALUES = ("", "x", "Bearer ", "Bearer x", "\t", "é" * 50, "a" * 4000, "gzip")
_TYPES = (
    "application/json", "text/plain", "multipart/form-data", "application/json; charset=utf-16",
    "application/x-www-form-urlencoded", "", "x" * 300, "application/xml",
)  # fmt: skip


@dataclass
class OddRequest:
    """What is sent."""

    method: str = "POST"
    path: str = PATH
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "application/json"})


def odd_requests(seed: int, count: int) -> Iterator[OddRequest]:
    rng = random.Random(seed)
    kinds = (_odd_fields, _odd_fields, _odd_fields, _odd_json, _odd_bytes, _odd_http)
    for _ in range(count):
        yield rng.choice(kinds)(rng)


def _odd_fields(rng: random.Random) -> OddRequest:
    body = {name: GOOD[name] for name in rng.sample(sorted(GOOD), rng.randint(0, len(GOOD)))}
    body |= {"prompt": GOOD["prompt"], "num_inference_steps": 2}
    for _ in range(rng.randint(1, 3)):
        name = rng.choice([*GOOD, "steps", "width", "__class__", "\x00", ""])
        if rng.random() < 0.1:
            body.pop(name, None)
        else:
            body[name] = rng.choice(ODD_VALUES)
    return OddRequest(body=_dump(body))


def _odd_json(rng: random.Random) -> OddRequest:
    good = _dump(GOOD)
    cut = rng.randrange(len(good))
    return OddRequest(body=rng.choice([
        b"", b"null", b"[]", b"3", b'"x"', b"{", b"}", b"{}" * 3, b"\xef\xbb\xbf" + good,
        good.decode().encode("utf-16"), b"[" * 100_000, b'{"a":' * 20_000, good[:cut],
        good[:cut] + b"\xff" + good[cut:], good[:-1] + b',"prompt":"again"}',
        b'{"prompt":' + b"9" * 10_000 + b"}", b'{"prompt":"a","seed":1e999}',
        b'{"prompt":"a","seed":' + b"1" * 5000 + b"}", b'{"prompt":"\\ud800"}',
        b'{"prompt":"' + b"\\u0000" * 500 + b'"}', good + b" " * 500_000, good + b"\x00",
    ]))  # fmt: skip


def _odd_bytes(rng: random.Random) -> OddRequest:
    body = bytearray(_dump(GOOD))
    for _ in range(rng.randint(1, 8)):
        body[rng.randrange(len(body))] = rng.randrange(256)
    return OddRequest(body=bytes(body))


def _odd_http(rng: random.Random) -> OddRequest:
    headers = {"content-type": rng.choice(_TYPES)}
    for name in rng.sample(_HEADERS, rng.randint(0, 3)):
        headers[name] = rng.choice(_HEADER_VALUES)
    return OddRequest(
        rng.choice(_METHODS), rng.choice([PATH, *_PATHS]),
        rng.choice([b"", _dump(GOOD), b"x" * 1000]), headers,
    )  # fmt: skip


def _dump(body: Any) -> bytes:
    return json.dumps(body).encode("utf-8", "surrogatepass")
