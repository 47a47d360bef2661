"""`fedgan doctor`: check this machine and forecast the time of a scenario."""

from __future__ import annotations

import importlib
import importlib.metadata
import math
import os
import platform
import shutil
import socket
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from click import ClickException

from fedgan.cli import console, probe
from fedgan.cli.runs import Overrides, shipped_scenario
from fedgan.config import Settings, load_scenario
from fedgan.errors import FedganError, MachineError
from fedgan.machine import share_cores, usable_cores

# distribution → module, of `pip install -e .`
PACKAGES = {
    "flwr": "flwr",
    "ray": "ray",
    "torch": "torch",
    "torchvision": "torchvision",
    "numpy": "numpy",
    "scipy": "scipy",
    "pillow": "PIL",
    "safetensors": "safetensors",
    "jinja2": "jinja2",
    "tomli-w": "tomli_w",
    "typer": "typer",
    "rich": "rich",
    "cryptography": "cryptography",
}
GIB = 2**30
MIN_DISK = GIB
MIN_MEMORY = 2 * GIB
PIECE, MAX_BODY = 5 * 2**20, 6 * 2**20  # Flower's pieces of an array; the proxy's default
FLOWER_PORT = 39091  # where `flwr run .` looks for a local SuperLink


@dataclass(frozen=True)
class Check:
    """Result of one check: `found`, and how to fix a problem."""

    name: str
    status: Literal["ok", "warning", "failed"]
    found: str
    fix: str = ""


def doctor(
    scenario: Annotated[
        Path | None,
        typer.Argument(
            metavar="[SCENARIO.toml]", help="Default: simulations/three_hospitals.toml."
        ),
    ] = None,
    overrides: Overrides = None,
    keys: Annotated[
        Path | None,
        typer.Option(
            "--keys",
            metavar="DIR",
            help="A key folder, or a hospital's part of it. [default: keys, if it exists]",
        ),
    ] = None,
    node_config: Annotated[
        str,
        typer.Option(
            "--node-config",
            envvar="HOSPITAL_CONFIG",
            metavar="TEXT",
            help="Show the limits in a hospital's node-config, e.g. 'max-epsilon=4.0'.",
        ),
    ] = "",
    as_json: console.Json = False,
) -> None:
    """Check this machine and forecast a scenario's time.

    Checks Python, packages, CPU, memory, GPU, disk, ports, keys and certificates, and trains for
    five seconds. Exit code 7 when a check fails.
    """
    path = scenario or shipped_scenario("three_hospitals")
    settings = load_scenario(path, overrides or []) if path else Settings()
    checks = [
        python_check(),
        *package_checks(),
        cpu_check(),
        memory_check(),
        gpu_check(settings),
        disk_check(Path.cwd()),
        *port_checks(),
        *key_checks(keys),
        *policy_checks(node_config),
    ]
    result: dict[str, Any] = {"scenario": settings.name}
    if not any(check.status == "failed" for check in checks):
        console.note(f"training for five seconds with the settings of {settings.name} ...")
        outcome, forecast = training_check(settings)
        checks.append(outcome)
        result["forecast"] = forecast
    failed = any(check.status == "failed" for check in checks)
    result |= {"ready": not failed, "checks": [asdict(check) for check in checks]}
    console.emit(result, as_json, "\n".join(_line(check) for check in checks))
    if failed:
        raise typer.Exit(MachineError.exit_code)


def python_check() -> Check:
    """Python 3.11 or newer."""
    if sys.version_info < (3, 11):  # noqa: UP036 - a machine may have an older Python
        return Check(
            "Python",
            "failed",
            platform.python_version(),
            "install Python 3.11 or newer and create the .venv again",
        )
    return Check(
        "Python", "ok", f"{platform.python_version()} at {console.shown(Path(sys.prefix))}"
    )


