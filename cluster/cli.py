"""The `ballast` command."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from deployments.errors import BallastError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Serve language models on Ray.")
console = Console(stderr=True, highlight=False)


@app.command()
def serve(
    config: Annotated[Path, typer.Argument(help="a file as in serve_configs/")],
    haproxy: Annotated[
        bool,
        typer.Option(help="HAProxy in front, HTTP ends in the replica; off: Ray's Python proxy"),
    ] = True,
    timeout_s: Annotated[float, typer.Option(help="how long the models may take to start")] = 900.0,
) -> None:
    """Check a config, start it with `serve run`, and say when it can be talked to."""
    from cluster.launch import serve as run
    from cluster.serve_config import read_serve_config

    raise typer.Exit(run(read_serve_config(config), haproxy=haproxy, timeout_s=timeout_s, say=_say))


@app.command()
def check(config: Annotated[Path, typer.Argument(help="a file as in serve_configs/")]) -> None:
    """Check a config and plan its models; start nothing. Exit code 2: it does not fit."""
    from cluster.launch import check as plan_all
    from cluster.serve_config import read_serve_config

    plan_all(read_serve_config(config), _say)


@app.command("demo-model")
def demo_model(folder: Annotated[Path, typer.Argument(help="where to write it")]) -> None:
    """Write the demo model: tiny, from a seed, no download."""
    from cluster.demo_model import build_demo_model

    build_demo_model(folder)
    _say(f"the demo model is in {folder}")


def _say(line: str) -> None:
    console.print(f"[bold]ballast[/bold] {escape(line)}", soft_wrap=True)


def main() -> None:
    """Errors of ours are one line; anything else is a bug and keeps its traceback."""
    try:
        app()
    except BallastError as error:
        console.print(f"[bold red]ballast[/bold red] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
