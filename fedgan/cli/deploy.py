"""`fedgan deploy`: hand a scenario to a federation that runs, and watch, stop or go on with what becomes of it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fedgan.errors
from fedgan import events
from fedgan.cli import console
from fedgan.cli.runs import REPOSITORY, Overrides, folder_name
from fedgan.config import load_scenario, to_dict
from fedgan.errors import ConfigError, FederationError, FedganError, MachineError

if TYPE_CHECKING:
    from server.operator.superlink import Run, SuperLink

RUNS = "/runs"  # where the ServerApp's container keeps run folders

app = typer.Typer(
    help="Run a scenario on a federation of hospitals that are elsewhere, and watch, stop or continue it.",
    epilog="Example: fedgan deploy run simulations/three_hospitals.toml --superlink superlink:8000 --ca keys/ca.crt",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Address = Annotated[
    str,
    typer.Option(
        "--superlink",
        metavar="HOST:PORT",
        envvar="FEDGAN_SUPERLINK",
        help="The SuperLink's own address.",
    ),
]
Authority = Annotated[
    Path,
    typer.Option(
        "--ca",
        metavar="FILE",
        envvar="FEDGAN_CA",
        help="The certificate that the SuperLink is known by.",
    ),
]
Wait = Annotated[
    float,
    typer.Option(
        "--wait",
        metavar="SECONDS",
        min=0,
        help="How long a SuperLink may take that is being started.",
    ),
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
    bool, typer.Option("--detach", help="Come back as soon as the SuperLink has the run.")
]
Number = Annotated[
    int | None,
    typer.Argument(
        metavar="[NUMBER]", help="A run as the SuperLink numbers it. [default: the newest]"
    ),
]
LOCAL, CA = "localhost:8000", Path("keys/ca.crt")


@app.command(
    epilog="Example: fedgan deploy run simulations/three_hospitals.toml --set training.kimg=10 --output /runs/short\n\n"
    "Example: fedgan deploy run study.toml --detach --json",
)
def run(
    scenario: Annotated[
        Path,
        typer.Argument(metavar="SCENARIO.toml", help="The study, as `fedgan simulate` takes it."),
    ],
    overrides: Overrides = None,
    output: Output = None,
    superlink: Address = LOCAL,
    ca: Authority = CA,
    wait: Wait = 15.0,
    detach: Detach = False,
    as_json: console.Json = False,
) -> None:
    """Submit a scenario, show its rounds, and end with the exit status that the run has.

    The scenario is read here; folders that it names are the server's. A folder that holds this very run is gone on with.
    """
    settings = load_scenario(scenario, overrides or [])
    from fedgan.runs.compatibility import check_deployable

    check_deployable(settings)
    place = _absolute(output or f"{RUNS}/{folder_name(settings.name)}")
    config: dict[str, str | bool] = {
        "settings": json.dumps(to_dict(settings)),
        "output": place,
        "deployed": True,
    }
    with _connected(superlink, ca, wait) as link:
        console.note(
            f"{settings.name}: {settings.training.kimg:g} kimg in {settings.federation.rounds} rounds → {place}"
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
    """Continue a deployed run that was stopped or has failed, from its last whole round."""
    config: dict[str, str | bool] = {
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
    """Show the hospitals and the runs that the SuperLink knows."""
    with _connected(superlink, ca, wait) as link:
        nodes, runs = link.nodes(), link.runs() if number is None else [link.run(number)]
    hospitals = _columns([("hospital", "is")] + [(node.name, node.status) for node in nodes])
    lines = hospitals if nodes else ["no hospital is registered: fedgan deploy register"]
    lines += [
        "",
        *_columns(
            [("run", "is", "since", "folder")]
            + [(str(r.number), r.text, r.submitted, r.output) for r in runs]
        ),
    ]
    lines += [f"{row.number}: {row.details}" for row in runs if row.details]
    told = {
        "hospitals": [{"name": node.name, "status": node.status} for node in nodes],
        "runs": list(map(_told, runs)),
    }
    console.emit(told, as_json, "\n".join(lines))


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
    """Show a run's log from its beginning to the run's end, and end with its exit status; --json: its events, a line each."""
    from fedgan.cli.progress import Progress

    progress, ending = Progress(is_quiet=True), dict[str, Any]()

    def show(line: str) -> None:
        event = events.from_line(line)
        if event and event["event"] in ("finished", "failed"):
            ending.update(event)
        if as_json and event:
            typer.echo(events.as_line(event))
        elif not as_json and (text := progress.as_text(event) if event else line):
            typer.echo(text)

    with _connected(superlink, ca, wait) as link:
        which = _chosen(link, number).number
        from server.operator.follow import follow

        with _left_alone(which):
            found = follow(link, which, show, console.note)
    _check(found, ending)


@app.command(epilog="Example: fedgan deploy stop")
def stop(
    number: Number = None,
    superlink: Address = LOCAL,
    ca: Authority = CA,
    wait: Wait = 15.0,
    as_json: console.Json = False,
) -> None:
    """Stop a run; whole rounds are kept."""
    with _connected(superlink, ca, wait) as link:
        chosen = _chosen(link, number)
        if chosen.over:
            raise ConfigError(
                f"run {chosen.number} is over ({chosen.text}): there is nothing to stop"
            )
        link.stop(chosen.number)
        after = link.run(chosen.number)
    advice = f"; go on with: fedgan deploy resume {after.output}" if after.output else ""
    console.emit(_told(after), as_json, f"run {after.number} is {after.text}{advice}")


@app.command(epilog="Example: fedgan deploy register --keys keys --superlink superlink:8000")
def register(
    keys: Annotated[
        Path, typer.Option("--keys", metavar="DIR", help="The folder that `fedgan keys` made.")
    ] = Path("keys"),
    superlink: Address = LOCAL,
    wait: Wait = 15.0,
    as_json: console.Json = False,
) -> None:
    """Take the list of keys to the SuperLink: let in who is new, let go who is revoked."""
    from fedgan.deployment.key_folder import KeyFolder

    with _repository():
        from server.operator.register import register as agree
    lines = agree(KeyFolder.open(keys), superlink, wait)
    console.emit(
        {"changes": lines},
        as_json,
        "\n".join(lines) or "the SuperLink matches the list: nothing to do",
    )


# --- what the verbs share ------------------------------------------------------------------------


def _submit(link: SuperLink, config: Mapping[str, str | bool], detach: bool, as_json: bool) -> None:
    """Submit, and unless told to come back at once, follow the run and end as it ends."""
    here = [node.name for node in link.nodes() if node.status == "online"]
    console.note(f"hospitals online: {', '.join(here) or 'none yet'}")
    try:
        number = link.submit(config)
    except KeyboardInterrupt:
        raise console.Interrupted(
            "stopped while the run was being submitted; whether the SuperLink has it: fedgan deploy status"
        ) from None
    console.note(
        f"run {number}; look at it: fedgan deploy logs {number}; stop it: fedgan deploy stop {number}"
    )
    if detach:
        console.emit({"run": number, "output": config["output"]}, as_json, str(number))
        return
    from fedgan.cli.progress import Progress
    from server.operator.follow import follow

    ending = dict[str, Any]()
    with _left_alone(number), Progress() as progress:

        def show(line: str) -> None:
            event = events.from_line(line)
            if event and event["event"] in ("finished", "failed"):
                ending.update(event)
            if event:
                progress.on_event(event)

        found = follow(
            link, number, show, lambda text: progress.on_event({"event": "note", "text": text})
        )
    _check(found, ending)
    page = ending.get("report") or ""
    told = _told(found) | {"report": page}
    where = f"on the server's disk:\nrun         {found.output}" + (
        f"\nreport      {page}" if page else ""
    )
    console.emit(told, as_json, f"run {number} is complete, {where}")


def _check(run: Run, ending: Mapping[str, Any]) -> None:
    """Raise what ended a run, unless it is complete; its exit code is the one that the ServerApp's error has."""
    if run.completed:
        return
    look = f"see: fedgan deploy logs {run.number}"
    advice = f"{look}; go on with: fedgan deploy resume {run.output}" if run.output else look
    if run.sub_status == "stopped":
        raise FederationError(f"run {run.number} was stopped\n{advice}")
    if ending.get("event") != "failed":
        raise FederationError(
            f"run {run.number} is {run.text}: {run.details or 'the ServerApp gave no reason'}\n{advice}"
        )
    name, message = (
        str(ending.get("kind")),
        (str(ending.get("message")).strip().splitlines() or ["no reason given"])[0],
    )
    kind = getattr(fedgan.errors, name, None)
    if isinstance(kind, type) and issubclass(kind, FedganError):
        mended_first = issubclass(
            kind, ConfigError | MachineError
        )  # resuming alone would fail in the same way
        raise kind(f"{message}\n{look if mended_first else advice}")
    raise FederationError(f"the ServerApp failed with {name}: {message}\n{advice}")


