"""A chart of curves as an SVG file: no plotting library, no script, readable in any browser and in a README."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2
from xml.sax.saxutils import escape

_COLORS = ("#3366cc", "#dc3912", "#109618", "#990099", "#0099c6", "#dd8800", "#66aa00", "#b82e2e", "#316395")
_LEFT, _TOP, _WIDTH, _HEIGHT = 62, 40, 560, 340


@dataclass(frozen=True)
class Curve:
    """points: (x, y) in order, joined by a line; a single one is a mark. titles: what a mark says under the pointer."""

    label: str
    points: Sequence[tuple[float, float]]
    titles: Sequence[str] = ()


def chart(title: str, x_label: str, y_label: str, curves: Sequence[Curve]) -> str:
    """The SVG text. x is on a logarithmic scale of base 2 and positive; y runs from its least value to its greatest."""
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points]
    legend = 40 + 7 * max(len(curve.label) for curve in curves)
    left, right = log2(min(xs)), max(log2(max(xs)), log2(min(xs)) + 0.1)
    low, high = min(ys), max(max(ys), min(ys) + 1e-9)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (log2(x) - left) / (right - left)
        return _LEFT + 10 + across * (_WIDTH - 20), _TOP + 8 + (1 - (y - low) / (high - low)) * (_HEIGHT - 16)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + legend}" height="{_TOP + _HEIGHT + 52}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{_LEFT}" y="22" font-size="15">{escape(title)}</text>',
        f'<rect x="{_LEFT}" y="{_TOP}" width="{_WIDTH}" height="{_HEIGHT}" fill="none" stroke="#999"/>',
        f'<text x="{_LEFT + _WIDTH / 2}" y="{_TOP + _HEIGHT + 42}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text transform="translate(16 {_TOP + _HEIGHT / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>",
    ]
    for step in range(5):
        value = low + (high - low) * step / 4
        y = place(2**left, value)[1]
        parts.append(f'<line x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#eee"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
        x = 2 ** (left + (right - left) * step / 4)
        parts.append(f'<text x="{place(x, low)[0]:.1f}" y="{_TOP + _HEIGHT + 18}" text-anchor="middle">{x:.3g}</text>')
    for number, curve in enumerate(curves):
        color = _COLORS[number % len(_COLORS)]
        spots = [place(x, y) for x, y in curve.points]
        if len(spots) > 1:
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        for at, (x, y) in enumerate(spots):
            note = escape(curve.titles[at] if curve.titles else curve.label)
            radius = 3.5 if len(spots) > 1 else 6
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{color}"><title>{note}</title></circle>'
            )
        y_legend = _TOP + 14 + 20 * number
        parts.append(f'<circle cx="{_LEFT + _WIDTH + 16}" cy="{y_legend - 4}" r="5" fill="{color}"/>')
        parts.append(f'<text x="{_LEFT + _WIDTH + 28}" y="{y_legend}">{escape(curve.label)}</text>')
    return "\n".join([*parts, "</svg>\n"])
