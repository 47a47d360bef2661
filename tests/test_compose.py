"""Compose files and Dockerfiles as text: networks, data and keys per service, no root.

No container engine is needed.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
FEDERATION, HOSPITAL = ROOT / "docker-compose.yml", ROOT / "client" / "compose.yml"
SHARED = (ROOT / "server" / "Dockerfile", ROOT / "client" / "Dockerfile")
DOCKERFILES = (*SHARED, ROOT / "deploy" / "Dockerfile")
PERMANENT = {"superlink", "proxy", "serverapp"} | {
    f"{kind}-{n}" for kind in ("supernode", "clientapp") for n in (1, 2, 3)
}
ONCE = {"register", "shards", "run"}


def load(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


@pytest.fixture(scope="module")
def federation() -> dict[str, Any]:
    return load(FEDERATION)


@pytest.fixture(scope="module")
def hospital() -> dict[str, Any]:
    return load(HOSPITAL)


def mounts(service: dict[str, Any]) -> dict[str, tuple[str, bool]]:
    """target → (source, read-only)."""
    found = {}
    for volume in service.get("volumes", []):
        source, target, mode = re.fullmatch(r"(.+?):(/[^:]*)(?::([a-z,]+))?", volume).groups()
        found[target] = (source, "ro" in (mode or "").split(","))
    return found


def networks(service: dict[str, Any]) -> set[str]:
    return set(service.get("networks", ()))


def command_of(service: dict[str, Any]) -> str:
    return " ".join(map(str, service["command"]))


def test_federation_has_a_server_and_two_services_per_hospital(
    federation: dict[str, Any],
) -> None:
    assert set(federation["services"]) == PERMANENT | ONCE


def test_hospitals_and_control_api_share_no_network(federation: dict[str, Any]) -> None:
    services = federation["services"]
    wanted = {name: {"central"} for name in ("superlink", "serverapp", "register", "run")}
    wanted |= {"proxy": {"central", "fleet"}, "shards": set()}
    for n in (1, 2, 3):
        wanted |= {f"supernode-{n}": {"fleet", f"hospital{n}"}, f"clientapp-{n}": {f"hospital{n}"}}
    assert {name: networks(service) for name, service in services.items()} == wanted
    assert services["shards"]["network_mode"] == "none"


def test_only_the_fleet_network_reaches_other_machines(
    federation: dict[str, Any], hospital: dict[str, Any]
) -> None:
    assert {
        name for name, network in federation["networks"].items() if not network.get("internal")
    } == {"fleet"}
    assert {
        name for name, network in hospital["networks"].items() if not network.get("internal")
    } == {"outside"}
    assert networks(hospital["services"]["supernode"]) == {"outside", "hospital"}
    assert networks(hospital["services"]["clientapp"]) == {"hospital"}


def test_only_the_proxy_port_is_published_and_on_localhost(
    federation: dict[str, Any], hospital: dict[str, Any]
) -> None:
    published = {
        name: service["ports"]
        for name, service in federation["services"].items()
        if "ports" in service
    }
    assert published == {"proxy": ["${FEDGAN_LISTEN:-127.0.0.1:8443}:8443"]}
    assert not any("ports" in service for service in hospital["services"].values())


def test_only_the_own_executor_has_a_hospitals_data_read_only(
    federation: dict[str, Any],
) -> None:
    services = federation["services"]
    for n in (1, 2, 3):
        data = f"${{HOSPITAL{n}_DATA:-hospital{n}-data}}"
        seen = mounts(services[f"clientapp-{n}"])
        assert seen == {"/data": (data, True), "/state": (f"hospital{n}-state", False)}
        for name, service in services.items():
            sources = " ".join(source for source, _ in mounts(service).values())
            if name != f"clientapp-{n}":
                assert f"HOSPITAL{n}_DATA" not in sources, name
                assert f"hospital{n}-state" not in sources, name
            if name not in (f"clientapp-{n}", "shards"):
                assert f"hospital{n}-data" not in sources, name


def test_private_keys_are_mounted_only_where_they_are_used(federation: dict[str, Any]) -> None:
    keys = "${FEDGAN_KEYS:-./keys}"
    found = {name: mounts(service).get("/keys") for name, service in federation["services"].items()}
    wanted: dict[str, tuple[str, bool] | None] = dict.fromkeys(federation["services"])
    wanted |= dict.fromkeys(("superlink", "proxy"), (f"{keys}/server", True))
    wanted |= {
        f"supernode-{n}": (f"{keys}/hospitals/${{HOSPITAL{n}:-hospital{n}}}", True)
        for n in (1, 2, 3)
    }
    assert found == wanted
    for name in ("serverapp", "register", "run"):
        assert mounts(federation["services"][name])["/keys/ca.crt"] == (f"{keys}/ca.crt", True)
    assert mounts(federation["services"]["register"]) == {
        "/keys/register": (f"{keys}/register", True),  # no private key: tests/test_keys.py
        "/keys/ca.crt": (f"{keys}/ca.crt", True),
    }


def test_superlink_authenticates_hospitals_by_key_over_tls(federation: dict[str, Any]) -> None:
    command = command_of(federation["services"]["superlink"])
    for option in (
        "--enable-supernode-auth",
        "--isolation=process",
        "--disable-runtime-dependency-installation",
        "--database=/state/",
        "--ssl-keyfile=/keys/server.key",
    ):
        assert option in command
    assert "--insecure" not in command


@pytest.mark.parametrize("path", [FEDERATION, HOSPITAL], ids=["federation", "hospital"])
def test_supernode_uses_tls_and_listens_on_its_hospitals_network_only(
    path: Path,
) -> None:
    services = load(path)["services"]
    for name, service in services.items():
        if not name.startswith("supernode"):
            continue
        command = command_of(service)
        assert "--insecure" not in command
        assert "--root-certificates=/keys/ca.crt" in command
        own = {
            network: options["aliases"]
            for network, options in service["networks"].items()
            if options
        }
        assert "--host=runtime" in command
        assert list(own.values()) == [["runtime"]]
        assert not {"outside", "fleet"} & set(own)
        executor = services[name.replace("supernode", "clientapp")]
        assert "--runtime-api-address=runtime:9094" in executor["command"]


@pytest.mark.parametrize("path", [FEDERATION, HOSPITAL], ids=["federation", "hospital"])
def test_node_configs_have_the_keys_that_a_hospital_reads(path: Path) -> None:
    source = (ROOT / "client" / "hospital.py").read_text(encoding="utf-8")
    read = {
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    numbers = []
    for name, service in load(path)["services"].items():
        if name.startswith("supernode"):
            config = re.sub(r"\s*\$\{\w*CONFIG:-\}", "", service["command"][-1])
            pairs = dict(pair.split("=", 1) for pair in config.split())
            assert set(pairs) == {"partition-id", "data-root", "state-dir"}
            assert set(pairs) <= read
            assert (pairs["data-root"], pairs["state-dir"]) == ('"/data"', '"/state"')
            numbers.append(pairs["partition-id"])
    assert numbers == (["0", "1", "2"] if path == FEDERATION else ["${HOSPITAL_NUMBER:-0}"])


@pytest.mark.parametrize("path", [FEDERATION, HOSPITAL], ids=["federation", "hospital"])
def test_containers_have_no_unneeded_privileges(path: Path) -> None:
    for name, service in load(path)["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not {"privileged", "pid", "ipc", "devices", "user", "cap_add"} & set(service), name
        assert service.get("network_mode", "none") == "none", name


@pytest.mark.parametrize("path", [FEDERATION, HOSPITAL], ids=["federation", "hospital"])
def test_permanent_services_restart_and_none_depends_on_another(path: Path) -> None:
    for name, service in load(path)["services"].items():
        assert service["restart"] == ("no" if name in ONCE else "unless-stopped"), name
        assert "depends_on" not in service, (
            f"{name}: podman-compose starts a service that has ended because another depends on it"
        )


def test_hospital_on_its_own_machine_runs_approved_code_alone(hospital: dict[str, Any]) -> None:
    service = hospital["services"]["clientapp"]
    assert "/app/client/approval.py executor" in command_of(service)
    target = service["environment"]["FEDGAN_APPROVED"]
    assert mounts(service)[target][1], "the list of approved code can be written"
    assert os.access(ROOT / "client" / "approval.py", os.X_OK)


def test_hospital_on_its_own_machine_has_four_required_settings(hospital: dict[str, Any]) -> None:
    text = HOSPITAL.read_text(encoding="utf-8")
    needed = {"FEDGAN_SERVER", "FEDGAN_CA", "FEDGAN_KEY", "FEDGAN_APPROVED"}
    assert set(re.findall(r"\$\{(\w+):\?", text)) == needed
    assert mounts(hospital["services"]["clientapp"])["/data"] == ("${HOSPITAL_DATA:-./data}", True)
    assert not {"/data", "/state"} & set(mounts(hospital["services"]["supernode"]))


@pytest.mark.parametrize(
    ("over", "under"), [("compose.gpu.yml", FEDERATION), ("client/compose.gpu.yml", HOSPITAL)]
)
def test_gpu_files_extend_the_services_that_compute(over: str, under: Path) -> None:
    services, below = load(ROOT / over)["services"], load(under)["services"]
    assert set(services) == {name for name in below if name.startswith(("clientapp", "serverapp"))}
    for service in services.values():
        assert service.get("build", {"args": {"TORCH_INDEX": ""}})["args"]["TORCH_INDEX"] == ""
        assert service["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == [
            "gpu"
        ]
        assert service["image"].endswith("-cuda")  # CPU images are kept


def base_stage(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    return text[text.index("ARG BASE") : text.rindex("\nFROM ")]


def test_server_and_client_images_share_their_base() -> None:
    server, client = map(base_stage, SHARED)
    assert server == client


@pytest.mark.parametrize("path", DOCKERFILES, ids=["server", "client", "deploy"])
def test_images_run_as_an_ordinary_user(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    last = text[text.rindex("\nFROM ") :]
    assert re.findall(r"^USER (.+)$", text, re.M) == ["${UID}:${GID}"]
    assert "ARG UID=1000" in last
    assert 'test "$UID" -gt 0' in last
    assert last.index("USER") > last.rindex("RUN")


@pytest.mark.parametrize("path", SHARED, ids=["server", "client"])
def test_torch_is_for_cpus_by_default(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu" in text


def test_proxy_image_runs_the_tested_configuration(federation: dict[str, Any]) -> None:
    text = DOCKERFILES[2].read_text(encoding="utf-8")
    assert "COPY deploy/haproxy.cfg /etc/haproxy/haproxy.cfg" in text
    assert 'CMD ["haproxy", "-db", "-f", "/etc/haproxy/haproxy.cfg"]' in text
    known = set(re.findall(r"presetenv (\w+)", (ROOT / "deploy" / "haproxy.cfg").read_text()))
    assert set(federation["services"]["proxy"]["environment"]) < known


def test_written_volumes_belong_to_the_images_user(federation: dict[str, Any]) -> None:
    for name, service in federation["services"].items():
        text = (ROOT / built_by(federation, service)["dockerfile"]).read_text(encoding="utf-8")
        for target, (source, read_only) in mounts(service).items():
            if source in federation["volumes"] and not read_only:
                place = (
                    "$(seq -f /hospitals/%g 9)"
                    if target.startswith("/hospitals/")
                    else f" {target}"
                )
                assert place in text, f"{name}: {target} is not made in its image"


COMPOSE = {
    "federation": (FEDERATION,),
    "hospital": (HOSPITAL,),
    "federation with gpus": (FEDERATION, ROOT / "compose.gpu.yml"),
    "hospital with gpus": (HOSPITAL, ROOT / "client" / "compose.gpu.yml"),
}


def built_by(content: dict[str, Any], service: dict[str, Any]) -> dict[str, Any]:
    """The `build` of a service's image."""
    services = content["services"].values()
    (build,) = [s["build"] for s in services if "build" in s and s["image"] == service["image"]]
    assert isinstance(build, dict)
    return build


