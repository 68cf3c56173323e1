"""Comparison of versions: what they were asked, cost and draw, and which difference is significant.

Everything is read from MLflow, so versions of other machines compare as well as one's own. Figures
of evaluations on the same basis are compared prompt by prompt; Holm's correction keeps the chance
of any false alarm among all of them at 5 %. One training seed a version is what is compared: how
another would have come out, only more of them can tell.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pixart_jobs.certainty import (
    CONFIDENCE,
    LOWER_IS_BETTER,
    Difference,
    Figure,
    Outcomes,
    difference,
    holm,
)
from pixart_jobs.promote import RESULT_FILE, find_version, lineage, measured
from pixart_platform.errors import PixartError
from pixart_platform.registry import Registry, Version
from pixart_platform.tracking import Tracker, read_file, read_images, read_run

_COSTS = ("cost_seconds", "cost_gpu_hours", "cost_kwh", "cost_usd", "cost_co2_kg")


@dataclass(frozen=True)
class Suite:
    """What an evaluation found of a version."""

    basis: str
    figures: dict[str, Figure]
    outcomes: dict[str, Outcomes]
    prompts: list[str]
    pictures: dict[str, bytes]
    """PNG by key; the same key is the same prompt where the basis is."""


@dataclass(frozen=True)
class Side:
    """A version with all that is compared of it."""

    label: str
    version: Version
    recipe: dict[str, str]
    curve: list[tuple[float, float]]
    """(images seen since the first stage, loss)."""
    images: float
    cost: dict[str, float]
    """Of all its stages, by what ``accounting`` calls it."""
    previews: dict[str, bytes]
    suites: dict[str, Suite]


@dataclass(frozen=True)
class Finding:
    """A metric of a side against the first side."""

    suite: str
    metric: str
    side: int
    difference: Difference
    p: float
    """Corrected for all findings; nan where outcomes by prompt are not known."""
    paired: bool

    @property
    def is_significant(self) -> bool:
        return self.p < 1 - CONFIDENCE

    @property
    def is_better(self) -> bool:
        return (self.difference.value < 0) == (self.metric in LOWER_IS_BETTER)

    def __str__(self) -> str:
        d = self.difference
        told = f"{d.value:+.3f} ({d.low:+.3f} to {d.high:+.3f})"
        if np.isnan(self.p):
            return f"{told}, not tested"
        return f"{told}, p = {self.p:.4f}: {'' if self.is_significant else 'not '}significant"


@dataclass(frozen=True)
class Comparison:
    """Sides, the first of which the others are held against."""

    sides: list[Side]
    findings: list[Finding]

    @property
    def recipe_differences(self) -> dict[str, list[str]]:
        """What was asked differently: values by key, one a side."""
        keys = sorted({key for side in self.sides for key in side.recipe})
        values = {key: [side.recipe.get(key, "") for side in self.sides] for key in keys}
        return {key: told for key, told in values.items() if len(set(told)) > 1}

    def as_document(self) -> dict[str, Any]:
        """For ``comparison.json``."""
        sides = [
            {"label": s.label, "snapshot": s.version.tags.get("digest", ""),
             "run": s.version.run_id, "images": s.images, "cost": s.cost,
             "figures": {suite: {m: vars(f) for m, f in found.figures.items()}
                         for suite, found in s.suites.items()}}
            for s in self.sides
        ]  # fmt: skip
        findings = [
            {"suite": f.suite, "metric": f.metric, "of": self.sides[f.side].label,
             "against": self.sides[0].label, **vars(f.difference), "p_corrected": f.p,
             "paired": f.paired, "significant": f.is_significant}
            for f in self.findings
        ]  # fmt: skip
        return {"sides": sides, "recipe": self.recipe_differences, "findings": findings}


def compare(uri: str, name: str, references: Sequence[str]) -> Comparison:
    """``references``: versions or aliases of model ``name``, ``MODEL@VERSION``, or ids of runs.

    Raises PixartError for fewer than two or the same twice, RegistryError, TrackingError.
    """
    sides = [_read_side(uri, *resolve(uri, name, r)) for r in references]
    labels = [side.label for side in sides]
    if len(set(labels)) < max(2, len(labels)):
        raise PixartError(f"{', '.join(labels) or 'nothing'}: give two versions or more, each once")
    return Comparison(sides, list(_find(sides)))


def record(comparison: Comparison, tracker: Tracker, files: Sequence[Path]) -> None:
    """Keep a comparison's files and its largest findings with a run."""
    for path in files:
        tracker.log_file(path)
    tracker.set_tags({"compared": ", ".join(side.label for side in comparison.sides)})
    tracker.finish()


