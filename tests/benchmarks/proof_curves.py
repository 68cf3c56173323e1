"""Curves of a proof as a picture: quality over compute, a line for each training.

    .venv/bin/python tests/benchmarks/proof_curves.py [recipe crowds]

Reads what bench_proof.py recorded of a study and of its peers, and writes results/proof_STUDY.svg.
"""

import html
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
from recording import RESULTS

COLORS = ("#2563eb", "#d97706", "#16a34a", "#9333ea", "#dc2626", "#0891b2")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 340, 48, 150, 30, 40
Curve = list[list[float]]  # of TFLOPs and a share


def read_curves(study: str) -> tuple[str, dict[str, list[Curve]]]:
    """The metric, and the curves by who trained."""
    metric, found = "", dict[str, list[Curve]]()
    for path in sorted(RESULTS.glob(f"proof_{study}_*.json")):
        for name, row in json.loads(path.read_text())["figures"].items():
            for key, curves in row.items() if isinstance(row, dict) else ():
                if key.startswith("curves of ") and len(curves) > len(found.get(name, ())):
                    metric, found[name] = key.removeprefix("curves of "), curves
    return metric, found


def draw(study: str) -> None:
    metric, curves = read_curves(study)
    ends = [x for each in curves.values() for curve in each for x, _ in curve]
    low, high = math.log(min(ends)), math.log(max(ends))

    def place(tflops: float, share: float) -> tuple[float, float]:
        across = (math.log(tflops) - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), TOP + (1 - share) * (HEIGHT - TOP - BOTTOM)

    def parts() -> Iterator[str]:
        yield f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
        for share in (0, 0.25, 0.5, 0.75, 1):
            _, y = place(ends[0], share)
            yield f'<path stroke="#e5e7eb" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
            yield text(LEFT - 6, y + 4, f"{share:.0%}", "end")
        for tflops in (0.25, 0.5, 1, 2, 4, 8, 16, 40, 80):
            if low <= math.log(tflops) <= high:
                yield text(place(tflops, 0)[0], HEIGHT - BOTTOM + 18, f"{tflops:g}", "middle")
        title = f"{metric.replace('_', ' ')} on held-out prompts over TFLOPs of training"
        yield text(LEFT, 16, title)
        for i, (name, each) in enumerate(curves.items()):
            color = COLORS[i % len(COLORS)]
            for curve in each:
                points = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in curve)
                yield f'<polyline fill="none" stroke="{color}" points="{points}"/>'
            yield text(WIDTH - RIGHT + 12, TOP + 14 + 20 * i, name, fill=color)

    drawn = "\n".join(parts())
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">'
    (RESULTS / f"proof_{study}.svg").write_text(f"{head}\n{drawn}\n</svg>\n")


def text(x: float, y: float, said: str, anchor: str = "start", fill: str = "#374151") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}" '
        f'font-family="sans-serif" font-size="12">{html.escape(said)}</text>'
    )


if __name__ == "__main__":
    for asked in sys.argv[1:] or ("recipe", "crowds"):
        draw(asked)
