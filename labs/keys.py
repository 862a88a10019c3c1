"""`llmlab keys`: who may ask the server. `serving.keys` keeps the file, `serving.access` reads it while the server runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

keys_app = typer.Typer(no_args_is_help=True, help="API keys of the server. Example: llmlab keys create alice")

Name = Annotated[str, typer.Argument(help="Whose key it is: a-z, 0-9 and . _ -")]


@keys_app.command()
def create(
    name: Name,
    role: Annotated[Literal["user", "admin"], typer.Option(help="An admin may also change what is served.")] = "user",
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="Any number if not given.")] = None,
    tokens_per_day: Annotated[
        int | None, typer.Option(min=1, help="Prompts and replies together, by days in UTC; any number if not given.")
    ] = None,
) -> None:
    """Make a key and show it, once. From the first key on every request needs one; a server that runs needs no restart.

    Example: llmlab keys create alice --requests-per-minute 60 --tokens-per-day 200000
    """
    from labs.screen import say
    from serving.keys import create as make

    key = make(_path(), name, role, requests_per_minute, tokens_per_day)
    say(f"the {role} key of {name}, which is not shown again; send it as Authorization: Bearer, or set LLMLAB_API_KEY to it:")
    print(key)


@keys_app.command("list")
def list_() -> None:
    """Show the keys: names, roles and limits; the keys themselves are not kept."""
    from labs.screen import table
    from serving.keys import read

    rows = [[k.name, k.role, _any(k.requests_per_minute), _any(k.tokens_per_day), k.created] for k in read(_path())]
    table("API keys", ["name", "role", "requests per minute", "tokens per day", "created"], rows)


@keys_app.command()
def revoke(name: Name) -> None:
    """Take a key away; the server refuses it from the next request on."""
    from labs.screen import say
    from serving.keys import revoke as remove

    remove(_path(), name)
    say(f"the key of {name} is no longer valid")


def _path() -> Path:
    from pipelines.errors import ConfigError
    from serving.keys import key_path
    from serving.settings import load_serve_config

    path = key_path(load_serve_config().keys)
    if path is None:
        raise ConfigError("configs/serve/default.yaml names no file of keys", "keys: keys.json", "edit it")
    return path


def _any(limit: int | None) -> str:
    return "any" if limit is None else str(limit)
