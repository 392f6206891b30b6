"""`loraplex chat`: talk to the base model or an adapter from a terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from .connection import DEFAULT_BASE_URL, EXIT_USAGE, ApiKey, BaseUrl, complain, connected, explain, fail
from .conversation import Conversation, Timing, ask

if TYPE_CHECKING:
    from loraplex_client import Loraplex

EXIT_INTERRUPTED = 130
"""What a shell reports for Ctrl-C."""

HELP = """\
/model NAME    talk to another adapter, or to the base; the conversation goes on
/models        list the names
/system TEXT   set the system prompt; without TEXT, remove it
/clear         forget the conversation
/help          show this
/quit          leave, as does Ctrl-D
Ctrl-C stops an answer."""


def chat(
    prompt: Annotated[
        str | None, typer.Argument(help="Ask this and leave. Without it: a conversation.", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="An adapter's name; the base if left out.", show_default=False)
    ] = None,
    base_url: BaseUrl = DEFAULT_BASE_URL,
    api_key: ApiKey = None,
    system: Annotated[str | None, typer.Option(help="The system prompt.", show_default=False)] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="The longest answer.", show_default=False)] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, max=2.0, help="0 for the likeliest words.", show_default=False)
    ] = None,
) -> None:
    """Talk to the base model or to one of its adapters.

    Example: loraplex chat --model pirate

    Example: loraplex chat --model pirate "Where is the treasure?"

    Example: git diff | loraplex chat --model reviewer
    """
    options = {"max_tokens": max_tokens, "temperature": temperature}
    params = {name: value for name, value in options.items() if value is not None}
    conversation = Conversation(model, system, params)
    if prompt is None and not _stdin_is_a_terminal():
        prompt = sys.stdin.read().strip()
    with connected(base_url, api_key=api_key) as client:
        if prompt is None:
            return _converse(client, conversation)
        if not prompt.strip():
            fail("the prompt is empty", EXIT_USAGE)
        timing = ask(client, conversation, prompt)
    _print_timing(timing)
    if timing.stopped:
        raise typer.Exit(EXIT_INTERRUPTED)
    return None


def _converse(client: Loraplex, conversation: Conversation) -> None:
    # Also the first contact: a server out of reach ends the command here, before anything is typed.
    if conversation.model is None:
        conversation.model = client.base_model()
    else:
        client.models.get(conversation.model)
    typer.echo(f"Talking to {conversation.model} at {client.base_url}. /help lists the commands.")
    _enable_line_editing()
    while True:
        try:
            line = input(f"{conversation.model}> ").strip()
        except EOFError:
            return typer.echo()
        except KeyboardInterrupt:
            typer.echo("\n/quit or Ctrl-D leaves.")
            continue
        if line == "/quit":
            return None
        if line:
            _handle(client, conversation, line)


def _handle(client: Loraplex, conversation: Conversation, line: str) -> None:
    """Answer one line; an error is shown, and the conversation goes on."""
    from loraplex_client import LoraplexError

    try:
        if line.startswith("/"):
            command, _, argument = line.partition(" ")
            _obey(client, conversation, command, argument.strip())
        else:
            _print_timing(ask(client, conversation, line))
    except LoraplexError as error:
        complain(explain(error))


def _obey(client: Loraplex, conversation: Conversation, command: str, argument: str) -> None:
    if command == "/help":
        typer.echo(HELP)
    elif command == "/clear":
        conversation.turns.clear()
        typer.echo("The conversation is forgotten.")
    elif command == "/system":
        conversation.system = argument or None
        typer.echo("The system prompt is set." if argument else "The system prompt is removed.")
    elif command == "/models":
        for card in client.models.list():
            typer.echo(f"{'*' if card.id == conversation.model else ' '} {card.id}{'' if card.parent else ' (base)'}")
    elif command == "/model" and argument:
        # Raises for an unknown name: the conversation stays where it is.
        client.models.get(argument)
        conversation.model = argument
    else:
        complain(f"{command} is not a command, or needs a name; /help lists the commands")


def _print_timing(timing: Timing) -> None:
    # On stderr: an answer that is piped on stays clean.
    typer.secho(str(timing), dim=True, err=True)


def _stdin_is_a_terminal() -> bool:
    return sys.stdin.isatty()


def _enable_line_editing() -> None:
    try:
        import readline  # noqa: F401 - imported for what it does to input()
    except ImportError:
        return
