"""The ``loraplex`` command."""

import typer

from loraplex_server.commands.adapters import adapters_app
from loraplex_server.commands.bench import bench_app
from loraplex_server.commands.chat import chat
from loraplex_server.commands.demo import demo
from loraplex_server.commands.extras import missing_packages, serve_without_server
from loraplex_server.commands.merge import merge
from loraplex_server.commands.serve import serve_command

app = typer.Typer(
    name="loraplex",
    help="One base model in NF4, many LoRA adapters, one OpenAI-style API.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
if missing_packages():
    # Whatever follows `serve`, the answer is what to install.
    app.command("serve", context_settings={"ignore_unknown_options": True})(serve_without_server)
else:
    app.command("serve")(serve_command())
app.command()(demo)
app.command()(chat)
app.command()(merge)
app.add_typer(adapters_app, name="adapters")
app.add_typer(bench_app, name="bench")


def main() -> None:
    """The entry point of the installed command."""
    app()


if __name__ == "__main__":
    main()
