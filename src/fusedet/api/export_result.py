"""What an export returns and prints."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from fusedet.api.results import CommandResult, group_lines
from fusedet.errors import format_count


@dataclass(frozen=True)
class ExportResult(CommandResult):
    """Exported files.

    Attributes:
        out: Their directory.
        report: What report.json holds: the tolerance, and per format the files, their size, the seconds that writing
            them took, and a row per compared input.
    """

    out: Path
    report: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the report and the directory."""
        return self.report | {"out": str(self.out)}

    def __rich__(self) -> RenderableType:
        rows = []
        for name, row in self.report["formats"].items():
            cases = row["cases"]
            if "price" in row:
                rows += self._describe_price(name, row)
                continue
            compared = format_count(sum(case["detections"] for case in cases), "detection")
            box, score = (max(case[key] for case in cases) for key in ("box", "score"))
            rows.append(
                f"{name}: {self.out / row['files'][0]}, {row['megabytes']:.1f} MB, equal to PyTorch on "
                f"{format_count(len(cases), 'input')} ({compared}): boxes within {box:.2g} pixels, scores within "
                f"{score:.2g}"
            )
        return group_lines([*rows, f"report: {self.out / 'report.json'}"])

    def _describe_price(self, name: str, row: dict[str, Any]) -> list[str]:
        """Return what int8 costs, as lines."""
        data, kept = self.report["calibration"], len(row["floating_point"])
        layers = f", {format_count(kept, 'convolution')} in floating point" if kept else ""
        interval = f"{100 * data['level']:g} % interval"
        return [
            f"{name}: {self.out / row['files'][0]}, {row['megabytes']:.1f} MB, int8 calibrated on "
            f"{format_count(data['images'], 'image')} of {data['split']}{layers}; price on "
            f"{format_count(data['val_images'], 'image')} of {data['val']}:",
            *(
                f"  {metric}: {price['a']:.4f} -> {price['b']:.4f}, {price['difference']:+.4f}, {interval} "
                f"{price['low']:+.4f} to {price['high']:+.4f}"
                for metric, price in row["price"].items()
            ),
        ]
