"""The README's map of the code: one line a file, taken from the file's own docstring.

python -m tests.code_map          # writes it into README.md
"""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("server/loraplex_server", "adapters/loraplex_adapters", "clients/loraplex_client")
BEGIN, END = "<!-- map:begin -->", "<!-- map:end -->"


def files_of(package: Path) -> list[Path]:
    """All modules of a package, folder by folder; markers of packages that say nothing are left out."""
    known = _known_files(package)
    files = [path for path in known if path.name != "__init__.py" or ast.get_docstring(_tree(path))]
    return sorted(files, key=lambda path: (path.parent != package, path.parent, path.name != "__init__.py", path.name))


def summary(path: Path) -> str:
    """The first sentence of a module's docstring, on one line."""
    docstring = ast.get_docstring(_tree(path))
    assert docstring, f"{path} has no docstring"
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?]) (?=[A-Z])", paragraph)[0]
    return sentence.replace("``", "`").removesuffix(".")


def lines() -> Iterator[str]:
    """The map, as Markdown."""
    for package in PACKAGES:
        folder = None
        for path in files_of(ROOT / package):
            if path.parent != folder:
                folder = path.parent
                yield from ("", f"`{folder.relative_to(ROOT)}/`", "", "| file | what it is |", "| --- | --- |")
            escaped = summary(path).replace("|", "\\|").replace("<", "&lt;")
            yield f"| [{path.name}]({path.relative_to(ROOT)}) | {escaped} |"
    yield ""


def with_map(readme: str) -> str:
    """``readme`` with the map of today."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    written = "\n".join(lines())
    return f"{before}{BEGIN}\n{written}\n{END}{after}"


def _known_files(package: Path) -> list[Path]:
    """What git knows, so that work in progress beside it does not count; all files where there is no git."""
    command = ["git", "-C", str(package), "ls-files", "-z", "--", "*.py"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        return list(package.rglob("*.py"))
    return [package / name for name in listed if name and (package / name).is_file()]


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    target = ROOT / "README.md"
    target.write_text(with_map(target.read_text(encoding="utf-8")), encoding="utf-8")
