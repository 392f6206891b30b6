"""`loraplex serve`: one option for each setting, made from the settings themselves, so that no two places can differ."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer

from loraplex_server.commands.connection import EXIT_REFUSED, EXIT_USAGE, complain

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from loraplex_server.model.loader import Progress

HELP = """Serve a base model and its adapters over an OpenAI-style API.

Requests choose an adapter by `model`; the calls below /v1/adapters upload, list and unload adapters while the server runs.
`--model demo` serves the embedded demo model. Every flag can also be set in the environment: LORAPLEX_MAX_RUNNING for
--max-running. Examples:

    loraplex serve --model meta-llama/Llama-3.1-8B-Instruct --adapter sql=./adapters/sql

    loraplex serve --model ./my-model --host 0.0.0.0 --api-key "$USER_KEY" --admin-key "$ADMIN_KEY"
"""

DEMO = "demo"

# The first setting of each panel of --help.
_PANELS = {
    "model": "What is served",
    "device": "How it is held",
    "host": "HTTP",
    "data_dir": "Adapters",
    "kv_cache_memory": "Memory",
    "max_running": "Batching",
    "metrics_access": "Watching",
}


def serve_command() -> Callable[..., None]:
    """The function behind ``loraplex serve``. Values go to the settings as text: they are parsed in one place only."""
    from loraplex_server.config import ServeSettings

    parameters, panel = [], ""
    for name, field in ServeSettings.model_fields.items():
        panel = _PANELS.get(name, panel)
        parameters.append(_parameter(name, field, panel))

    def serve(**given: Any) -> None:
        run(given)

    serve.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    serve.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    serve.__doc__ = HELP
    return serve


def run(given: dict[str, Any]) -> None:
    """Serve with these flags; what cannot be done ends the command with one clear message."""
    from loraplex_server.config import ConfigError, load_config

    try:
        config = load_config(_with_demo(given))
    except ConfigError as error:
        complain(str(error))
        raise typer.Exit(EXIT_USAGE) from None
    # Read by torch when it first allocates: weights in large pages stream a sixth faster through a CPU.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from loraplex_adapters.errors import AdapterError
    from loraplex_server.engine.host import EngineNotStarted
    from loraplex_server.logs import configure_logging
    from loraplex_server.memory_plan import TooLittleMemory
    from loraplex_server.model.errors import ModelError
    from loraplex_server.serve import EngineDied, StartError, serve

    configure_logging(config.log)
    try:
        serve(config, _progress())
    except (StartError, EngineNotStarted, EngineDied, ModelError, AdapterError, TooLittleMemory) as error:
        complain(str(error))
        raise typer.Exit(EXIT_REFUSED) from None


def _with_demo(given: dict[str, Any]) -> dict[str, Any]:
    """``--model demo``: the embedded model under its own name, with its adapters unless others are named."""
    if given.get("model") != DEMO or Path(DEMO).is_dir():
        return given
    from loraplex_server.demo import DEMO_ADAPTERS, DEMO_BASE_NAME, DEMO_MODEL

    adapters = [f"{name}={path}" for name, path in list(DEMO_ADAPTERS.items())[:-1]]
    return {
        **given,
        "model": str(DEMO_MODEL),
        "served_model_name": given.get("served_model_name") or [DEMO_BASE_NAME],
        "adapter": given.get("adapter") or adapters,
    }


def _parameter(name: str, field: FieldInfo, panel: str) -> inspect.Parameter:
    from loraplex_server.config import env_of, flag_of

    flag, kind = flag_of(name), field.annotation
    annotation: Any = str | None
    if kind is bool:
        annotation, flag = bool | None, f"{flag}/--no-{flag[2:]}"
    elif get_origin(kind) is list:
        annotation = list[str] | None
    option = typer.Option(
        flag,
        # Brackets would be read as markup.
        help=f"{field.description} Environment: {env_of(name)}.".replace("[", r"\["),
        metavar=_metavar(name, kind),
        rich_help_panel=panel,
        show_default=_shown_default(field),
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation, option]
    )


def _metavar(name: str, kind: Any) -> str | None:
    if kind is bool:
        return None
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if name == "adapter":
        return "NAME=SOURCE"
    if name.endswith(("_memory", "_bytes")):
        return "SIZE"
    if name.endswith(("_dir", "_root", "_template")):
        return "PATH"
    return "NUMBER" if {int, float} & {kind, *get_args(kind)} else "TEXT"


def _shown_default(field: FieldInfo) -> str | bool:
    if field.is_required() or field.default == []:
        return False
    if field.default is None:
        return "auto" if "auto" in (field.description or "") else False
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    if isinstance(field.default, int) and field.default >= 1 << 20 and field.default % (1 << 20) == 0:
        return f"{field.default >> 20}MiB"
    return str(field.default)


def _progress() -> Progress | None:
    """A bar on stderr while the base loads; none where nobody looks."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        return None
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    bar = Progress(
        TextColumn("loading the base"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    task = bar.add_task("", total=None)

    def show(done: int, total: int) -> None:
        if not bar.finished and done < total:
            bar.start()
        bar.update(task, completed=done, total=total)
        if done >= total:
            bar.stop()

    return show
