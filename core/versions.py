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
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
