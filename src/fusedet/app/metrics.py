"""Counters of the server in Prometheus' text format, version 0.0.4."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping

BUCKETS = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds in seconds of the histogram of prediction times."""


class Metrics:
    """What the server counts since its start."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str, str]] = Counter()
        self.seconds: dict[str, float] = {}
        self.buckets: dict[str, list[int]] = {}

    def count_request(self, method: str, path: str, status: int) -> None:
        """Count a request by method, route and status; static files and unknown routes are "other"."""
        self.requests[method, path, str(status)] += 1

    def count_prediction(self, model: str, seconds: float) -> None:
        """Count a prediction of a model and its time."""
        self.seconds[model] = self.seconds.get(model, 0.0) + seconds
        counts = self.buckets.setdefault(model, [0] * (len(BUCKETS) + 1))
        for i, bound in enumerate((*BUCKETS, math.inf)):
            counts[i] += seconds <= bound

    def format(self, pending: int, refused: int) -> str:
        """Return all metrics as text.

        Args:
            pending: Requests that are computed or wait.
            refused: Requests that the full queue refused.
        """
        lines = _describe("fusedet_http_requests_total", "counter", "Requests by method, path and status.")
        for (method, path, status), count in sorted(self.requests.items()):
            labels = {"method": method, "path": path, "status": status}
            lines.append(_sample("fusedet_http_requests_total", count, labels))
        lines += _describe("fusedet_prediction_seconds", "histogram", "Time of a prediction, from the file to boxes.")
        for model, counts in sorted(self.buckets.items()):
            for bound, own in zip([*map(str, BUCKETS), "+Inf"], counts, strict=True):
                lines.append(_sample("fusedet_prediction_seconds_bucket", own, {"model": model, "le": bound}))
            lines.append(_sample("fusedet_prediction_seconds_sum", round(self.seconds[model], 6), {"model": model}))
            lines.append(_sample("fusedet_prediction_seconds_count", counts[-1], {"model": model}))
        lines += _describe("fusedet_queue_pending", "gauge", "Requests that are computed or wait for their turn.")
        lines.append(_sample("fusedet_queue_pending", pending))
        lines += _describe("fusedet_queue_refused_total", "counter", "Requests that the full queue refused.")
        lines.append(_sample("fusedet_queue_refused_total", refused))
        return "\n".join(lines) + "\n"


def _describe(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]


def _sample(name: str, value: float, labels: Mapping[str, str] | None = None) -> str:
    return f"{name}{_format_labels((labels or {}).items())} {value}"


def _format_labels(labels: Iterable[tuple[str, str]]) -> str:
    texts = [f'{name}="{_escape(value)}"' for name, value in labels]
    return f"{{{','.join(texts)}}}" if texts else ""


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
