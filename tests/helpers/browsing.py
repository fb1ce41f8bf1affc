"""Pages in a headless browser, for tests: what they look like inside it, and what it complains about."""
import base64
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        said = "no Chromium or Chrome on PATH; on Debian: apt-get install --no-install-recommends chromium"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(said)
    return found


# A browser's window is never narrower than 500 pixels; a frame may be.
FRAME = """<!DOCTYPE html><style>body { margin: 0; } iframe { border: 0; width: %dpx; height: 900px; }</style>
<pre></pre>
<script>addEventListener("message", event => { document.querySelector("pre").textContent = event.data; });</script>
<iframe src="%s"></iframe>"""


def dumped(browser: str, path: Path, *flags: str) -> tuple[str, str]:
    """(the DOM, what the browser logged) of a page when it has been loaded."""
    command = [
        browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
        f"--user-data-dir={path.parent / 'browser'}", "--window-size=1400,900", "--virtual-time-budget=3000", *flags,
        "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout, "\n".join(line for line in ended.stderr.splitlines() if "CONSOLE" in line)


def probed(browser: str, path: Path, width: int, probe: str, *flags: str, fragment: str = "") -> tuple[list, str]:
    """(what the probe sent, what the browser logged) of a page as wide as this.

    probe: a script for the end of a copy of the page; it ends with `parent.postMessage(JSON.stringify([...]), "*")`.
    fragment: of the page's address, with its #.
    """
    source = path.read_text(encoding="utf-8")
    # Its hash is allowed as the page's own script is; everything else stays forbidden.
    lax = source.replace("script-src '", f"script-src 'sha256-{script_hash(probe)}' '")
    copy, frame = (path.with_name(f"{name}-{path.name}") for name in ("probe", "frame"))
    copy.write_text(lax.replace("</body>", f"<script>{probe}</script></body>"), encoding="utf-8")
    frame.write_text(FRAME % (width, copy.as_uri() + fragment), encoding="utf-8")
    dom, console = dumped(browser, frame, *flags)
    return json.loads(html.unescape(re.search("<pre>(.*?)</pre>", dom, re.DOTALL)[1])), console


def script_hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def changed(path: Path, name: str, pattern: str, replacement: str) -> Path:
    """A copy of a page beside it, with a pattern replaced."""
    source = re.sub(pattern, lambda _: replacement, path.read_text(encoding="utf-8"))
    path.with_name(name).write_text(source, encoding="utf-8")
    return path.with_name(name)
