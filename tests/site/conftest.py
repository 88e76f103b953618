"""The built site, a server for it, and a browser."""
import functools
import http.server
import os
import shutil
import threading
from pathlib import Path

import pytest
from filelock import FileLock

from shared.book.site import build
from shared.chapters import BOOK

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The directory of the site, built from this tree by the first process that needs it."""
    scratch = tmp_path_factory.getbasetemp()
    shared = scratch.parent if "PYTEST_XDIST_WORKER" in os.environ else scratch
    with FileLock(shared / "site.lock"):
        if not (shared / "site.built").exists():
            (shared / "site.built").write_text(str(build.build(BOOK)))
    return Path((shared / "site.built").read_text())


@pytest.fixture(scope="session")
def address(built):
    """Where the site is served."""
    handler = functools.partial(Quiet, directory=str(built))
    with build.Server(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


@pytest.fixture(scope="session")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium; on Debian and Ubuntu `apt install chromium` brings it")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, address):
    """A function that opens a page; an error on the page, or a fetch from elsewhere, fails the test."""
    pages, complaints = [], []

    def open_page(path, width=1280, scheme="light"):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda told: told.type in ("error", "warning") and complaints.append(f"{path}: {told.text}"))
        page.on("pageerror", lambda error: complaints.append(f"{path}: {error}"))
        page.on("request", lambda asked: asked.url.startswith("http") and not asked.url.startswith(address) and complaints.append(asked.url))
        page.on("requestfailed", lambda asked: complaints.append(f"{path}: {asked.url} failed"))
        page.on("response", lambda got: got.status >= 400 and complaints.append(f"{path}: {got.url} gives {got.status}"))
        page.goto(address + path)
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert complaints == []