def _chosen(link: SuperLink, number: int | None) -> Run:
    """The run of that number, or the newest."""
    if number is not None:
        return link.run(number)
    runs = link.runs()
    if not runs:
        raise ConfigError(
            f"the SuperLink at {link.address} knows no run: begin one with fedgan deploy run SCENARIO.toml"
        )
    return runs[0]


def _absolute(output: str) -> str:
    if not output.startswith("/"):
        raise ConfigError(
            f"'{output}' is no absolute path on the server's disk: write e.g. {RUNS}/{folder_name(output)}"
        )
    return output


def _told(run: Run) -> dict[str, Any]:
    """A run for programs: without what it was submitted with."""
    row = dataclasses.asdict(dataclasses.replace(run, config={}))
    return {key: value for key, value in row.items() if key != "config"} | {"output": run.output}


def _columns(table: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]


@contextlib.contextmanager
def _left_alone(number: int) -> Iterator[None]:
    """Ctrl-C ends this command and not the run; says how to come back."""
    try:
        yield
    except KeyboardInterrupt:
        raise console.Interrupted(
            f"run {number} goes on without this command; look at it: fedgan deploy logs {number}; "
            f"stop it: fedgan deploy stop {number}"
        ) from None


@contextlib.contextmanager
def _repository() -> Iterator[None]:
    """For imports of what only the repository has. Raises `MachineError` in an installed wheel."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "server":
            raise  # a package such as flwr is missing: that has its own message
        raise MachineError(REPOSITORY) from None


@contextlib.contextmanager
def _connected(address: str, authority: Path, seconds: float) -> Iterator[SuperLink]:
    with _repository():
        from server.operator.superlink import connected
    with connected(address, authority, seconds) as link:
        yield link
