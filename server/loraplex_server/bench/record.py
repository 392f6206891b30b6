"""Where and with what a measurement was made, and the CSV it goes to."""

import csv
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

Row = Mapping[str, object]

COMMIT_VARIABLE = "LORAPLEX_COMMIT"
"""Names the commit where there is no git, such as on a machine that got a copy of the tree."""


def circumstances(packages: Sequence[str] = ()) -> dict[str, str]:
    """Device, commit, date and package versions, as columns. Packages that are not installed are left out."""
    import torch

    found = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": str(torch.get_num_threads()),
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "torch": torch.__version__,
    }
    return found | {name: known for name in packages if (known := _version(name))}


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows with the union of their columns, in order of first appearance."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def commit() -> str:
    """This checkout's commit, marked where it has changes; what the environment says, or "unknown", elsewhere."""
    if named := os.environ.get(COMMIT_VARIABLE):
        return named
    here = Path(__file__)
    try:
        # Installed below somebody else's repository, that one's commit would say nothing.
        _git(here.parent, "ls-files", "--error-unmatch", here.name)
        return _git(here.parent, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({len(names)} cores)" if names else platform.machine()
