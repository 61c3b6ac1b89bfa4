"""Versions of this package and of what its results depend on."""

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("flwr", "tensorflow", "keras", "numpy", "scipy", "dafne-dl", "scikit-image", "nibabel")


def software_version() -> str:
    """Return the version of this package."""
    return version("dafne-federated")


def versions() -> dict[str, str]:
    """Return versions by name: this package, Python, and what results depend on."""
    found = {"dafne-federated": software_version(), "python": platform.python_version()}
    return found | {name: installed(name) for name in PACKAGES}


def installed(*packages: str) -> str:
    """Return the version of the first of these packages that is installed."""
    for package in packages:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "not installed"
