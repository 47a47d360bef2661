"""`fedgan doctor`: is this machine ready, and how long will a scenario take on it?"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import socket
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fedgan.cli import console, probe
from fedgan.cli.runs import Overrides, shipped_scenario
from fedgan.config import Settings, load_scenario
from fedgan.errors import FedganError, MachineError
from fedgan.machine import share_cores, usable_cores

# distribution → module; what `pip install -e .` brings
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
LEAST_DISK = GIB
LEAST_MEMORY = 2 * GIB
FLOWER_PORT = 39091  # where `flwr run .` looks for a local SuperLink


@dataclass(frozen=True)
class Check:
    """One line of the doctor's answer."""

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
            help="A folder of fedgan keys, or a hospital's part. [default: keys, if there]",
        ),
    ] = None,
    as_json: console.Json = False,
) -> None:
    """Check this machine, and tell how long a scenario takes on it.

    Python, packages, processor, memory, GPU, disk, ports, keys and certificates, and five seconds of training.
    Exit code 7 when something is missing.
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
    ]
    result: dict[str, Any] = {"scenario": settings.name}
    if not any(check.status == "failed" for check in checks):
        console.note(f"training for five seconds as {settings.name} would ...")
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
    if sys.version_info < (3, 11):  # noqa: UP036 - the doctor is there for machines that are not as they should be
        return Check(
            "Python",
            "failed",
            platform.python_version(),
            "install Python 3.11 or newer and make the .venv anew",
        )
    return Check(
        "Python", "ok", f"{platform.python_version()} at {console.shown(Path(sys.prefix))}"
    )


def package_checks() -> list[Check]:
    """Every package with its version, each imported once, because a package can be there and not work."""
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
            again = f"pip install --force-reinstall {'torch torchvision' if module.startswith('torch') else distribution}"
            checks.append(
                Check(
                    distribution, "failed", f"{version}, but it cannot be imported: {reason}", again
                )
            )
        else:
            checks.append(Check(distribution, "ok", version))
    return checks


def cpu_check() -> Check:
    """Cores that this process may use, and the vector instructions of training."""
    import torch

    flags = _cpu_flags()
    native = bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
    bf16 = "bf16 native" if native else "bf16 not native"
    return Check(
        "CPU",
        "ok",
        f"{usable_cores()} cores, {torch.backends.cpu.get_cpu_capability()}, {bf16 if flags else 'bf16 unknown'}",
    )


def memory_check() -> Check:
    """Memory that is free now."""
    free = _free_memory()
    if free is None:
        return Check("memory", "ok", "unknown on this system")
    status: Literal["ok", "failed"] = "ok" if free >= LEAST_MEMORY else "failed"
    return Check(
        "memory",
        status,
        f"{free / GIB:.1f} GiB free",
        "" if status == "ok" else "close other programs: 2 GiB are needed",
    )


def gpu_check(settings: Settings) -> Check:
    """The GPU, where there is one; it fails only where the scenario asks for one."""
    import torch

    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        return Check(
            "GPU",
            "ok",
            f"{card.name}, {card.total_memory / GIB:.0f} GiB, {torch.cuda.device_count()} in all",
        )
    if settings.training.device == "cuda":
        return Check(
            "GPU", "failed", "none", "the scenario asks for one: --set training.device=auto"
        )
    return Check("GPU", "ok", "none; training runs on the CPU")


def disk_check(place: Path) -> Check:
    """Free space where runs are written."""
    free = shutil.disk_usage(place).free
    if not os.access(place, os.W_OK):
        return Check(
            "disk",
            "failed",
            "this folder cannot be written",
            "run in another folder, or give --output",
        )
    if free < LEAST_DISK:
        return Check(
            "disk",
            "failed",
            f"{free / GIB:.1f} GiB free",
            "free some space: a run needs about 1 GiB",
        )
    return Check("disk", "ok", f"{free / GIB:.1f} GiB free")


def port_checks() -> list[Check]:
    """Loopback ports: Ray needs some free ones; the port of `flwr run .` may be taken."""
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
                "Flower's simulation needs them: allow it in the firewall or sandbox",
            )
        )
    with socket.socket() as knock:
        knock.settimeout(0.5)
        taken = knock.connect_ex(("127.0.0.1", FLOWER_PORT)) == 0
    if taken:
        mend = "`flwr run .` would talk to that program: stop it, or set FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"
        checks.append(Check(f"port {FLOWER_PORT}", "warning", "taken", mend))
    return checks


def key_checks(folder: Path | None) -> list[Check]:
    """Certificates' days and what is wrong with a folder of keys; nothing where none is named and ./keys is none."""
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
    return [
        *(
            []
            if any(problem.grave for problem in inspection.problems)
            else [Check("keys", "ok", inspection.found)]
        ),
        *problems,
    ]


def training_check(settings: Settings) -> tuple[Check, dict[str, Any] | None]:
    """Train for five seconds as the scenario would, and forecast its time. Errors become a failed check."""
    try:
        looks = _images_of(settings)
        threads, slots = share_cores(settings.federation.threads, settings.federation.participants)
        measured = probe.measure(
            settings, looks.channels, looks.labels, looks.exclusive, slots, threads
        )
    except FedganError as error:
        return Check("training", "failed", str(error)), None
    seconds = probe.predict(settings, measured, looks.sizes, slots)
    found = (
        f"{measured.images_per_second:.0f} images/s a hospital on {measured.device}, {slots} at once, "
        f"{measured.memory / 2**20:.0f} MiB each\n{'':24}{settings.name} takes about {_minutes(seconds['all'])}: training "
        f"{_minutes(seconds['training'])}, evaluation {_minutes(seconds['evaluation'])}, start {seconds['start']:.0f} s"
    )
    return Check("training", "ok", found), {
        **asdict(measured),
        "at_once": slots,
        "seconds": seconds,
    }


@dataclass(frozen=True)
class Looks:
    """What the scenario's images are like, and how many training images each hospital has, largest first."""

    channels: int
    labels: int
    exclusive: bool
    sizes: tuple[int, ...]


def _images_of(settings: Settings) -> Looks:
    if settings.data.root:
        from fedgan.data.federation import open_hospitals

        hospitals = open_hospitals(settings)
        first = hospitals[0].train
        return Looks(
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
    return Looks(
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
    """Bytes of memory that can still be had: the system's, or what is left of a container's limit."""
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


def _minutes(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
