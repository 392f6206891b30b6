"""The documentation is true: its commands run, its links resolve, and its tables name all that there is."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
from prometheus_client.parser import text_string_to_metric_families

from loraplex_server import cli
from loraplex_server.api.chat_request import ChatMessage, ChatRequest
from loraplex_server.api.completion_request import CompletionRequest
from loraplex_server.auth import Keys
from loraplex_server.commands import serve as serve_commands
from loraplex_server.config import ServeSettings, flag_of, load_config
from tests.api.servers import scripted_services, serve
from tests.code_map import with_map
from tests.doc_pages import DOCS, PAGES, ROOT, Block, blocks_of, demo_server, run_block

BLOCKS = [block for page in PAGES for block in blocks_of(page)]
RUN = [block for block in BLOCKS if block.marks is not None]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with demo_server(tmp_path_factory.mktemp("open")) as address:
        yield address


@pytest.fixture(scope="module")
def keyed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    keys = Keys(("user-secret",), ("admin-secret",))
    with serve(scripted_services(tmp_path_factory.mktemp("keys"), keys=keys)) as running:
        yield f"127.0.0.1:{running.port}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "server").symlink_to(ROOT / "server")
    return tmp_path


@pytest.mark.e2e
@pytest.mark.parametrize("page", sorted({block.page for block in RUN}))
def test_what_a_page_shows_runs(page: str, folder: Path, request: pytest.FixtureRequest) -> None:
    for block in RUN:
        if block.page == page:
            address = request.getfixturevalue("keyed_server" if "keys" in (block.marks or ()) else "server")
            run_block(block, address, folder)


def test_the_readme_has_blocks_that_run() -> None:
    assert sum(block.page == "README.md" for block in RUN) >= 6


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "sh" and "loraplex serve " in b.text], ids=str)
def test_serve_commands_are_understood(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(serve_commands, "run", given.append)
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        names = [word.removeprefix(".venv/bin/") for word in words]
        if "serve" in names and names[names.index("serve") - 1] == "loraplex":
            assert not any("=" not in word for word in words[: names.index("loraplex")]), line
            typer.main.get_command(cli.app)(words[names.index("serve") :], standalone_mode=False)
            load_config(given[-1])
    assert given or "--help" in block.text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name} links to {target}, which is not there"
        if anchor:
            assert anchor in _anchors(found), (
                f"{page.name} links to {target}; {found.name} has {sorted(_anchors(found))}"
            )
        if DOCS in page.parents:
            assert DOCS in found.parents, f"{page.name} links to {target}, which the built site does not hold"


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", ["security.md", "correctness.md"])
def test_tests_that_pages_name_are_there(page: str) -> None:
    tests = {
        name for file in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    named = set(re.findall(r"`(test_\w+)`", _docs(page)))
    assert named
    assert named <= tests


def test_every_alert_is_documented() -> None:
    alerts = re.findall(r"alert: (\w+)", (ROOT / "deploy/prometheus/alerts.yml").read_text(encoding="utf-8"))
    assert set(_first_column(_docs("operations.md"), after="## Metrics, alerts, Grafana")) == set(alerts)


def test_every_page_is_in_the_navigation() -> None:
    navigation = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert navigation == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}


def test_the_map_of_the_code_is_complete() -> None:
    assert with_map(README) == README, "the README's map is out of date; write it with: python -m tests.code_map"


def test_make_targets_are_there() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"\bmake ([a-z]+)`", page.read_text(encoding="utf-8"))}
    assert {"demo", "serve", "test", "check"} <= named <= targets


@pytest.mark.parametrize("setting", list(ServeSettings.model_fields))
def test_every_setting_is_documented(setting: str) -> None:
    assert f"`{flag_of(setting)}`" in _docs("reference/settings.md")


def test_every_command_and_option_is_documented() -> None:
    text = _docs("reference/cli.md")
    for path, command in _commands("loraplex", typer.main.get_command(cli.app)):
        assert f"## {path}\n" in text, f"reference/cli.md has no section {path}"
        if path == "loraplex serve":
            continue
        section = text.partition(f"## {path}\n")[2].partition("\n## ")[0]
        for parameter in command.params:
            names = [parameter.name.upper()] if parameter.param_type_name == "argument" else parameter.opts
            for name in names:
                assert f"`{name}" in section, f"reference/cli.md does not say what {name} of {path} is"


def _commands(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    subcommands = getattr(command, "commands", {})
    for name, subcommand in subcommands.items():
        yield from _commands(f"{path} {name}", subcommand)
    if not subcommands:
        yield path, command


@pytest.mark.e2e
def test_every_route_is_documented(server: str) -> None:
    schema = httpx.get(f"http://{server}/openapi.json", trust_env=False).json()
    routes = {f"{method.upper()} {path}" for path, methods in schema["paths"].items() for method in methods}
    documented = set(re.findall(r"`((?:GET|POST|PUT|PATCH|DELETE) /[^`\s]*)`", _docs("reference/http.md")))
    assert documented == routes | {"GET /openapi.json", "GET /docs"}


@pytest.mark.e2e
def test_every_metric_is_documented(server: str) -> None:
    families = list(text_string_to_metric_families(httpx.get(f"http://{server}/metrics", trust_env=False).text))
    names = {f"{family.name}_total" if family.type == "counter" else family.name for family in families}
    documented = re.findall(r"^\| `([\w:]+)` \|", _docs("reference/metrics.md"), flags=re.MULTILINE)
    assert set(documented) == names


def test_every_refusal_of_an_adapter_is_documented() -> None:
    codes = _codes(*(ROOT / "adapters").rglob("*.py")) | _table_codes()
    assert set(_first_column(_docs("adapters.md"), after="## Refusals")) == codes


def test_every_error_code_is_documented() -> None:
    server = ROOT / "server/loraplex_server"
    codes = _codes(server / "errors.py", *(server / "api").rglob("*.py"), server / "auth.py")
    assert set(_first_column(_docs("reference/http.md"), after="## Errors")) == codes | _failure_codes()


def _codes(*files: Path) -> set[str]:
    """The literal values of every ``code=`` argument and ``default_code`` attribute."""
    found: set[str] = set()
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))):
        if isinstance(node, ast.keyword) and node.arg == "code":
            found |= _literals(node.value)
        elif isinstance(node, ast.Assign | ast.AnnAssign) and ast.unparse(node).startswith("default_code"):
            found |= _literals(node.value) if node.value else set()
    return found


def _literals(node: ast.expr) -> set[str]:
    return {node.value} if isinstance(node, ast.Constant) and isinstance(node.value, str) else set()


def _table_codes() -> set[str]:
    """The codes that stand in the table of config keys."""
    from loraplex_adapters.unserved import _FEATURES

    return {code for code, _ in _FEATURES.values()}


def _failure_codes() -> set[str]:
    from starlette.exceptions import HTTPException

    from loraplex_server.errors import _FAILURES, _code

    by_status = {_code(HTTPException(status)) for status in (404, 405, 413)}
    return {code for _, code in _FAILURES.values()} | {code for code in by_status if code}


@pytest.mark.parametrize("field", sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields}))
def test_every_request_field_is_documented(field: str) -> None:
    assert field in _first_column(_docs("openai-api.md"))


@pytest.mark.parametrize("field", sorted(ChatMessage.model_fields))
def test_every_message_field_is_documented(field: str) -> None:
    assert field in _first_column(_docs("openai-api.md"), after="## Messages")


def _first_column(page: str, after: str = "") -> list[str]:
    """The words in backticks in the first column of a page's tables, those below one heading if it is given."""
    section = page.partition(after)[2] if after else page
    if after:
        section = section.partition("\n## ")[0]
    cells = re.findall(r"^\| (`[^|]+) \|", section, flags=re.MULTILINE)
    return [word for cell in cells for word in re.findall(r"`([^`]+)`", cell)]


def _docs(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")