@pytest.mark.parametrize("paths", COMPOSE.values(), ids=COMPOSE)
def test_each_image_is_built_by_one_service(paths: tuple[Path, ...]) -> None:
    """podman-compose builds for each service that has `build`, in parallel."""
    content = load(paths[0])
    for path in paths[1:]:
        for name, changes in load(path)["services"].items():
            content["services"][name] |= changes
    for name, service in content["services"].items():
        build = built_by(content, service)
        assert {"context", "dockerfile", "args"} == set(build), name
        # no image of that name is fetched from a registry
        assert service["pull_policy"] == "never", name


@pytest.mark.parametrize("path", [FEDERATION, HOSPITAL], ids=["federation", "hospital"])
def test_every_container_has_limits(path: Path) -> None:
    for name, service in load(path)["services"].items():
        computes = name.startswith(("serverapp", "clientapp", "shards"))
        memory = "APP_MEMORY:-8g" if computes else "LINK_MEMORY:-2g"
        memory = "PROXY_MEMORY:-512m" if name == "proxy" else memory
        assert service["mem_limit"] == f"${{FEDGAN_{memory}}}", name
        cpus = "APP_CPUS:-0" if computes else "LINK_CPUS:-1"
        assert service["cpus"] == f"${{FEDGAN_{cpus}}}", name
        assert service["pids_limit"] == "${FEDGAN_PIDS:-1024}", name
        assert service["tmpfs"] == ["/tmp:size=${FEDGAN_TMP:-512m}"], name
        assert service["logging"]["options"] == {"max-size": "10m", "max-file": "3"}, name


