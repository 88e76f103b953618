"""Photograph the dashboard of a server under load, for the text and by eye.

    python -m shared.commands.dashboard --write     # docs/pictures/v17_dashboard.png and v17_dashboard_phone.png
    python -m shared.commands.dashboard --to build  # the same elsewhere

The load is more than the server has places and blocks for, so the page has something to advise. Needs a browser: the one
that the site's tests use.

Reads: the first chapter that has a dashboard. Writes: two pictures.
"""
import argparse
import contextlib
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from shared.chapters import ROOT, first_with
from shared.programs import run

PICTURES = ROOT / "docs" / "pictures"
# A cache that is too small for eight long requests, and goals that some of them miss.
FLAGS = ("--port", "0", "--max-num-seqs", "8", "--num-blocks", "150", "--reserve-tokens", "0", "--slo-ttft-ms", "300", "--slo-itl-ms", "50", "--log-format", "none")
REQUESTS, SECONDS = 300, 25
# Width, height, and whether the system is dark: a desk and a phone.
VIEWS = {"v17_dashboard": (1280, 1050, False), "v17_dashboard_phone": (390, 1560, True)}


@contextlib.contextmanager
def served(chapter) -> Iterator[str]:
    """Start the chapter's server; yields its address when it is ready. Leaving the context ends it."""
    command = [sys.executable, "-m", f"milestones.{chapter.name}", "serve", *FLAGS]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        line = next((line for line in process.stderr if "curl http" in line), None)
        if line is None:
            raise RuntimeError(f"the server has ended with exit code {process.wait()}")
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield line.split()[1].removesuffix("/v1/completions")
    finally:
        process.terminate()
        process.wait(timeout=60)


def ask(url: str, number: int) -> None:
    """One request of the load: some prompts are long, and some are the same."""
    import httpx

    rng = random.Random(number)
    time.sleep(rng.random() * SECONDS)
    shared = random.Random(0).choices(range(8, 2000), k=48)
    prompt = shared[: rng.choice((0, 48))] + rng.choices(range(8, 2000), k=rng.choice((5, 20, 60, 500)))
    body = {"model": "pocket", "prompt": prompt, "max_tokens": rng.randint(60, 300), "ignore_eos": True}
    httpx.post(f"{url}/v1/completions", json=body, timeout=120).raise_for_status()


def photograph(url: str, directory: Path) -> list[Path]:
    """Load the server, and write a picture of its dashboard for each view, taken while requests run."""
    from playwright.sync_api import sync_playwright

    threads = [threading.Thread(target=ask, args=(url, number)) for number in range(REQUESTS)]
    for thread in threads:
        thread.start()
    written = []
    with sync_playwright() as playwright:
        program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for name, (width, height, dark) in VIEWS.items():
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light")
            page = context.new_page()
            page.goto(f"{url}/dashboard")
            page.wait_for_timeout(1000 * SECONDS / 3)
            written.append(directory / f"{name}.png")
            page.screenshot(path=written[-1])
        browser.close()
    for thread in threads:
        thread.join()
    return written


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.commands.dashboard", description=__doc__.partition("\n")[0])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--write", action="store_true", help="write the pictures that the text shows")
    where.add_argument("--to", type=Path, metavar="DIR", help="write them to another directory")
    args = parser.parse_args(argv)
    directory = PICTURES if args.write else args.to
    directory.mkdir(parents=True, exist_ok=True)
    with served(first_with("metrics")) as url:
        for path in photograph(url, directory):
            print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    run(main)