def package_checks() -> list[Check]:
    """Version of every package; each is imported, because an installed package can be broken."""
    checks = []
    for distribution, module in PACKAGES.items():
        fix = "pip install -e . in the repository"
        try:
            version = importlib.metadata.version(distribution)
            importlib.import_module(module)
        except (importlib.metadata.PackageNotFoundError, ModuleNotFoundError):
            checks.append(Check(distribution, "failed", "missing", fix))
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            found = f"{version}, but it cannot be imported: {reason}"
            packages = "torch torchvision" if module.startswith("torch") else distribution
            fix = f"pip install --force-reinstall {packages}"
            checks.append(Check(distribution, "failed", found, fix))
        else:
            checks.append(Check(distribution, "ok", version))
    return checks


def cpu_check() -> Check:
    """Usable cores and vector instructions."""
    import torch

    flags = _cpu_flags()
    is_native = bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
    bf16 = ("bf16 native" if is_native else "bf16 not native") if flags else "bf16 unknown"
    capability = torch.backends.cpu.get_cpu_capability()
    return Check("CPU", "ok", f"{usable_cores()} cores, {capability}, {bf16}")


def memory_check() -> Check:
    """Free memory."""
    free = _free_memory()
    if free is None:
        return Check("memory", "ok", "unknown on this system")
    found = f"{free / GIB:.1f} GiB free"
    if free < MIN_MEMORY:
        return Check("memory", "failed", found, "close other programs: 2 GiB are needed")
    return Check("memory", "ok", found)


def gpu_check(settings: Settings) -> Check:
    """The GPU; a missing one fails only where the scenario requires it."""
    import torch

    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        return Check(
            "GPU",
            "ok",
            f"{card.name}, {card.total_memory / GIB:.0f} GiB, {torch.cuda.device_count()} in total",
        )
    if settings.training.device == "cuda":
        return Check(
            "GPU", "failed", "none", "the scenario requires one: --set training.device=auto"
        )
    return Check("GPU", "ok", "none; training runs on the CPU")


def disk_check(folder: Path) -> Check:
    """Free space in the folder of the runs."""
    free = shutil.disk_usage(folder).free
    if not os.access(folder, os.W_OK):
        return Check(
            "disk",
            "failed",
            "this folder cannot be written",
            "run in another folder, or give --output",
        )
    found = f"{free / GIB:.1f} GiB free"
    if free < MIN_DISK:
        return Check("disk", "failed", found, "free some space: a run needs about 1 GiB")
    return Check("disk", "ok", found)


def port_checks() -> list[Check]:
    """Loopback ports: Ray needs free ones, and `flwr run .` one that no other program uses."""
    checks = []
    try:
        with socket.create_server(("127.0.0.1", 0)):
            checks.append(Check("loopback", "ok", "ports on 127.0.0.1 can be opened"))
    except OSError as error:
        found = f"no port on 127.0.0.1 can be opened: {error.strerror}"
        checks.append(
            Check(
                "loopback",
                "failed",
                found,
                "Flower's simulation needs them: allow them in the firewall or sandbox",
            )
        )
    with socket.socket() as client:
        client.settimeout(0.5)
        is_in_use = client.connect_ex(("127.0.0.1", FLOWER_PORT)) == 0
    if is_in_use:
        fix = (
            "`flwr run .` would connect to that program: stop it, or set "
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"
        )
        checks.append(Check(f"port {FLOWER_PORT}", "warning", "in use", fix))
    return checks


def key_checks(folder: Path | None) -> list[Check]:
    """Days left and problems of a key folder; empty without `folder` and without ./keys."""
    from fedgan.deployment import certificates, key_inspection

    if folder is None and not key_inspection.has_keys(Path("keys")):
        return []
    try:
        inspection = key_inspection.inspect(folder or Path("keys"), certificates.now())
    except FedganError as error:
        return [Check("keys", "failed", str(error))]
    problems = [
        Check("keys", "failed" if problem.grave else "warning", problem.found, problem.fix)
        for problem in inspection.problems
    ]
    if any(problem.grave for problem in inspection.problems):
        return problems
    return [Check("keys", "ok", inspection.found), *problems]


