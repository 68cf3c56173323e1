"""What a study found: quality and compute of each variant over its seeds, as figures and a page.

A seed is a run's data, weights and order, so seeds are what is drawn anew: intervals are Student's
over them, of differences and ratios seed by seed, since the same seed has the same data in all
variants. Compute is compared as a ratio, on logarithms. Three seeds make wide intervals, and
honest ones.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from scipy import stats

from pixart_jobs.ablation import Outcome, Point, Study
from pixart_jobs.certainty import CONFIDENCE, LOWER_IS_BETTER, Difference, Figure, holm
from pixart_jobs.page import Line, document, line_chart, table

_T = 1e12


@dataclass(frozen=True)
class Reached:
    """Compute to a target, in FLOPs: the geometric mean over seeds."""

    flops: Figure | None
    """None unless all seeds reached it."""
    count: int
    seconds: float | None


@dataclass(frozen=True)
class Ratio:
    """Compute to a target as a multiple of the baseline's."""

    figure: Figure
    is_at_most: bool
    """Whether the baseline did not reach it in some seeds: then all its compute is taken."""


@dataclass(frozen=True)
class Row:
    """A variant over its seeds; dictionaries are by metric."""

    variant: str
    parameters: int
    flops: float
    seconds: float
    facts: dict[str, float]
    final: dict[str, Figure]
    differences: dict[str, Difference]
    """From the baseline at the end, p with Holm's correction for all of the study."""
    reached: dict[str, Reached]
    ratios: dict[str, Ratio]


def summarize(study: Study, outcomes: Sequence[Outcome]) -> list[Row]:
    """A row for each variant, the baseline's first."""
    names = [study.reference, *(v for v in study.variants if v != study.reference)]
    sides = {v: [o for o in outcomes if o.variant == v] for v in names}
    base = sides[study.reference]
    asked = [(v, m) for v in names[1:] for m in base[0].points[-1].values]
    found = {(v, m): _differ(base, sides[v], m) for v, m in asked}
    corrected = dict(zip(found, holm([d.p for d in found.values()]), strict=True))
    return [
        Row(
            variant, mine[0].parameters, _mean([o.flops for o in mine]),
            _mean([o.seconds for o in mine]),
            {key: _mean([o.facts[key] for o in mine]) for key in mine[0].facts},
            {m: interval([o.points[-1].values[m] for o in mine])
             for m in mine[0].points[-1].values},
            {m: Difference(d.value, d.low, d.high, corrected[v, m])
             for (v, m), d in found.items() if v == variant},
            {m: _reach_all(mine, m, goal) for m, goal in study.target.items()},
            {m: ratio for m, goal in study.target.items()
             if mine is not base and (ratio := _ratio(base, mine, m, goal))},
        )
        for variant, mine in sides.items()
    ]  # fmt: skip


def interval(values: Sequence[float]) -> Figure:
    """The mean with Student's interval; without one (nan) where there is a single value."""
    found = np.array(values, np.float64)
    if len(found) < 2:
        return Figure(float(found.mean()), math.nan, math.nan)
    error = float(found.std(ddof=1)) / math.sqrt(len(found))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(found) - 1)) * error
    return Figure(float(found.mean()), float(found.mean()) - half, float(found.mean()) + half)


def reach(points: Sequence[Point], metric: str, goal: float) -> Point | None:
    """Where quality first comes to ``goal``, between two points on logarithmic compute.

    The first point, if it is there already: an upper bound. None if no point is.
    """
    sign = -1 if metric in LOWER_IS_BETTER else 1
    goal *= sign
    if sign * points[0].values[metric] >= goal:
        return points[0]
    for before, after in pairwise(points):
        low, high = sign * before.values[metric], sign * after.values[metric]
        if low < goal <= high:
            share = (goal - low) / (high - low)
            flops, seconds = (
                math.exp((1 - share) * math.log(a) + share * math.log(b))
                for a, b in ((before.flops, after.flops), (before.seconds, after.seconds))
            )
            return Point(after.stage, after.images, flops, seconds, after.values)
    return None


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _differ(base: Sequence[Outcome], mine: Sequence[Outcome], metric: str) -> Difference:
    gaps = [b.points[-1].values[metric] - a.points[-1].values[metric]
            for a, b in zip(base, mine, strict=True)]  # fmt: skip
    found = interval(gaps)
    alike = len(set(gaps)) == 1
    p = float(stats.ttest_1samp(gaps, 0.0).pvalue) if len(gaps) > 1 and not alike else math.nan
    return Difference(found.value, found.low, found.high, p)


def _reach_all(mine: Sequence[Outcome], metric: str, goal: float) -> Reached:
    found = [point for o in mine if (point := reach(o.points, metric, goal))]
    if len(found) < len(mine):
        return Reached(None, len(found), None)
    return Reached(_geometric([p.flops for p in found]), len(found),
                   _geometric([p.seconds for p in found]).value)  # fmt: skip


def _ratio(
    base: Sequence[Outcome], mine: Sequence[Outcome], metric: str, goal: float
) -> Ratio | None:
    """None unless all of mine reached it, or where the baseline's compute is not known."""
    ours = [reach(o.points, metric, goal) for o in mine]
    theirs = [reach(o.points, metric, goal) for o in base]
    values = [
        a.flops / (b.flops if b else whole.flops)
        for a, b, whole in zip(ours, theirs, base, strict=True) if a
    ]  # fmt: skip
    # A baseline that was there at its first point may have needed any part of that.
    known = None not in ours and all(
        t is not o.points[0] for t, o in zip(theirs, base, strict=True)
    )
    return Ratio(_geometric(values), None in theirs) if known else None


