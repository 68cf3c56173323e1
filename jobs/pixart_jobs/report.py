"""The report of a pipeline: one self-contained HTML page, and a flat ``summary.json``."""

import html
import json
from pathlib import Path

from pixart_jobs.certainty import Figure
from pixart_jobs.page import Line, document, embed, line_chart
from pixart_jobs.pipeline import Result
from pixart_jobs.sheet import sheet_of
from pixart_platform.storage import write_atomic

_CAPTION_SAMPLES = 8


def summarize(result: Result, image: Path | None, baseline: Result | None) -> dict[str, object]:
    """The flat summary, ready for JSON."""
    summary: dict[str, object] = {
        "captioner_accuracy": result.caption_accuracy,
        **result.metrics,
        **vars(result.cost),
        "model": result.recipe.name,
        "model_version": result.version.number,
        "image": str(image) if image else None,
        "rejected_images": result.num_rejected,
    }
    if baseline and baseline.evaluations:
        summary |= {f"baseline_{k}": v for k, v in baseline.metrics.items()}
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
    write_atomic(folder / "report.html", document(result.recipe.name, parts).encode())
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
        f"<h2>A picture from the service</h2><p>{embed(image.read_bytes(), 192, 'served picture')}"
        f"<br><span class=small>drawn by {html.escape(result.recipe.name)} version "
        f"{result.version.number} over HTTP</span></p>"
    )


def _captions(result: Result) -> str:
    shown = {kind: result.tables[kind] for kind in ("images", "captions")}
    return f"<h2>Captions</h2>{sheet_of(shown, _CAPTION_SAMPLES, seed=0)}"


def _curves(result: Result) -> str:
    """Loss against images seen, all stages on one axis."""
    offset, curves = 0, []
    for stage in result.stages:
        curves.append(Line(stage.plan.name, [(offset + x, y) for x, y in stage.losses]))
        offset += stage.plan.num_images
    return f"<h2>Loss</h2>{line_chart(curves, offset, 'images seen')}" if curves else ""


def _previews(result: Result) -> str:
    parts = ["<h2>The same prompts after each stage</h2>"]
    for stage in result.stages:
        parts.append(f"<h3>{html.escape(stage.plan.name)}</h3>")
        parts += [
            f"<p class=small>{int(path.stem):,} images<br>"
            f"{embed(path.read_bytes(), 640, f'previews at {path.stem} images')}</p>"
            for path in sorted(stage.plan.preview_folder.glob("*.png"))
        ]
    prompts = "".join(f"<li>{html.escape(p)}" for p in result.recipe.train.preview_prompts)
    return f"{''.join(parts)}<ol class=small>{prompts}</ol>"


def _evaluation(result: Result, baseline: Result | None) -> str:
    columns = [result] + ([baseline] if baseline and baseline.evaluations else [])
    head = "".join(f"<th>{r.recipe.train.objective}" for r in columns)
    parts = []
    for found in result.evaluations:
        others = [e for r in columns[1:] for e in r.evaluations if e.suite == found.suite]
        rows = "".join(
            f"<tr><td>{html.escape(name.replace('_', ' '))}"
            + "".join(f"<td>{_show(e.figures.get(name))}" for e in (found, *others))
            for name in found.figures
        )
        title = "Held-out prompts" if found.suite == "digits" else f"Suite {found.suite}"
        notes = "".join(f"<p class=small>{html.escape(note)}</p>" for note in found.notes)
        parts.append(
            f"<h2>{html.escape(title)}</h2><table><tr><th>figure, 95 % interval{head}{rows}"
            f"</table>{notes}{embed(found.sheet.read_bytes(), 720, found.suite)}"
        )
    if any("reader_accuracy" in found.figures for found in result.evaluations):
        parts.append(
            "<p class=small>No training scene shows the held-out prompts. Digits are read by a "
            "classifier fitted on test scans, which nothing else used; reader accuracy is its own "
            "on real scenes of scans it has not seen: no score can be trusted beyond it.</p>"
        )
    return "".join(parts)


def _show(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    if figure.low >= 0 and figure.high <= 1:
        return f"{figure.value:.1%} ({figure.low:.1%} to {figure.high:.1%})"
    return f"{figure.value:.4g} ({figure.low:.4g} to {figure.high:.4g})"


def _rejects(result: Result) -> str:
    if not result.rejects:
        return "<h2>Rejected</h2><p>None.</p>"
    rows = "".join(
        f"<tr><td>{html.escape(r.get('source', r['id'][:12]))}<td>{html.escape(r['status'])}"
        for r in result.rejects[:200]
    )
    return f"<h2>Rejected</h2><p>{result.num_rejected} in all.</p><table>{rows}</table>"