def policy_checks(node_config: str) -> list[Check]:
    """A hospital's own limits, as its SuperNode would read them; empty without a node-config."""
    if not node_config.strip():
        return []
    try:
        from flwr.common.config import parse_config_args

        from client.policy import POLICY, read_policy, shown

        limits = read_policy(parse_config_args([node_config]))
    except ModuleNotFoundError as error:
        fix = "run it in a clone of the repository, after pip install -e ."
        return [Check("policy", "failed", f"unknown: no module {error.name}", fix)]
    except (FedganError, ValueError, ClickException) as error:
        return [Check("policy", "failed", str(error))]
    others = f"no limit by {', '.join(key.name for key in POLICY if key.name not in limits)}"
    fix = "see the node-config in docs/guides/deploy.md"
    if not limits:
        return [Check("policy", "warning", others, fix)]
    found = ", ".join(f"{name} = {shown(value)}" for name, value in limits.items())
    return [Check("policy", "ok", f"{found}; {others}")]


def training_check(settings: Settings) -> tuple[Check, dict[str, Any] | None]:
    """Train for five seconds with the scenario's settings, and forecast its time.

    An error is a failed check.
    """
    try:
        data = _describe_data(settings)
        threads, parallel = share_cores(
            settings.federation.threads, settings.federation.participants
        )
        measured = probe.measure(
            settings, data.channels, data.labels, data.exclusive, parallel, threads
        )
    except FedganError as error:
        return Check("training", "failed", str(error)), None
    seconds = probe.predict(settings, measured, data.sizes, parallel)
    times = {name: _duration(value) for name, value in seconds.items()}
    found = (
        f"{measured.images_per_second:.0f} images/s per hospital on {measured.device}, "
        f"{parallel} in parallel, {measured.memory / 2**20:.0f} MiB each\n{'':24}"
        f"{settings.name} takes about {times['total']}: training {times['training']}, "
        f"evaluation {times['evaluation']}, start {times['start']}\n{'':24}"
        f"an update has {measured.update_bytes / 1e6:.1f} MB; for the proxy of a deployment "
        f"FEDGAN_PROXY_MAX_MINUTE={proxy_bytes_per_minute(measured.update_bytes)}"
    )
    forecast = {**asdict(measured), "parallel": parallel, "seconds": seconds}
    return Check("training", "ok", found), forecast


def proxy_bytes_per_minute(update_bytes: int) -> int:
    """Bytes that the proxy should let a hospital send per minute: four updates.

    It counts each body as the largest one; an update has one more than its pieces.
    """
    return 4 * (math.ceil(update_bytes / PIECE) + 1) * MAX_BODY


@dataclass(frozen=True)
class DataShape:
    """Shape of a scenario's images and labels, and training images per hospital."""

    channels: int
    labels: int
    exclusive: bool
    sizes: tuple[int, ...]


def _describe_data(settings: Settings) -> DataShape:
    if settings.data.root:
        from fedgan.data.federation import open_hospitals

        hospitals = open_hospitals(settings)
        first = hospitals[0].train
        return DataShape(
            first.channels,
            first.label_dim,
            first.exclusive,
            tuple(len(hospital.train) for hospital in hospitals),
        )
    from fedgan.data.phantoms import CHEST_LABELS, LESION_LABELS
    from fedgan.data.phantoms.writer import hospital_sizes

    lesions = settings.data.phantoms == "lesions"
    sizes = hospital_sizes(settings.data.phantom_images, settings.federation.hospitals)
    train = tuple(round(0.7 * size) for size in sizes)
    return DataShape(
        3 if lesions else 1, len(LESION_LABELS if lesions else CHEST_LABELS), lesions, train
    )


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next(
        (
            set(line.split(":", 1)[1].split())
            for line in lines
            if line.lower().startswith(("flags", "features"))
        ),
        set(),
    )


def _free_memory() -> int | None:
    """Free memory in bytes, of the system or of the container's limit; None where unknown."""
    try:
        rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        free = min(free, limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return free


def _line(check: Check) -> str:
    mark = {"ok": "ok     ", "warning": "warning", "failed": "FAILED "}[check.status]
    return f"{mark}  {check.name:<13} {check.found}" + (
        f"\n                        → {check.fix}" if check.fix else ""
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
