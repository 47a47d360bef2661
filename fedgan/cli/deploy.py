"""`fedgan deploy`: submit a scenario to deployed hospitals; watch, stop or resume its run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer

import fedgan.errors
from fedgan import events
from fedgan.cli import console
from fedgan.cli.approve import APP, bundle_hash
from fedgan.cli.runs import REPOSITORY, Overrides, folder_name
from fedgan.config import load_scenario, to_dict
from fedgan.errors import ConfigError, FederationError, FedganError, MachineError

if TYPE_CHECKING:
    from server.operator.superlink import Run, SuperLink

RUNS = "/runs"  # the run folders in the ServerApp's container
RunConfig = Mapping[str, str | bool]

app = typer.Typer(
    help="Run a scenario on deployed hospitals; watch, stop or resume it.",
    epilog="Example: fedgan deploy run simulations/three_hospitals.toml "
    "--superlink superlink:8000 --ca keys/ca.crt",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Address = Annotated[
    str,
    typer.Option(
        "--superlink",
        metavar="HOST:PORT",
        envvar="FEDGAN_SUPERLINK",
        help="Address of the SuperLink, not of the proxy.",
    ),
]
Authority = Annotated[
    Path,
    typer.Option(
        "--ca",
        metavar="FILE",
        envvar="FEDGAN_CA",
        help="Certificate of the authority that signed the SuperLink's.",
    ),
]
Wait = Annotated[
    float,
    typer.Option("--wait", metavar="SECONDS", min=0, help="Time for the SuperLink to start."),
]
Output = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        metavar="RUN",
        help="Run folder on the server's disk, absolute. [default: /runs/NAME]",
    ),
]
Detach = Annotated[
    bool, typer.Option("--detach", help="Return when the SuperLink has accepted the run.")
]
Number = Annotated[
    int | None,
    typer.Argument(
        metavar="[NUMBER]", help="Number of the run at the SuperLink. [default: the newest]"
    ),
]
LOCAL, CA = "localhost:8000", Path("keys/ca.crt")


@app.command(
    epilog="Example: fedgan deploy run simulations/three_hospitals.toml --set training.kimg=10 "
    "--output /runs/short\n\n"
    "Example: fedgan deploy run study.toml --detach --json",
)
def run(
    scenario: Annotated[
        Path,
        typer.Argument(
            metavar="SCENARIO.toml", help="Scenario, e.g. simulations/three_hospitals.toml."
        ),
    ],
    overrides: Overrides = None,
    output: Output = None,
    superlink: Address = LOCAL,
    ca: Authority = CA,
    wait: Wait = 15.0,
    detach: Detach = False,
    as_json: console.Json = False,
) -> None:
    """Submit a scenario and show its rounds.

    Returns the run's exit code. The scenario is read on this machine; its paths are on the server's
    disk. A run folder with the same settings is continued.
    """
    settings = load_scenario(scenario, overrides or [])
    from fedgan.runs.compatibility import check_deployable

    check_deployable(settings)
    folder = _absolute(output or f"{RUNS}/{folder_name(settings.name)}")
    config: RunConfig = {
        "settings": json.dumps(to_dict(settings)),
        "output": folder,
        "deployed": True,
    }
    with _connected(superlink, ca, wait) as link:
        console.note(
            f"{settings.name}: {settings.training.kimg:g} kimg in "
            f"{settings.federation.rounds} rounds → {folder}"
        )
        _submit(link, config, detach, as_json)


@app.command(epilog="Example: fedgan deploy resume /runs/short")
def resume(
    run_path: Annotated[
        str, typer.Argument(metavar="RUN", help="Run folder on the server's disk, absolute.")
    ],
    superlink: Address = LOCAL,
    ca: Authority = CA,
    wait: Wait = 15.0,
    detach: Detach = False,
    as_json: console.Json = False,
) -> None:
    """Continue a stopped or failed run from its last complete round."""
    config: RunConfig = {
        "scenario": "",
        "settings": "",
        "output": _absolute(run_path),
        "deployed": True,
    }
    with _connected(superlink, ca, wait) as link:
        _submit(link, config, detach, as_json)


@app.command(epilog="Example: fedgan deploy status\n\nExample: fedgan deploy status --json")
def status(
    number: Number = None,
    superlink: Address = LOCAL,
    ca: Authority = CA,
    wait: Wait = 15.0,
    as_json: console.Json = False,
) -> None:
    """Show the registered hospitals, and the runs or one run."""
    with _connected(superlink, ca, wait) as link:
        nodes, runs = link.nodes(), link.runs() if number is None else [link.run(number)]
    lines = ["no hospital is registered: fedgan deploy register"]
    if nodes:
        rows = [(node.name, node.status) for node in nodes]
        lines = console.table_lines([("hospital", "status"), *rows])
    table = [("run", "status", "since", "folder")]
    table += [(str(run.number), run.text, run.submitted, run.output) for run in runs]
    lines += ["", *console.table_lines(table)]
    lines += [f"{run.number}: {run.details}" for run in runs if run.details]
    result = {
        "hospitals": [{"name": node.name, "status": node.status} for node in nodes],
        "runs": [_summary(run) for run in runs],
    }
    console.emit(result, as_json, "\n".join(lines))


@app.command(
    epilog="Example: fedgan deploy logs\n\nExample: fedgan deploy logs --json | grep round_end"
)
def logs(
    number: Number = None,
    superlink: Address = LOCAL,
    ca: Authority = CA,
    wait: Wait = 15.0,
    as_json: console.Json = False,
) -> None:
    """Show a run's log until the run ends.

    Returns the run's exit code. With --json one event per line.
    """
    from fedgan.cli.progress import Progress

    progress = Progress(is_quiet=True)

    def show(line: str, event: events.Event | None) -> None:
        if as_json and event:
            typer.echo(events.as_line(event))
        elif not as_json and (text := progress.as_text(event) if event else line):
            typer.echo(console.escaped(click.unstyle(text)))  # Flower colours its lines

    with _connected(superlink, ca, wait) as link:
        run, last_event = _follow(link, _find_run(link, number).number, show, console.note)
    _raise_failure(run, last_event)


@app.command(epilog="Example: fedgan deploy stop")
def stop(
    number: Number = None,
    superlink: Address = LOCAL,
    ca: Authority = CA,
    wait: Wait = 15.0,
    as_json: console.Json = False,
) -> None:
    """Stop a run; its complete rounds are kept."""
    with _connected(superlink, ca, wait) as link:
        run = _find_run(link, number)
        if run.is_over:
            raise ConfigError(f"run {run.number} has already ended ({run.text})")
        link.stop(run.number)
        run = link.run(run.number)
    advice = f"; continue with: fedgan deploy resume {run.output}" if run.output else ""
    console.emit(_summary(run), as_json, f"run {run.number} is {run.text}{advice}")


@app.command(epilog="Example: fedgan deploy register --keys keys --superlink superlink:8000")
def register(
    keys: Annotated[
        Path, typer.Option("--keys", metavar="DIR", help="The folder of `fedgan keys`.")
    ] = Path("keys"),
    superlink: Address = LOCAL,
    wait: Wait = 15.0,
    as_json: console.Json = False,
) -> None:
    """Register new keys at the SuperLink and unregister revoked keys."""
    from fedgan.deployment.key_folder import KeyFolder

    with _repository():
        from server.operator.register import register as register_keys
    lines = register_keys(KeyFolder.open(keys), superlink, wait)
    console.emit(
        {"changes": lines},
        as_json,
        "\n".join(lines) or "the SuperLink matches the list: nothing to do",
    )


# --- shared by the commands ---


def _submit(link: SuperLink, config: RunConfig, detach: bool, as_json: bool) -> None:
    """Submit a run and, unless `detach`, show its progress until it ends."""
    online = [node.name for node in link.nodes() if node.status == "online"]
    console.note(f"hospitals online: {', '.join(online) or 'none yet'}")
    try:
        number = link.submit(config)
    except KeyboardInterrupt:
        raise console.Interrupted(
            "stopped during the submission; fedgan deploy status shows whether the SuperLink "
            "accepted the run"
        ) from None
    console.note(f"code of this run, for fedgan approve: {bundle_hash(APP)}")
    console.note(
        f"run {number}; log: fedgan deploy logs {number}; stop: fedgan deploy stop {number}"
    )
    if detach:
        console.emit({"run": number, "output": config["output"]}, as_json, str(number))
        return
    from fedgan.cli.progress import Progress

    with Progress() as progress:

        def show(line: str, event: events.Event | None) -> None:
            if event:
                progress.on_event(event)

        def show_note(text: str) -> None:
            progress.on_event({"event": "note", "text": text})

        run, last_event = _follow(link, number, show, show_note)
    _raise_failure(run, last_event)
    report = last_event.get("report") or ""
    lines = [
        f"run {number} is complete; on the server's disk:",
        f"run         {run.output}",
        *([f"report      {report}"] if report else []),
    ]
    console.emit(_summary(run) | {"report": report}, as_json, "\n".join(lines))


def _follow(
    link: SuperLink,
    number: int,
    show: Callable[[str, events.Event | None], None],
    on_loss: Callable[[str], None],
) -> tuple[Run, events.Event]:
    """Show each line of a run's log, with its event, until the run ends; Ctrl-C does not stop it.

    Returns the run and its last event "finished" or "failed", or an empty one.
    """
    from server.operator.follow import follow

    last_event = events.Event()

    def on_line(line: str) -> None:
        event = events.from_line(line)
        if event and event["event"] in ("finished", "failed"):
            last_event.update(event)
        show(line, event)

    try:
        return follow(link, number, on_line, on_loss), last_event
    except KeyboardInterrupt:
        raise console.Interrupted(
            f"run {number} continues without this command; "
            f"log: fedgan deploy logs {number}; stop: fedgan deploy stop {number}"
        ) from None


def _raise_failure(run: Run, last_event: events.Event) -> None:
    """Raise the error of an incomplete run, with the exit code of the ServerApp's error."""
    if run.is_complete:
        return
    log = f"see: fedgan deploy logs {run.number}"
    advice = f"{log}; continue with: fedgan deploy resume {run.output}" if run.output else log
    if run.sub_status == "stopped":
        raise FederationError(f"run {run.number} was stopped\n{advice}")
    if last_event.get("event") != "failed":
        reason = run.details or "the ServerApp gave no reason"
        raise FederationError(f"run {run.number} is {run.text}: {reason}\n{advice}")
    name = str(last_event.get("kind"))
    message = (str(last_event.get("message")).strip().splitlines() or ["no message"])[0]
    kind = getattr(fedgan.errors, name, None)
    if isinstance(kind, type) and issubclass(kind, FedganError):
        needs_fix = issubclass(kind, ConfigError | MachineError)  # resuming would fail again
        raise kind(f"{message}\n{log if needs_fix else advice}")
    raise FederationError(f"the ServerApp failed with {name}: {message}\n{advice}")


