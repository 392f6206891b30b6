"""The subcommands of `loraplex` that talk to a running server; `loraplex_server.cli` puts them together.

Modules here import only typer at the top: `loraplex --help` must not wait for an HTTP client.
"""
