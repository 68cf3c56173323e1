"""The report of a pipeline: one self-contained HTML page, and a flat ``summary.json``."""

import base64
import html
import json
from pathlib import Path

from pixart_jobs.pipeline import Result
from pixart_jobs.sheet import sheet_of
from pixart_platform.storage import write_atomic

_CAPTION_SAMPLES = 8
_COLORS = ("#2563eb", "#16a34a", "#d97706", "#9333ea")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #1f2937; } h1, h2 { line-height: 1.2; } table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #e5e7eb; }
img { image-rendering: pixelated; max-width: 100%; border-radius: 4px; } code, pre { background:
#f3f4f6; padding: .1rem .3rem; border-radius: 4px; } pre { padding: .8rem; overflow-x: auto; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; } .figures div { background: #f3f4f6;
  border-radius: 8px; padding: .6rem 1rem; } .figures b { display: block; font-size: 1.4rem; }
.small { color: #6b7280; font-size: 13px; } svg text { font: 11px system-ui, sans-serif; }
"""


def summarize(result: Result, image: Path | None, baseline: Result | None) -> dict[str, object]:
    """The flat summary, ready for JSON."""
    summary: dict[str, object] = {
        "captioner_accuracy": result.caption_accuracy,
        **(result.evaluation.metrics if result.evaluation else {}),
        **vars(result.cost),
        "model": result.recipe.name,
        "model_version": result.version.number,
        "image": str(image) if image else None,
        "rejected_images": result.num_rejected,
    }
    if baseline and baseline.evaluation:
        summary |= {f"baseline_{k}": v for k, v in baseline.evaluation.metrics.items()}
        summary["baseline_objective"] = baseline.recipe.train.objective
    return summary


def write(
    folder: Path, result: Result, *, image: Path | None, baseline: Result | None, next_steps: str
) -> dict[str, object]:
    """Write ``report.html`` and ``summary.json`` into ``folder``; returns the summary."""
    summary = summarize(result, image, baseline)
    write_atomic(folder / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    parts = [
        f"<h1>{html.escape(result.recipe.name)}: from images to a served picture</h1>",
        _figures(summary),
        _served(result, image),
        _captions(result),
        _curves(result),
        _previews(result),
        _evaluation(result, baseline),
        _cost(result),
        _rejects(result),
        f"<h2>Next</h2><pre>{html.escape(next_steps)}</pre>",
        "<p class=small>Energy and CO2 are codecarbon's estimate from the processor's rated power."
        "</p>",
    ]
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport "
        f"content='width=device-width'><title>{html.escape(result.recipe.name)}</title>"
        f"<style>{_STYLE}</style><body>{''.join(parts)}</body></html>"
    )
    write_atomic(folder / "report.html", page.encode())
    return summary


def _cost(result: Result) -> str:
    """What all jobs of the pipeline took, beside what the paper's training did."""
    cost, images = result.cost, sum(stage.plan.num_images for stage in result.stages)
    took = f"{cost.gpu_hours:,.1f} GPU-hours" if cost.gpu_hours else "no GPU"
    ours = [f"{images:,}", f"{cost.seconds / 3600:,.2f} h, {took}", f"${cost.usd:,.2f}",
            f"{cost.kwh:,.4g} kWh", f"{cost.co2_kg:,.4g} kg"]  # fmt: skip
    paper = ["3,300,000,000", "753 A100-days", "$28,400", "not told", "not told"]
    head = ["", "images trained on", "time", "price", "energy", "CO2"]
    rows = ([f"<b>{html.escape(result.recipe.name)}</b>", *ours],
            ["PixArt-alpha, training alone", *paper])  # fmt: skip
    return (
        f"<h2>Cost</h2><table><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>"
        + "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
        + "</table>"
    )


def _embed(data: bytes, width: int, alt: str) -> str:
    encoded = base64.b64encode(data).decode()
    return f"<img width={width} alt='{html.escape(alt)}' src='data:image/png;base64,{encoded}'>"


def _figures(summary: dict[str, object]) -> str:
    shown = []
    for key, unit in (
        ("captioner_accuracy", "%"), ("digit_accuracy", "%"), ("color_accuracy", "%"),
        ("relation_accuracy", "%"), ("seconds", "s"), ("kwh", "kWh"), ("co2_kg", "kg CO2"),
    ):  # fmt: skip
        value = summary.get(key)
        if isinstance(value, float):
            text = f"{value:.1%}" if unit == "%" else f"{value:,.4g} {unit}"
            shown.append(f"<div><b>{text}</b>{key.replace('_', ' ')}</div>")
    return f"<div class=figures>{''.join(shown)}</div>"


def _served(result: Result, image: Path | None) -> str:
    if image is None:
        return ""
    return (
        f"<h2>A picture from the service</h2><p>{_embed(image.read_bytes(), 192, 'served picture')}"
        f"<br><span class=small>drawn by {html.escape(result.recipe.name)} version "
        f"{result.version.number} over HTTP</span></p>"
    )


def _captions(result: Result) -> str:
    shown = {kind: result.tables[kind] for kind in ("images", "captions")}
    return f"<h2>Captions</h2>{sheet_of(shown, _CAPTION_SAMPLES, seed=0)}"


def _curves(result: Result) -> str:
    """Loss against images seen, all stages on one axis, as SVG."""
    width, height, left, bottom = 760, 240, 44, 24
    offset, curves = 0, []
    for stage in result.stages:
        curves.append((stage.plan.name, [(offset + x, y) for x, y in stage.losses]))
        offset += stage.plan.num_images
    values = [y for _, points in curves for _, y in points]
    if not values:
        return ""
    low, high = min(values), max(values)
    span = (high - low) or 1.0

    def place(x: float, y: float) -> str:
        across = left + (width - left) * x / offset
        return f"{across:.1f},{(height - bottom) * (1 - (y - low) / span):.1f}"

    lines = []
    for i, (name, points) in enumerate(curves):
        color = _COLORS[i % len(_COLORS)]
        path = " ".join(place(x, y) for x, y in points)
        lines.append(f"<polyline fill=none stroke='{color}' stroke-width=2 points='{path}'/>")
        legend = width - 110 * (len(curves) - i)
        lines.append(f"<text x={legend} y=12 fill='{color}'>{html.escape(name)}</text>")
    return (
        f"<h2>Loss</h2><svg viewBox='0 0 {width} {height}' role=img aria-label='loss curves'>"
        f"<text x=0 y=12>{high:.3f}</text><text x=0 y={height - bottom}>{low:.3f}</text>"
        f"<text x={left} y={height - 4}>0</text><text x={width} y={height - 4} text-anchor=end>"
        f"{offset:,} images seen</text>{''.join(lines)}</svg>"
    )


def _previews(result: Result) -> str:
    parts = ["<h2>The same prompts after each stage</h2>"]
    for stage in result.stages:
        parts.append(f"<h3>{html.escape(stage.plan.name)}</h3>")
        parts += [
            f"<p class=small>{int(path.stem):,} images<br>"
            f"{_embed(path.read_bytes(), 640, f'previews at {path.stem} images')}</p>"
            for path in sorted(stage.plan.preview_folder.glob("*.png"))
        ]
    prompts = "".join(f"<li>{html.escape(p)}" for p in result.recipe.train.preview_prompts)
    return f"{''.join(parts)}<ol class=small>{prompts}</ol>"


def _evaluation(result: Result, baseline: Result | None) -> str:
    found = result.evaluation
    if found is None:
        return ""
    columns = [result] + ([baseline] if baseline and baseline.evaluation else [])
    head = "".join(f"<th>{r.recipe.train.objective}" for r in columns)
    rows = "".join(
        f"<tr><td>{name.replace('_', ' ')}"
        + "".join(
            f"<td>{r.evaluation.metrics.get(name, float('nan')):.1%}"
            for r in columns
            if r.evaluation
        )
        for name in found.metrics
    )
    return (
        f"<h2>Held-out prompts</h2><table><tr><th>share right{head}{rows}</table>"
        "<p class=small>No training scene shows these prompts. The pictures are read by a "
        "classifier fitted on test scans, which nothing else used; reader accuracy is its own on "
        f"real scenes.</p>{_embed(found.sheet.read_bytes(), 720, 'held-out prompts')}"
    )


def _rejects(result: Result) -> str:
    if not result.rejects:
        return "<h2>Rejected</h2><p>None.</p>"
    rows = "".join(
        f"<tr><td>{html.escape(r.get('source', r['id'][:12]))}<td>{html.escape(r['status'])}"
        for r in result.rejects[:200]
    )
    return f"<h2>Rejected</h2><p>{result.num_rejected} in all.</p><table>{rows}</table>"
