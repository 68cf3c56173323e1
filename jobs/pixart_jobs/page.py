"""Pages for people: self-contained HTML, readable without network, and charts as SVG."""

import base64
import html
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pixart_jobs.certainty import Figure

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 760, 240, 52, 24
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #1f2937; } h1, h2 { line-height: 1.2; } table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #e5e7eb; }
img { image-rendering: pixelated; max-width: 100%; border-radius: 4px; } code, pre { background:
#f3f4f6; padding: .1rem .3rem; border-radius: 4px; } pre { padding: .8rem; overflow-x: auto; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; } .figures div { background: #f3f4f6;
  border-radius: 8px; padding: .6rem 1rem; } .figures b { display: block; font-size: 1.4rem; }
.small { color: #6b7280; font-size: 13px; } svg text { font: 11px system-ui, sans-serif; }
.wide { overflow-x: auto; } .better { color: #15803d; } .worse { color: #b91c1c; }
"""


class Line(NamedTuple):
    """A curve of a chart."""

    name: str
    points: Sequence[tuple[float, float]]


def document(title: str, parts: Iterable[str]) -> str:
    """A whole page; ``title`` is text, ``parts`` are HTML."""
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport "
        f"content='width=device-width'><title>{html.escape(title)}</title>"
        f"<style>{_STYLE}</style><body>{''.join(parts)}</body></html>"
    )


def embed(data: bytes, width: int, alt: str) -> str:
    """A PNG as part of the page."""
    encoded = base64.b64encode(data).decode()
    return f"<img width={width} alt='{html.escape(alt)}' src='data:image/png;base64,{encoded}'>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML."""
    lines = ["".join(f"<td>{cell}" for cell in row) for row in rows]
    columns = "".join(f"<th>{cell}" for cell in head)
    return f"<div class=wide><table><tr>{columns}<tr>{'<tr>'.join(lines)}</table></div>"


def line_chart(lines: Sequence[Line], end: float, unit: str) -> str:
    """Curves over 0 to ``end`` of ``unit``, on one scale."""
    values = [y for line in lines for _, y in line.points]
    if not values:
        return "<p>Nothing was logged.</p>"
    low, high = min(values), max(values)
    drawn = []
    for i, line in enumerate(lines):
        path = " ".join(_place(x / (end or 1), _share(y, low, high)) for x, y in line.points)
        drawn.append(f"<polyline fill=none stroke='{_color(i)}' stroke-width=2 points='{path}'/>")
    return _frame(drawn, [line.name for line in lines], (low, high), (0, end), unit)


def scatter_chart(points: Sequence[tuple[str, float, Figure]], unit: str) -> str:
    """Named figures with their intervals over a quantity."""
    low, high = min(f.low for _, _, f in points), max(f.high for _, _, f in points)
    end = max(x for _, x, _ in points)
    drawn = []
    for i, (_, x, figure) in enumerate(points):
        places = [
            _place(x / (end or 1), _share(y, low, high))
            for y in (figure.low, figure.value, figure.high)
        ]
        across, middle = places[1].split(",")
        drawn.append(f"<polyline stroke='{_color(i)}' points='{places[0]} {places[2]}'/>")
        drawn.append(f"<circle r=5 fill='{_color(i)}' cx={across} cy={middle} />")
    return _frame(drawn, [name for name, _, _ in points], (low, high), (0, end), unit)


def _color(i: int) -> str:
    return f"hsl({(221 + i * 137.5) % 360:.0f} 75% {(45, 35, 60)[i % 3]}%)"  # none twice


def _share(value: float, low: float, high: float) -> float:
    return (value - low) / ((high - low) or 1.0)


def _place(across: float, up: float) -> str:
    x = _LEFT + 8 + (_WIDTH - _LEFT - 16) * across
    return f"{x:.1f},{8 + (_HEIGHT - _BOTTOM - 16) * (1 - up):.1f}"


def _frame(
    drawn: Iterable[str], names: Sequence[str], ys: tuple[float, float],
    xs: tuple[float, float], unit: str,
) -> str:  # fmt: skip
    legend = " ".join(
        f"<span style='color:{_color(i)}'>&#9632;</span> {html.escape(name)}"
        for i, name in enumerate(names)
    )
    bottom = _HEIGHT - _BOTTOM
    return (
        f"<p class=small>{legend}</p><svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role=img "
        f"aria-label='{html.escape(unit)}'><path stroke='#e5e7eb' fill=none "
        f"d='M{_LEFT} 0V{bottom}H{_WIDTH}'/><text x=0 y=14>{ys[1]:.4g}</text>"
        f"<text x=0 y={bottom - 4}>{ys[0]:.4g}</text><text x={_LEFT} y={_HEIGHT - 8}>{xs[0]:g}"
        f"</text><text x={_WIDTH} y={_HEIGHT - 8} text-anchor=end>{xs[1]:,.6g} "
        f"{html.escape(unit)}</text>{''.join(drawn)}</svg>"
    )
