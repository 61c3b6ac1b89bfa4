"""A page as a browser shows it, on the machine's screen and in a frame as wide as a phone."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
needs_browser = pytest.mark.skipif(not BROWSER, reason="needs Chromium or Chrome on the PATH")

# A copy may run one script of ours, in the frame, and tell its widths.
_PROBE = (
    "<script>addEventListener('load', () => { const page = document.documentElement; "
    "parent.postMessage([innerWidth, page.scrollWidth, document.images.length, "
    "[...document.images].filter(i => !i.naturalWidth).length].join(' '), '*'); })</script>"
)
_FRAME = (
    "<body><iframe src='copy.html' style='width: 360px; height: 800px; border: 0'></iframe>"
    "<p>waiting</p><script>onmessage = event => { "
    "document.querySelector('p').textContent = 'widths ' + event.data }</script></body>"
)


@dataclass(frozen=True)
class OnAPhone:
    """What a browser says of a page; widths in pixels."""

    inner: int
    content: int
    images: int
    broken: int


def complaints(page: Path, scratch: Path) -> str:
    """Return what the console of a browser says of a page; empty if nothing."""
    said = _browse(scratch, page, "--enable-logging=stderr").stderr
    return "\n".join(line for line in said.splitlines() if ":CONSOLE" in line)


def on_a_phone(html: str, scratch: Path) -> OnAPhone:
    """Return how a page stands in a frame 360 pixels wide."""
    copy = re.sub(r"<meta http-equiv=[^>]*>", "", html).replace("</body>", f"{_PROBE}</body>")
    (scratch / "copy.html").write_text(copy, encoding="utf-8")
    (scratch / "phone.html").write_text(_FRAME, encoding="utf-8")
    found = re.search(r"widths ([\d ]+)", _browse(scratch, scratch / "phone.html").stdout)
    assert found is not None
    return OnAPhone(*map(int, found[1].split()))


def _browse(scratch: Path, page: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={scratch / 'profile'}", "--virtual-time-budget=5000", *flags,
        "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
