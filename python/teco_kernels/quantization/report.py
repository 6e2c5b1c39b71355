"""What quantising a model did to each of its matrices: records, as JSON and as a picture."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from teco_kernels import __version__

#: Its name in the folder of a quantised model.
REPORT_NAME = "quantization_report.json"

_LAYER = re.compile(r"model\.layers\.(\d+)\.\w+\.(\w+)")


@dataclass(frozen=True)
class LayerReport:
    """One linear layer.

    Attributes
    ----------
    name : str
    error, rounding_error, dampening : float
        As in `GPTQTensors`.
    bits : int
    seconds : float
        Time since the layer before was done. The first of those with the same input carries their calibration.
    """

    name: str
    error: float
    rounding_error: float
    dampening: float
    bits: int = 4
    seconds: float = 0.0

    @property
    def ratio(self) -> float:
        """Error as a share of that of rounding to nearest; 1 when neither makes any."""
        return self.error / self.rounding_error if self.rounding_error else 1.0


def to_json(reports: Sequence[LayerReport], settings: Mapping[str, Any], peak_bytes: int) -> str:
    """The report that is saved beside the model."""
    document = {
        "teco_kernels": __version__,
        "settings": dict(settings),
        "seconds": round(sum(report.seconds for report in reports), 3),
        "peak_memory_bytes": peak_bytes,
        "matrices": [{**asdict(report), "ratio": report.ratio} for report in reports],
    }
    return json.dumps(document, indent=2) + "\n"


def by_layer(reports: Iterable[LayerReport]) -> dict[str, dict[str, LayerReport]]:
    """Reports by the number of the layer and the matrix's own name; others, such as the head, by name and by ''."""
    table: dict[str, dict[str, LayerReport]] = {}
    for report in reports:
        match = _LAYER.fullmatch(report.name)
        layer, matrix = match.groups() if match else (report.name, "")
        table.setdefault(layer, {})[matrix] = report
    return table


def draw(reports: Sequence[LayerReport], title: str, path: Path) -> None:
    """Write a PNG: for each kind of matrix the errors over the layers, beside those of rounding; needs matplotlib."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    layers = {layer: row for layer, row in by_layer(reports).items() if "" not in row}
    kinds = list(dict.fromkeys(kind for row in layers.values() for kind in row))
    with mpl.rc_context({"font.size": 9, "font.family": "DejaVu Sans", "axes.edgecolor": "#868e96"}):
        figure = Figure(figsize=(14, 6.8), layout="constrained")
        figure.suptitle(f"Error of each matrix's output\n{title}", x=0.01, ha="left", fontsize=12)
        axes = figure.subplots(2, 4, sharex=True).flatten()
        for axis, kind in zip(axes, kinds, strict=False):
            x = [int(layer) for layer, row in layers.items() if kind in row]
            chosen = [row[kind] for row in layers.values() if kind in row]
            axis.plot(x, [100 * r.rounding_error for r in chosen], color="#adb5bd", label="rounding to nearest")
            axis.plot(x, [100 * r.error for r in chosen], color="#2563c9", marker="o", ms=3, label="GPTQ")
            axis.set_title(f"{kind}, {chosen[0].bits} bits", loc="left", fontsize=10)
            axis.set_ylim(bottom=0)
            axis.yaxis.set_major_formatter("{x:g} %")
        seconds = axes[len(kinds)]
        seconds.bar([int(layer) for layer in layers], [_seconds(row) for row in layers.values()], color="#ced4da")
        seconds.set_title("seconds", loc="left", fontsize=10)
        for axis in axes:
            axis.grid(axis="y", color="#e9ecef")
            axis.set_axisbelow(True)
            for side in ("top", "right"):
                axis.spines[side].set_visible(False)
        for axis in axes[4:]:
            axis.set_xlabel("layer")
        axes[0].legend(frameon=False)
        figure.savefig(path, format="png", dpi=110)


def _seconds(row: Mapping[str, LayerReport]) -> float:
    return sum(report.seconds for report in row.values())