def locked() -> dict[str, str]:
    """Versions of deploy/requirements.lock."""
    text = (ROOT / "deploy" / "requirements.lock").read_text(encoding="utf-8")
    return dict(re.findall(r"^(\S+)==(\S+)", text, re.M))


def test_lock_file_has_a_hash_for_each_package() -> None:
    text = (ROOT / "deploy" / "requirements.lock").read_text(encoding="utf-8")
    entries = re.split(r"\n(?=\S)", re.sub(r"^#.*\n", "", text, flags=re.M).strip())
    assert len(entries) == len(locked()) > 20
    for entry in entries:
        assert re.fullmatch(r"\S+==\S+( \\\n    --hash=sha256:[0-9a-f]{64})+", entry), entry[:80]
    assert "://" not in text


def test_lock_file_has_the_dependencies_of_the_project() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for requirement in map(Requirement, pyproject["project"]["dependencies"]):
        if not requirement.name.startswith("torch"):  # of another index: a build argument
            assert requirement.specifier.contains(locked()[requirement.name]), requirement.name
    assert not {"ray", "torch", "torchvision"} & set(locked())


@pytest.mark.parametrize("path", DOCKERFILES, ids=["server", "client", "deploy"])
def test_images_have_a_base_to_pin_and_a_bill_of_materials(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "FROM ${BASE}" in text
    assert "sbom.py > " in text
    if path in SHARED:
        assert "pip install --no-deps --require-hashes -r deploy/requirements.lock" in text


def test_bill_of_materials_is_cyclonedx_with_package_urls() -> None:
    command = [sys.executable, ROOT / "deploy" / "sbom.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    bill = json.loads(done.stdout)
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.5")
    by_name = {row["name"]: row for row in bill["components"]}
    version = importlib.metadata.version("cryptography")
    assert by_name["cryptography"] == {
        "type": "library",
        "name": "cryptography",
        "version": version,
        "purl": f"pkg:pypi/cryptography@{version}",
        "bom-ref": f"pkg:pypi/cryptography@{version}",
    }
    assert len({row["bom-ref"] for row in bill["components"]}) == len(bill["components"])


def test_images_contain_source_only() -> None:
    lines = [
        line
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    ]
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == {
        *("pyproject.toml", "README.md", "LICENSE"),
        *("fedgan", "client", "server", "simulations", "deploy"),
    }


def with_shard(folder: Path) -> subprocess.CompletedProcess[str]:
    script = (
        (ROOT / "client" / "with-shard.sh").read_text(encoding="utf-8").replace("seq 300", "seq 1")
    )
    return subprocess.run(
        ["sh", "-c", script, "with-shard.sh", str(folder), "echo", "started"],
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_executor_starts_when_its_shard_exists(tmp_path: Path) -> None:
    (tmp_path / "north").mkdir()
    (tmp_path / "north" / "card.json").write_text("{}")
    for folder in (tmp_path, tmp_path / "north"):
        done = with_shard(folder)
        assert (done.returncode, done.stdout) == (0, "started\n")


def test_executor_without_a_shard_names_the_missing_folder(tmp_path: Path) -> None:
    done = with_shard(tmp_path)
    assert done.returncode == 3
    assert "started" not in done.stdout
    assert f"no shard in {tmp_path}" in done.stderr
