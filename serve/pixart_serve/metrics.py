"""What a replica measures, in diffusion's own terms, for Prometheus.

Ray's agent on each node exports it, with the tags deployment, replica and application; Ray puts
``ray_`` before each name and makes a histogram's sum of its buckets' midpoints. ``METERS`` is the
list of all there is. Labels take few values: what goes beyond a number of them is counted as
``other``, rows by powers of two. What a step tells costs it 10 to 15 microseconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray.serve import metrics

from pixart_serve.observer import Observer

_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)  # seconds
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)  # seconds
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_KINDS = {"counter": metrics.Counter, "gauge": metrics.Gauge, "histogram": metrics.Histogram}
# How many values a label may take in one replica; of sizes times rows there are histograms.
_MAX_VALUES = {"size": 16, "key": 500, "version": 200}
_MAX_VALUES_ELSE = 50


@dataclass(frozen=True)
class Meter:
    """One metric; ``bounds`` are a histogram's."""

    name: str
    kind: str
    meaning: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()


METERS = (
    Meter("pixart_queue_wait_seconds", "histogram", "From a picture's being accepted to its first "
          "turn", (), _LONG),
    Meter("pixart_text_encode_seconds", "histogram", "A batch of prompts through the text encoder; "
          "prompts in memory cost nothing and are not counted", (), _SHORT),
    Meter("pixart_step_seconds", "histogram", "One step of a batch, by its size WIDTHxHEIGHT in "
          "pixels and its rows, rounded up to a power of two", ("size", "rows"), _SHORT),
    Meter("pixart_step_rows", "histogram", "Rows in a step; a guided picture takes two", (), _ROWS),
    Meter("pixart_decode_seconds", "histogram", "A batch of up to 8 through the autoencoder, by "
          "kind: picture or preview", ("kind",), _SHORT),
    Meter("pixart_picture_encode_seconds", "histogram", "A picture or preview made a file, by "
          "format", ("format",), _SHORT),
    Meter("pixart_first_preview_seconds", "histogram", "From a picture's being accepted to its "
          "first preview", (), _LONG),
    Meter("pixart_picture_seconds", "histogram", "From a picture's being accepted to its pixels",
          (), _LONG),
    Meter("pixart_pictures_total", "counter", "Pictures drawn, by version", ("version",)),
    Meter("pixart_pictures_cancelled_total", "counter", "Pictures nobody wanted to the end"),
    Meter("pixart_pictures_failed_total", "counter", "Pictures accepted that could not be drawn"),
    Meter("pixart_active_version", "gauge", "The number of the version new pictures begin on"),
    Meter("pixart_swaps_total", "counter", "Times that another version went live"),
    Meter("pixart_backlog_seconds", "gauge", "Predicted seconds of the work that is here"),
    Meter("pixart_request_seconds", "histogram", "A request from its arrival to the end of its "
          "answer, by route and status", ("route", "status"), _LONG),
    Meter("pixart_refusals_total", "counter", "Requests not answered as wished, by reason: the "
          "error's code, or what its status stands for", ("reason",)),
    Meter("pixart_key_units_total", "counter", "Rows x steps x image tokens accepted, by API key",
          ("key",)),
    Meter("pixart_key_pictures_total", "counter", "Pictures accepted, by API key", ("key",)),
    Meter("pixart_key_refusals_total", "counter", "Requests beyond what the API key may spend",
          ("key",)),
)  # fmt: skip


class ReplicaMetrics(Observer):
    """Hands what it is told to Ray; one a process, as Ray's metrics go by name."""

    def __init__(self) -> None:
        self._meters = {meter.name: _build(meter) for meter in METERS}
        self._values: dict[str, set[str]] = {}
        self._step_tags: dict[tuple[int, int, int], dict[str, str]] = {}

    def waited(self, seconds: float) -> None:
        self._observe("pixart_queue_wait_seconds", seconds)

    def encoded_text(self, seconds: float) -> None:
        self._observe("pixart_text_encode_seconds", seconds)

    def stepped(self, width: int, height: int, num_rows: int, seconds: float) -> None:
        tags = self._step_tags.get((width, height, num_rows))
        if tags is None:
            rows = str(1 << (num_rows - 1).bit_length())
            tags = self._bounded({"size": f"{width}x{height}", "rows": rows})
            self._step_tags[width, height, num_rows] = tags
        self._meters["pixart_step_seconds"].observe(seconds, tags=tags)
        self._meters["pixart_step_rows"].observe(num_rows)

    def decoded(self, kind: str, seconds: float) -> None:
        self._observe("pixart_decode_seconds", seconds, kind=kind)

    def previewed(self, seconds: float) -> None:
        self._observe("pixart_first_preview_seconds", seconds)

    def drawn(self, version: int, seconds: float) -> None:
        self._observe("pixart_picture_seconds", seconds)
        self._add("pixart_pictures_total", version=str(version))

    def cancelled(self) -> None:
        self._add("pixart_pictures_cancelled_total")

    def failed(self) -> None:
        self._add("pixart_pictures_failed_total")

    def activated(self, version: int, *, swapped: bool) -> None:
        self._meters["pixart_active_version"].set(version)
        if swapped:
            self._add("pixart_swaps_total")

    def expect(self, backlog_seconds: float) -> None:
        """Nobody is told of a backlog: who asks for one passes it on here."""
        self._meters["pixart_backlog_seconds"].set(backlog_seconds)

    def encoded_picture(self, file_format: str, seconds: float) -> None:
        self._observe("pixart_picture_encode_seconds", seconds, format=file_format)

    def answered(self, route: str, status: int, reason: str, seconds: float) -> None:
        self._observe("pixart_request_seconds", seconds, route=route, status=str(status))
        if reason:
            self._add("pixart_refusals_total", reason=reason)

    def charged(self, key: str, num_pictures: int, num_units: int) -> None:
        self._add("pixart_key_units_total", num_units, key=key)
        self._add("pixart_key_pictures_total", num_pictures, key=key)

    def refused_key(self, key: str) -> None:
        self._add("pixart_key_refusals_total", key=key)

    def _observe(self, name: str, value: float, **labels: str) -> None:
        self._meters[name].observe(value, tags=self._bounded(labels))

    def _add(self, name: str, value: float = 1, **labels: str) -> None:
        if value > 0:  # Ray raises at a counter's 0
            self._meters[name].inc(value, tags=self._bounded(labels))

    def _bounded(self, labels: Mapping[str, str]) -> dict[str, str]:
        """The labels, ``other`` for a value beyond those a label may take."""
        bounded = {}
        for label, value in labels.items():
            known = self._values.setdefault(label, set())
            if value not in known and len(known) < _MAX_VALUES.get(label, _MAX_VALUES_ELSE):
                known.add(value)
            bounded[label] = value if value in known else "other"
        return bounded


def _build(meter: Meter) -> Any:
    bounds = {"boundaries": list(meter.bounds)} if meter.bounds else {}
    return _KINDS[meter.kind](
        meter.name, description=meter.meaning, tag_keys=meter.labels, **bounds
    )
