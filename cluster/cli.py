"""The `ballast` command."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from cluster.terminal import print_error
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


@app.command()
def estimate(
    model: Annotated[str, typer.Argument(help="a local folder or a Hub name")],
    gpus: Annotated[
        str | None, typer.Option(help='as in "2x8xH200, 1x4xL40S", or "cpu:8GiB"')
    ] = None,
    engine: Annotated[str, typer.Option(help="vllm, transformers, …")] = "vllm",
    pins: Annotated[
        list[str] | None, typer.Option("--set", help="pin a setting: max_model_len=8192")
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="for machines, per GPU and in bytes")
    ] = False,
    lang: Annotated[str | None, typer.Option(help="en or zh; the locale's otherwise")] = None,
    calibration: Annotated[
        bool, typer.Option(help="whether to use what loads here have taken, or formulas alone")
    ] = True,
    by_name: Annotated[
        bool, typer.Option("--by-name", help="approximate from the name alone, read nothing")
    ] = False,
) -> None:
    """Say what a model needs per GPU, item by item. Exit code 0: it fits; 2: it does not."""
    from cluster import estimate_command, estimate_report
    from cluster.languages import language_of
    from cluster.terminal import output, print_json, refusal_as_json
    from vram.calibration import calibration_path

    language = language_of(lang, os.environ)
    if by_name:
        approximation = estimate_command.by_name(model, pins or ())
        if json:
            print_json(estimate_report.approximation_json(approximation))
        else:
            output().print(estimate_report.approximation_line(approximation, language))
        raise typer.Exit(2)  # an approximation never says that it fits
    with refusal_as_json(json):
        found = estimate_command.answers(
            model,
            gpus=gpus,
            engine=engine,
            pins=pins or (),
            calibration=calibration_path(os.environ) if calibration else None,
        )
    if json:
        print_json(estimate_report.as_json(found, language))
    else:
        estimate_report.draw(output(), found, language)
    raise typer.Exit(0 if found[0].fits else 2)


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="a file as in serve_configs/")],
    gpus: Annotated[str | None, typer.Option(help='as in "2x8xH200, 1x4xL40S"')] = None,
    inventory: Annotated[
        Path | None, typer.Option(help="nodes and cards, as YAML or JSON (docs/planning.md)")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="for machines, in bytes")] = False,
    lang: Annotated[str | None, typer.Option(help="en or zh; the locale's otherwise")] = None,
) -> None:
    """Say where every model of a config would run and why; start nothing. Exit code 2: no room."""
    from cluster.languages import language_of
    from cluster.plan_command import plan_config
    from cluster.plan_document import document
    from cluster.plan_report import show
    from cluster.terminal import output, print_json, refusal_as_json

    language = language_of(lang, os.environ)
    with refusal_as_json(json):
        answer = plan_config(config, gpus=gpus, inventory=inventory)
    if json:
        print_json(document(answer))
    else:
        show(answer, output(), language)
    raise typer.Exit(0 if answer.fits else 2)


@app.command()
def status(
    url: Annotated[
        str, typer.Argument(help="of a server, or of a model below it")
    ] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str | None, typer.Option(envvar="BALLAST_API_KEY", help="better in the environment")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="for machines, as /status says it")] = False,
    lang: Annotated[str | None, typer.Option(help="en or zh; the locale's otherwise")] = None,
) -> None:
    """Say how the replicas of a running server are. Exit code 0: well; 1: not all; 2: no answer."""
    import time

    from cluster.languages import language_of
    from cluster.status_command import ask
    from cluster.status_report import show
    from cluster.terminal import output, print_json

    language = language_of(lang, os.environ)
    found = ask(url, api_key)
    if json:
        print_json(found.document)
    else:
        show(found, output(), language, now_s=time.time())
    raise typer.Exit(0 if found.is_well else 1)


@app.command("demo-model")
def demo_model(folder: Annotated[Path, typer.Argument(help="where to write it")]) -> None:
    """Write the demo model: tiny, from a seed, no download."""
    from cluster.demo_model import build_demo_model

    build_demo_model(folder)
    _say(f"the demo model is in {folder}")


def _say(line: str) -> None:
    console.print(f"[bold]ballast[/bold] {escape(line)}", soft_wrap=True)


def main() -> None:
    """Errors of the user are one line; anything else is a bug and keeps its traceback."""
    try:
        sys.exit(app(standalone_mode=False))
    except (BallastError, typer.TyperException) as error:
        said = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        if said:  # without a command the help has been shown
            print_error(said)
        sys.exit(2)
    except typer.Abort:
        sys.exit(130)


if __name__ == "__main__":
    main()
