"""Draws the timings under the machine's roofline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from teco_kernels.testing.bench import Timing
from teco_kernels.testing.ceilings import Ceilings

_COLOURS = (
    "#2563c9",
    "#d9480f",
    "#2b8a3e",
    "#9c36b5",
    "#c92a2a",
    "#0c8599",
    "#a05a00",
    "#5f3dc4",
    "#495057",
    "#66800b",
)
_MARKERS = {"float32": "o", "float16": "s", "bfloat16": "^"}
_GIGA = 1e9
_LABEL = 15.0  # diameter of a numbered label, in points


def draw(timings: list[Timing], ceilings: Ceilings, title: str, path: Path) -> None:
    """Write a PNG: operations per second over operations per byte, both logarithmic, ceilings as lines.

    Every case is a numbered point, coloured by operator; the numbers are told on the right, with the share of the
    ceiling that the case reaches. Cases that do no arithmetic have no place in the plane and stand on the right only.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    operators = list(dict.fromkeys(timing.case.operator for timing in timings))
    timings = sorted(timings, key=lambda timing: operators.index(timing.case.operator))
    drawn = [timing for timing in timings if timing.case.flops]
    colours = {operator: _COLOURS[i % len(_COLOURS)] for i, operator in enumerate(operators)}
    with mpl.rc_context({"font.size": 9, "font.family": "DejaVu Sans", "axes.edgecolor": "#868e96"}):
        figure = Figure(figsize=(15, max(7.5, 1.5 + 0.16 * (len(timings) + 2 * len(operators)))), layout=None)
        axes = figure.add_axes((0.05, 0.08, 0.55, 0.83))
        _axes(axes, drawn, ceilings)
        figure.text(0.05, 0.955, "Operators under the measured roofline", fontsize=15, weight="bold", va="center")
        figure.text(0.05, 0.927, title, fontsize=9, color="#495057", va="center")
        _ceilings(axes, ceilings)
        points = [_place(timing) for timing in drawn]
        for timing, (x, y) in zip(drawn, points, strict=True):
            marker = _MARKERS.get(str(timing.case.dtype).removeprefix("torch."), "o")
            axes.plot(x, y, marker, color=colours[timing.case.operator], ms=5, mec="white", mew=0.6, zorder=3)
        numbers = [timings.index(timing) + 1 for timing in drawn]
        _numbers(figure, axes, points, numbers, [colours[timing.case.operator] for timing in drawn])
        _legend(figure, timings, ceilings, colours)
        figure.savefig(path, format="png", dpi=130)


def _place(timing: Timing) -> tuple[float, float]:
    return timing.case.flops / timing.case.bytes_moved, timing.rate / _GIGA


def _axes(axes: Any, timings: list[Timing], ceilings: Ceilings) -> None:
    ridge = ceilings.int8 / ceilings.read_bandwidth
    x, y = np.array([_place(timing) for timing in timings] or [(ridge, ceilings.fp32 / _GIGA / 100)]).T
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(min(x.min() / 2, 0.2), max(x.max() * 2, 4 * ridge))
    axes.set_ylim(y.min() / 2.5, max(ceilings.int8, ceilings.fp32) / _GIGA * 2.2)
    axes.grid(which="major", color="#e9ecef", lw=0.8)
    axes.grid(which="minor", color="#f4f5f7", lw=0.5)
    axes.set_axisbelow(True)
    axes.set_xlabel("arithmetic intensity (operations per byte that must move)")
    axes.set_ylabel("10⁹ operations per second")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _ceilings(axes: Any, ceilings: Ceilings) -> None:
    left, right = axes.get_xlim()
    bandwidth = ceilings.read_bandwidth / _GIGA
    for peak, name, style in (
        (ceilings.int8, "8-bit integer multiply-add", (0, (5, 2))),
        (ceilings.fp32, "fp32 multiply-add", "solid"),
    ):
        ridge = peak / ceilings.read_bandwidth
        axes.plot([ridge, right], [peak / _GIGA] * 2, color="#343a40", lw=1.4, ls=style, zorder=2)
        axes.annotate(
            f"{name} {peak / _GIGA:.0f}",
            (right, peak / _GIGA),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            color="#343a40",
        )
    ridge = max(ceilings.int8, ceilings.fp32) / ceilings.read_bandwidth
    axes.plot([left, ridge], [bandwidth * left, bandwidth * ridge], color="#343a40", lw=1.4, zorder=2)
    x = left * 1.25
    (x0, y0), (x1, y1) = axes.transData.transform([(x, bandwidth * x), (ridge, bandwidth * ridge)])
    axes.annotate(
        f"reading memory {bandwidth:.1f} GB/s",
        (x, bandwidth * x),
        xytext=(0, 5),
        textcoords="offset points",
        rotation=np.degrees(np.arctan2(y1 - y0, x1 - x0)),
        rotation_mode="anchor",
        color="#343a40",
    )


