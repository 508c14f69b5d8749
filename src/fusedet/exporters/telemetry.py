"""OpenVINO's converter and NNCF without their telemetry."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_telemetry() -> Iterator[None]:
    """Send no event of OpenVINO's converter and of NNCF.

    Unless the user opted out of it, they send dozens of events per model to a server, each from a fork of this process.
    """
    try:
        from openvino_telemetry.utils.sender import TelemetrySender
    except ImportError:  # without this package they send nothing
        yield
        return
    send = TelemetrySender.send
    TelemetrySender.send = lambda *_: None
    try:
        yield
    finally:
        TelemetrySender.send = send
