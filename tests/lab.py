"""JupyterLab on this machine only, and a browser that runs its notebooks as a person does."""

import contextlib
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SETTINGS = {  # whole notebooks in the page, not only what is in view; no news, no look for newer versions
    "notebook-extension/tracker": {"windowingMode": "none", "scrollPastEnd": False},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True},
    "apputils-extension/themes": {"theme": "JupyterLab Light", "adaptive-theme": False},
}
WIDTH, MOST_HEIGHT = 1200, 16_000  # pixels
PROMPTS = "cells => cells.map(cell => cell.querySelector('.jp-InputPrompt').textContent.trim())"
TRACEBACKS = '[data-mime-type="application/vnd.jupyter.stderr"] pre:has(.ansi-red-fg)'  # warnings have no colours


class LabError(RuntimeError):
    """JupyterLab or a notebook in it that did not do what a person expects; the message says what was seen."""


def chromium() -> str | None:
    """The browser to use: $CHROMIUM, or what is installed under a usual name; None if there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


def with_parameters(notebook: Path, copy: Path, parameters: dict) -> None:
    """Copy a notebook with other values in its cell of parameters; names that it does not have are left out."""
    content = nbformat.read(notebook, 4)
    (cell,) = [cell for cell in content.cells if "parameters" in cell.metadata.get("tags", [])]
    for name, value in parameters.items():
        shown = json.dumps(value) if isinstance(value, str) else repr(value)  # with double quotes, as elsewhere
        cell.source = re.sub(rf"^{name} = .*$", lambda _, new=f"{name} = {shown}": new, cell.source, flags=re.M)
    nbformat.write(content, copy)


@contextlib.contextmanager
def jupyter_lab(folder: Path, notebooks: Path, seconds: float = 90) -> Iterator[tuple[str, str]]:
    """(address, token) of a JupyterLab that serves the folder `notebooks`, with all of its own files in `folder`.

    It listens on 127.0.0.1 and wants a token, which others on this machine cannot see. Raises LabError.
    """
    for name, settings in SETTINGS.items():
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))
    token = secrets.token_hex(16)
    own = {f"JUPYTER_{name}_DIR": str(folder / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    own |= {f"JUPYTERLAB_{name}_DIR": str(folder / name.lower()) for name in ("SETTINGS", "WORKSPACES")}
    own |= {"IPYTHONDIR": str(folder / "ipython"), "JUPYTER_TOKEN": token}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", "--port=0", "--allow-root"]
    command += [f"--ServerApp.root_dir={notebooks}", "--LabApp.extension_manager=readonly"]
    log = folder / "lab.log"
    with open(log, "w") as output:
        server = subprocess.Popen(command, env=os.environ | own, cwd=notebooks, stdout=output, stderr=output)
    try:
        yield _address(server, folder / "runtime", log, seconds), token
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def _address(server: subprocess.Popen, runtime: Path, log: Path, seconds: float) -> str:
    """Wait until the server answers; it chooses a free port itself and notes it in its runtime folder."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends and server.poll() is None:
        noted = list(runtime.glob("jpserver-*.json"))
        if noted and (text := noted[0].read_text()):
            return json.loads(text)["url"].rstrip("/")
        time.sleep(0.2)
    raise LabError(f"JupyterLab did not start: {log.read_text()[-2000:]}")


def run_all_cells(page, address: str, token: str, notebook: str, seconds: float = 240) -> None:
    """Open a notebook, choose Run → Run All Cells, wait for the end, and make the page as high as the notebook.

    Raises LabError where a cell fails or does not end.
    """
    page.goto(f"{address}/doc/tree/{notebook}?reset&token={token}")
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=60_000)
    page.locator(".jp-StatusBar-Widget").get_by_text("| Idle").wait_for(timeout=60_000)  # the kernel takes requests
    _choose_run_all(page)
    cells, tracebacks = page.locator(".jp-Notebook .jp-CodeCell"), page.locator(TRACEBACKS)
    started = time.monotonic()
    while True:
        prompts, waited = cells.evaluate_all(PROMPTS), time.monotonic() - started
        if tracebacks.count():
            raise LabError(f"{notebook}: a cell failed: {tracebacks.first.inner_text()[-2000:]}")
        if prompts and all(re.fullmatch(r"\[\d+\]:", prompt) for prompt in prompts):
            break
        if waited > seconds:
            raise LabError(f"{notebook}: not done after {seconds:.0f} s; prompts: {' '.join(prompts)}")
        if waited > 15 and set(prompts) == {"[ ]:"}:  # a kernel that has only just connected may not have heard
            _choose_run_all(page)
            page.wait_for_timeout(5000)
        page.wait_for_timeout(250)
    panel = page.locator(".jp-WindowedPanel-outer").first
    height = panel.evaluate("panel => panel.scrollHeight") + 150  # with menus and status bar
    page.set_viewport_size({"width": WIDTH, "height": min(MOST_HEIGHT, height)})
    panel.evaluate("panel => panel.scrollTo(0, 0)")
    page.wait_for_timeout(500)  # images that came into view are drawn


def _choose_run_all(page) -> None:
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