def resolve(uri: str, name: str, reference: str) -> tuple[Registry, Version]:
    """What a reference stands for, as ``compare`` takes it. Raises RegistryError, TrackingError."""
    model, _, number = reference.rpartition("@")
    registry = Registry(uri, model or name)
    return registry, find_version(registry, number)


def _read_side(uri: str, registry: Registry, version: Version) -> Side:
    curve: list[tuple[float, float]] = []
    cost = dict.fromkeys(_COSTS, 0.0)
    images = 0.0
    for stage in reversed(list(lineage(registry, version))):
        run = read_run(uri, stage.run_id)
        losses = Tracker(uri, stage.run_id).history("loss")
        curve += [(images + x, loss) for x, loss in losses]
        images += losses[-1][0] if losses else 0
        for key in _COSTS:
            cost[key] += run.metrics.get(key, 0.0)
    last = read_run(uri, version.run_id)
    recipe = read_run(uri, last.parent).params if last.parent else last.params
    suites = {suite: _read_suite(uri, version, suite) for suite in _suites_of(version)}
    shown = {key.removeprefix("cost_"): value for key, value in cost.items()}
    return Side(
        f"{version.name}@{version.number}", version, recipe, curve, images, shown,
        read_images(uri, version.run_id), suites,
    )  # fmt: skip


def _suites_of(version: Version) -> list[str]:
    return sorted({told.suite for told in measured(version).values()})


def _read_suite(uri: str, version: Version, suite: str) -> Suite:
    found = {m: told for m, told in measured(version).items() if told.suite == suite}
    figures = {metric: told.figure for metric, told in found.items()}
    first = next(iter(found.values()))
    raw = read_file(uri, first.run, RESULT_FILE) if first.run else None
    document = json.loads(raw) if raw else {}
    outcomes = {m: np.array(o, float) for m, o in document.get("outcomes", {}).items()}
    pictures = read_images(uri, first.run) if raw else {}
    return Suite(first.basis, figures, outcomes, document.get("prompts", []), pictures)


def _find(sides: list[Side]) -> Iterator[Finding]:
    first, raw = sides[0], list[Finding]()
    for i, side in enumerate(sides[1:], start=1):
        for name in sorted(first.suites.keys() & side.suites.keys()):
            a, b = first.suites[name], side.suites[name]
            for metric in sorted(a.figures.keys() & b.figures.keys()):
                paired = a.basis == b.basis
                found = _differ(a, b, metric, paired)
                raw.append(Finding(name, metric, i, found, found.p, paired))
    corrected = holm([finding.p for finding in raw])
    for finding, p in zip(raw, corrected, strict=True):
        yield Finding(**{**vars(finding), "p": p})


def _differ(a: Suite, b: Suite, metric: str, paired: bool) -> Difference:
    if metric in a.outcomes and metric in b.outcomes:
        return difference(a.outcomes[metric], b.outcomes[metric], paired=paired)
    x, y = a.figures[metric], b.figures[metric]
    # Of a figure of all pictures together, as FID, only the intervals are known.
    return Difference(y.value - x.value, y.low - x.high, y.high - x.low, float("nan"))
