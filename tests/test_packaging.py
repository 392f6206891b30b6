"""Without the server's packages the client and its commands work, and `serve` says what to install."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from loraplex_server.commands.extras import SERVER_PACKAGES

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# As in an environment into which only the project itself was installed: what the extra brings cannot be found.
BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        return None

sys.meta_path.insert(0, Blocker())
"""
MAIN = "from loraplex_server.cli import main\nsys.argv[0] = 'loraplex'\nmain()\n"


def imported_names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w-]", requirement)[0].replace("-", "_") for requirement in requirements}


EXTRA = imported_names(PROJECT["optional-dependencies"]["server"])


def run(code: str, *arguments: str, blocked: set[str] = EXTRA) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", BLOCKER.format(blocked=blocked) + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_what_is_looked_for_is_what_the_extra_brings() -> None:
    assert set(SERVER_PACKAGES) <= EXTRA
    # The server itself imports none of these, or does without them.
    assert EXTRA - set(SERVER_PACKAGES) == {"peft", "accelerate", "httptools", "uvloop"}


def test_help_names_the_extra() -> None:
    done = run(MAIN, "--help")
    assert done.returncode == 0, done.stderr
    assert "[server]" in done.stdout
    assert all(command in done.stdout for command in ("serve", "demo", "chat", "adapters"))


@pytest.mark.parametrize(
    "arguments",
    [["serve", "--model", "demo", "--max-running=4"], ["serve"], ["demo"], ["bench", "decode"], ["bench", "serve"]],
    ids=" ".join,
)
def test_serving_says_what_to_install(arguments: list[str]) -> None:
    done = run(MAIN, *arguments)
    assert done.returncode == 2
    assert "pip install '.[server]'" in done.stderr
    assert "fastapi" in done.stderr
    assert "Traceback" not in done.stderr


def test_one_missing_package_is_named_alone() -> None:
    done = run(MAIN, "serve", "--model", "demo", blocked={"uvicorn"})
    assert done.returncode == 2
    assert "(uvicorn)" in done.stderr


def test_client_commands_need_no_server_packages() -> None:
    done = run(MAIN, "adapters", "list", "--base-url", "http://127.0.0.1:1")
    assert done.returncode == 1
    assert "no server answers" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_client_needs_no_server_packages() -> None:
    done = run("import loraplex_client\nprint(loraplex_client.Loraplex('http://127.0.0.1:1').base_url)")
    assert done.stdout == "http://127.0.0.1:1\n", done.stderr


@pytest.mark.parametrize(
    "file",
    [
        "server/loraplex_server/py.typed",
        "server/loraplex_server/demo/model/model.safetensors",
        "server/loraplex_server/demo/model/chat_template.jinja",
        "server/loraplex_server/demo/adapters/emoji/adapter_model.safetensors",
        "server/loraplex_server/kernels/cuda/common.cuh",
        "server/loraplex_server/kernels/cuda/nf4_mma.cu",
        "adapters/loraplex_adapters/py.typed",
        "clients/loraplex_client/py.typed",
        "LICENSE",
    ],
)
def test_the_wheel_holds(file: str) -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"][
        "packages"
    ]
    assert file in PROJECT["license-files"] or any(file.startswith(f"{package}/") for package in packages)
    assert (ROOT / file).is_file()
    # The build leaves out whatever .gitignore names.
    ignored = subprocess.run(["git", "-C", str(ROOT), "check-ignore", "--no-index", file], capture_output=True)
    assert ignored.returncode != 0, f"{file} is ignored by git"
