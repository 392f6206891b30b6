"""Where and with what a measurement was made, and the CSV it goes to."""

import csv
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def circumstances(packages: Sequence[str]) -> dict[str, str]:
    """Device, commit and package versions, as columns."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    found = {"device": device, "threads": str(torch.get_num_threads()), "commit": _commit(), "torch": torch.__version__}
    return found | {name: version(name) for name in packages}


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows with the union of their columns, in order of first appearance."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def _commit() -> str:
    command = ["git", "-C", str(RESULTS.parent), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({len(names)} cores)" if names else platform.machine()
