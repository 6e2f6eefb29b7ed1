"""The processor of a measurement."""

import platform
from pathlib import Path


def processor() -> str:
    """Return its name and, on Linux, its family and model, since some names stand for several designs."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
        return f"{told['model name']} (family {told['cpu family']}, model {told['model']})"
    except (OSError, KeyError):
        return platform.processor() or platform.machine()