def _numbers(figure: Any, axes: Any, points: list[tuple[float, float]], numbers: list[int], colours: list[str]) -> None:
    """Number the points; labels push each other, and keep off the points, until none overlap."""
    if not points:
        return
    scale = 72 / figure.dpi  # pixels to points
    anchors = axes.transData.transform(points) * scale
    # Start upwards, fanned out, so that labels of points that coincide part in different directions.
    angles = np.pi / 2 + (np.arange(len(points)) % 7 - 3) * 0.35
    labels = anchors + _LABEL * np.stack((np.cos(angles), np.sin(angles)), axis=1)
    for _ in range(400):
        push = (anchors - labels) * 0.02
        for others, distance in ((labels, _LABEL * 1.1), (anchors, _LABEL * 0.85)):
            apart = labels[:, None] - others[None]
            gap = np.linalg.norm(apart, axis=-1)
            overlap = np.clip(distance - gap, 0, None) * (gap > 1e-9)
            push += (apart / np.maximum(gap, 1e-9)[..., None] * overlap[..., None] * 0.5).sum(axis=1)
        labels += push
    for number, anchor, label, colour in zip(numbers, anchors, labels, colours, strict=True):
        line, text = axes.transData.inverted().transform(np.array([anchor, label]) / scale)
        axes.plot(*zip(line, text, strict=True), color=colour, lw=0.6, alpha=0.6, zorder=3)
        axes.annotate(
            str(number),
            text,
            ha="center",
            va="center",
            fontsize=7,
            color=colour,
            weight="bold",
            zorder=4,
            bbox={"boxstyle": "circle,pad=0.22", "fc": "white", "ec": colour, "lw": 0.7},
        )


def _legend(figure: Any, timings: list[Timing], ceilings: Ceilings, colours: dict[str, str]) -> None:
    """Lines on the right: per operator a heading, per case its number, dtype, sizes and share of the ceiling."""
    lines = len(timings) + 1.6 * len(colours)
    step = min(0.86 / lines, 0.026)
    y = 0.925
    figure.text(0.625, 0.955, "● fp32   ■ fp16   ▲ bf16", va="center", fontsize=8, color="#495057")
    figure.text(0.985, 0.955, "share of ceiling", ha="right", va="center", fontsize=8, color="#495057")
    for operator, colour in colours.items():
        figure.text(0.625, y, operator, color=colour, weight="bold", fontsize=9.5, va="center")
        y -= step
        for number, timing in enumerate(timings, start=1):
            if timing.case.operator != operator:
                continue
            share = timing.share(ceilings)
            figure.text(0.64, y, str(number), color=colour, weight="bold", fontsize=7.5, ha="right", va="center")
            figure.text(0.648, y, timing.case.summary, fontsize=7.5, va="center")
            figure.text(0.985, y, f"{share:.0%}", fontsize=7.5, ha="right", va="center")
            y -= step
        y -= 0.6 * step
