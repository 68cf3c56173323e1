"""A comparison as one page: recipes, curves, figures and the same prompts side by side."""

import html
from collections.abc import Iterator

from pixart_jobs.compare import Comparison, Finding, Side, Suite
from pixart_jobs.page import Line, document, embed, line_chart, scatter_chart, table

_SHOWN_PROMPTS = 16
_QUANTITIES = {
    "images": "images trained on", "gpu_hours": "GPU-hours", "seconds": "seconds",
    "usd": "$", "co2_kg": "kg CO2",
}  # fmt: skip


def render(comparison: Comparison) -> str:
    """The page, readable without network."""
    sides = comparison.sides
    title = " against ".join(side.label for side in sides)
    return document(
        title,
        [
            f"<h1>{html.escape(title)}</h1>",
            _overview(sides),
            _recipes(comparison),
            *(_suite(comparison, name) for name in sides[0].suites),
            f"<h2>Loss</h2>{line_chart(*_curves(sides))}",
            *_quality(sides),
            *_drawn(sides),
            "<p class=small>Intervals are at 95 %, by bootstrap over prompts. Probabilities are of "
            "permutation tests, with Holm's correction for all rows of this page. Each version was "
            "trained once: how much another training seed would move it is not in them.</p>",
        ],
    )


def _overview(sides: list[Side]) -> str:
    head = ["", "stage", "images", "time", "GPU-hours", "price", "energy", "CO2", "snapshot"]
    rows = [
        [
            f"<b>{html.escape(side.label)}</b>", html.escape(side.version.tags.get("stage", "")),
            f"{side.images:,.0f}", f"{side.cost['seconds'] / 60:,.1f} min",
            f"{side.cost['gpu_hours']:,.2f}", f"${side.cost['usd']:,.2f}",
            f"{side.cost['kwh']:,.4g} kWh", f"{side.cost['co2_kg']:,.4g} kg",
            f"<code>{html.escape(side.version.tags.get('digest', '')[:12])}</code>",
        ]
        for side in sides
    ]  # fmt: skip
    return table(head, rows)


def _recipes(comparison: Comparison) -> str:
    found = comparison.recipe_differences
    if not found:
        return "<h2>Recipe</h2><p>The same.</p>"
    rows = [[f"<code>{html.escape(k)}</code>", *map(html.escape, v)] for k, v in found.items()]
    head = ["what differs", *(html.escape(side.label) for side in comparison.sides)]
    return f"<h2>Recipe</h2>{table(head, rows)}"


def _suite(comparison: Comparison, name: str) -> str:
    first, *others = comparison.sides
    metrics = first.suites[name].figures
    told = {(f.metric, f.side): f for f in comparison.findings if f.suite == name}
    head = [html.escape(first.label)]
    for side in others:
        head += [html.escape(side.label), "difference"]
    rows = []
    for metric, figure in metrics.items():
        cells = [html.escape(metric.replace("_", " ")), html.escape(str(figure))]
        for i, side in enumerate(others, start=1):
            other = side.suites.get(name)
            value = other.figures.get(metric) if other else None
            cells += [str(value) if value else "not measured", _verdict(told.get((metric, i)))]
        rows.append(cells)
    unlike = [s.label for s in others if not _same_basis(first.suites[name], s.suites.get(name))]
    note = f"<p>Other prompts: {html.escape(', '.join(unlike))}.</p>" if unlike else ""
    return f"<h2>Suite {html.escape(name)}</h2>{table(['', *head], rows)}{note}"


def _same_basis(a: Suite, b: Suite | None) -> bool:
    return b is None or a.basis == b.basis


def _verdict(finding: Finding | None) -> str:
    if finding is None:
        return ""
    kind = ("better" if finding.is_better else "worse") if finding.is_significant else "small"
    return f"<span class={kind}>{html.escape(str(finding))}</span>"


def _curves(sides: list[Side]) -> tuple[list[Line], float, str]:
    lines = [Line(side.label, side.curve) for side in sides]
    return lines, max(side.images for side in sides), "images seen"


def _quality(sides: list[Side]) -> Iterator[str]:
    """The first metric of the first suite against what it took."""
    name = next(iter(sides[0].suites), None)
    metric = next(iter(sides[0].suites[name].figures), None) if name else None
    if not (name and metric):
        return
    yield f"<h2>{html.escape(metric.replace('_', ' '))} by what it took</h2>"
    for key, unit in _QUANTITIES.items():
        points = [
            (s.label, s.images if key == "images" else s.cost[key], s.suites[name].figures[metric])
            for s in sides
            if name in s.suites and metric in s.suites[name].figures
        ]
        if any(x for _, x, _ in points):
            yield scatter_chart(points, unit)


def _drawn(sides: list[Side]) -> Iterator[str]:
    """The same prompts with the same noise, a column a version."""
    head = ["", *(html.escape(side.label) for side in sides)]
    for name, first in sides[0].suites.items():
        alike = [s for s in sides if s.suites.get(name) and _same_basis(first, s.suites[name])]
        shown = list(zip(sorted(first.pictures), first.prompts, strict=False))[:_SHOWN_PROMPTS]
        if shown and len(alike) == len(sides):
            rows = [
                [html.escape(text), *(_picture(s.suites[name].pictures, key) for s in sides)]
                for key, text in shown
            ]
            yield f"<h2>The same prompts, suite {html.escape(name)}</h2>{table(head, rows)}"
    keys = sorted(set.intersection(*(set(side.previews) for side in sides)))
    if keys:
        rows = [[html.escape(k), *(_picture(s.previews, k) for s in sides)] for k in keys]
        yield f"<h2>The last previews of training</h2>{table(head, rows)}"


def _picture(pictures: dict[str, bytes], key: str) -> str:
    return embed(pictures[key], 96, key) if key in pictures else "not drawn"