def _geometric(values: Sequence[float]) -> Figure:
    found = interval([math.log(value) for value in values])
    return Figure(math.exp(found.value), math.exp(found.low), math.exp(found.high))


def as_document(study: Study, rows: Sequence[Row], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """For ``study.json``; what is not known is null."""
    found: dict[str, Any] = _nulled({
        "study": study.model_dump(mode="json"),
        "rows": [asdict(row) for row in rows],
        "runs": [
            asdict(o) | {"points": [
                {"stage": p.stage, "images": p.images, "flops": p.flops, "seconds": p.seconds}
                | p.values
                for p in o.points
            ]}
            for o in outcomes
        ],
    })  # fmt: skip
    return found


def _nulled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nulled(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_nulled(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def print_rows(study: Study, rows: Sequence[Row]) -> str:
    """For a terminal: a block for each variant."""
    lines = []
    for row in rows:
        lines.append(
            f"{row.variant}: {row.parameters / 1e6:.2f} M parameters, {row.flops / _T:.4g} TFLOPs, "
            f"{row.seconds:.0f} s"
        )
        lines += [f"  {name:<22} {_show(figure)}" + _against(row, name)
                  for name, figure in row.final.items()]  # fmt: skip
        lines += [f"  {_goal(metric, goal):<22} {_told(study, row, metric)}"
                  for metric, goal in study.target.items()]  # fmt: skip
    return "\n".join(lines)


def render(study: Study, rows: Sequence[Row], outcomes: Sequence[Outcome]) -> str:
    """The page, readable without network."""
    metrics = list(rows[0].final)
    title = f"Study {study.name}"
    head = ["", "parameters", "TFLOPs", "seconds", *(html.escape(m) for m in metrics)]
    ends = [
        [f"<b>{html.escape(row.variant)}</b>", f"{row.parameters / 1e6:.2f} M",
         f"{row.flops / _T:,.4g}", f"{row.seconds:,.0f}",
         *(html.escape(_show(row.final[m]) + _against(row, m)) for m in metrics)]
        for row in rows
    ]  # fmt: skip
    goals = [_goal(metric, goal) for metric, goal in study.target.items()]
    compute = [
        [f"<b>{html.escape(row.variant)}</b>",
         *(html.escape(_told(study, row, metric)) for metric in study.target)]
        for row in rows
    ]  # fmt: skip
    facts = [[f"<b>{html.escape(row.variant)}</b>", *(f"{v:.4g}" for v in row.facts.values())]
             for row in rows]  # fmt: skip
    changes = [[f"<b>{html.escape(v)}</b>", f"<code>{html.escape(str(asked or 'as it is'))}</code>"]
               for v, asked in ({"all": study.set} | study.variants).items()]  # fmt: skip
    return document(
        title,
        [
            f"<h1>{html.escape(title)}</h1><p>{html.escape(study.recipe)}, seeds "
            f"{', '.join(map(str, study.seeds))}; against {html.escape(study.reference)}.</p>",
            table(["variant", "settings"], changes),
            f"<h2>Compute to a target</h2>{table(['', *map(html.escape, goals)], compute)}",
            *(_chart(outcomes, metric) for metric in study.target),
            f"<h2>At the end</h2>{table(head, ends)}",
            f"<h2>Captions</h2>{table(['', *map(html.escape, rows[0].facts)], facts)}",
            "<p class=small>Intervals are Student's at 95 % over seeds; probabilities are of "
            "paired t-tests by seed, with Holm's correction for all of this page. Compute is "
            "training's, forward and backward; curves are of one run each, with averaged "
            "weights.</p>",
        ],
    )  # fmt: skip


def _chart(outcomes: Sequence[Outcome], metric: str) -> str:
    end = max(o.flops for o in outcomes) / _T
    lines = [
        Line(f"{o.variant}, seed {o.seed}", [(p.flops / _T, p.values[metric]) for p in o.points])
        for o in outcomes
    ]
    return f"<h2>{html.escape(metric.replace('_', ' '))}</h2>{line_chart(lines, end, 'TFLOPs')}"


def _goal(metric: str, goal: float) -> str:
    return f"{metric} {'<=' if metric in LOWER_IS_BETTER else '>='} {goal:g}"


def _show(figure: Figure, scale: float = 1.0) -> str:
    value = f"{figure.value / scale:.4g}"
    if math.isnan(figure.low):
        return f"{value} (one seed)"
    return f"{value} ({figure.low / scale:.4g} to {figure.high / scale:.4g})"


def _against(row: Row, metric: str) -> str:
    found = row.differences.get(metric)
    if found is None:
        return ""
    if math.isnan(found.low):
        return f"; {found.value:+.3f}"
    p = "" if math.isnan(found.p) else f", p = {found.p:.3f}"
    return f"; {found.value:+.3f} ({found.low:+.3f} to {found.high:+.3f}){p}"


def _told(study: Study, row: Row, metric: str) -> str:
    reached, ratio = row.reached[metric], row.ratios.get(metric)
    if reached.flops is None:
        return f"reached by {reached.count} of {len(study.seeds)} seeds"
    told = f"{_show(reached.flops, _T)} TFLOPs, {reached.seconds:.0f} s"
    bound = "at most " if ratio and ratio.is_at_most else ""
    return told + (f"; {bound}{_show(ratio.figure)} of {study.reference}'s" if ratio else "")