def _find_run(link: SuperLink, number: int | None) -> Run:
    """The run with this number, or the newest. Raises `ConfigError` where there is no run."""
    if number is not None:
        return link.run(number)
    runs = link.runs()
    if not runs:
        raise ConfigError(
            f"the SuperLink at {link.address} has no run: "
            "start one with fedgan deploy run SCENARIO.toml"
        )
    return runs[0]


def _absolute(output: str) -> str:
    """Return `output`. Raises `ConfigError` for a relative path."""
    if not output.startswith("/"):
        raise ConfigError(
            f"'{output}' is no absolute path on the server's disk: "
            f"write e.g. {RUNS}/{folder_name(output)}"
        )
    return output


def _summary(run: Run) -> dict[str, Any]:
    """A run as JSON, without its settings."""
    row = dataclasses.asdict(dataclasses.replace(run, config={}))
    return {key: value for key, value in row.items() if key != "config"} | {"output": run.output}


@contextlib.contextmanager
def _repository() -> Iterator[None]:
    """Imports that need the repository. Raises `MachineError` where only the wheel is installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "server":
            raise  # a missing package such as flwr has its own message
        raise MachineError(REPOSITORY) from None


@contextlib.contextmanager
def _connected(address: str, authority: Path, seconds: float) -> Iterator[SuperLink]:
    """A healthy SuperLink."""
    with _repository():
        from server.operator.superlink import connected
    with connected(address, authority, seconds) as link:
        yield link
