"""Print the packages of an image as a CycloneDX bill of materials: Python's and Debian's.

An image's build runs it: `podman run --rm fedgan-server cat /opt/fedgan/sbom.json` shows it.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from urllib.parse import quote


def python_packages() -> list[tuple[str, str, str]]:
    """(name, version, package URL) of this Python's packages."""
    found = set()
    for package in importlib.metadata.distributions():
        name = re.sub(r"[-_.]+", "-", package.metadata["Name"]).lower()
        found.add((name, package.version, f"pkg:pypi/{name}@{quote(package.version, safe='')}"))
    return sorted(found)


def debian_packages() -> list[tuple[str, str, str]]:
    """(name, version, package URL) of the system's packages; none where dpkg is missing."""
    form = "${Package}\\t${Version}\\t${Architecture}\\n"
    try:
        listing = subprocess.run(
            ["dpkg-query", "--show", "--showformat", form],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except FileNotFoundError:
        return []
    rows = [line.split("\t") for line in listing.splitlines()]
    return [
        (name, version, f"pkg:deb/debian/{name}@{quote(version, safe='')}?arch={machine}")
        for name, version, machine in rows
    ]


def bill() -> dict[str, object]:
    """The packages as CycloneDX 1.5."""
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "components": [
            {"type": "library", "name": name, "version": version, "purl": url, "bom-ref": url}
            for name, version, url in [*python_packages(), *debian_packages()]
        ],
    }


if __name__ == "__main__":
    json.dump(bill(), sys.stdout, indent=1)
