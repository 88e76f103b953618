"""The dashboard of the first chapter that has one, in a browser that can reach nothing but the server."""
import socket
import subprocess
import sys
import threading

import httpx
import pytest

from shared.chapters import ROOT, first_with

CHAPTER = first_with("metrics")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def start(port, *flags):
    """A server on this port, ready."""
    command = [sys.executable, "-m", f"milestones.{CHAPTER.name}", "serve", "--port", str(port), "--log-format", "none", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "curl http" in line:
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return process
    raise AssertionError(f"the server has ended with exit code {process.wait()}")


@pytest.fixture
def serve():
    """Start servers, which end with the test."""
    started = []

    def serve(port, *flags):
        started.append(start(port, *flags))
        return started[-1]

    yield serve
    for process in started:
        process.kill()
        process.wait()


def complete(port, max_tokens, key=None):
    body = {"model": "pocket", "prompt": "Once upon a time", "max_tokens": max_tokens, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, headers=headers, timeout=60).raise_for_status()


def figure(page, label):
    """The number above a label."""
    return page.locator(".figures div", has=page.get_by_text(label, exact=True)).locator("b").inner_text()


def finished(count):
    """JavaScript that is true once the page shows so many finished requests."""
    return f"[...document.querySelectorAll('#requests div')].some(each => each.querySelector('span').textContent === 'finished' && each.querySelector('b').textContent === '{count}')"


@pytest.fixture
def open_dashboard(browser):
    """Pages with the network cut: every address but the server's fails. Errors of the page's script fail the test."""
    faults = []

    def open_dashboard(port, width=1280, dark=False):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light")
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.route("**/*", lambda route: route.continue_() if f"//127.0.0.1:{port}/" in route.request.url else faults.append(route.request.url) or route.abort())
        page.goto(f"http://127.0.0.1:{port}/dashboard")
        return page

    yield open_dashboard
    assert not faults


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_it_shows_what_the_server_does(serve, open_dashboard, width, dark):
    port = free_port()
    serve(port, "--slo-ttft-ms", "60000")
    page = open_dashboard(port, width, dark)
    for _ in range(3):
        complete(port, 20)
    page.wait_for_function(finished(3), timeout=10_000)
    assert page.locator("#state").inner_text() == "running"
    assert figure(page, "meet the goals") == "100 %" and figure(page, "first token within") == "60.00 s"
    assert figure(page, "first token too late") == figure(page, "gap too long") == "0" and figure(page, "gap within") == "no goal"
    assert figure(page, "running") == "0 of 64"
    assert page.locator("#advice").inner_text() == "Nothing that a flag would change."
    rows = page.locator("#latency tr").all_inner_texts()
    assert [row.split("\t")[0] for row in rows[1:]] == ["first token", "between tokens", "longest gap of a request", "in the queue", "a step"]
    assert all("ms" in row for row in rows[1:])
    assert page.evaluate("document.documentElement.scrollWidth") == width, "nothing is wider than the window"
    for canvas in ("tokens", "queue", "cache", "lanes"):
        drawn = page.locator(f"#{canvas}").evaluate("each => each.getContext('2d').getImageData(0, 0, each.width, each.height).data.some(value => value)")
        assert drawn, canvas


def test_it_survives_a_restart_of_the_server(serve, open_dashboard):
    port = free_port()
    first = serve(port)
    page = open_dashboard(port)
    complete(port, 5)
    page.wait_for_function(finished(1), timeout=10_000)
    first.terminate()
    first.wait(timeout=60)
    page.wait_for_function("document.getElementById('state').textContent.startsWith('no answer')", timeout=10_000)
    assert page.locator("main").evaluate("main => main.style.opacity") == "0.4", "old numbers look old"
    serve(port)
    page.wait_for_function(finished(0), timeout=30_000)
    assert page.locator("#state").inner_text() == "running" and page.locator("main").evaluate("main => main.style.opacity") == "1"


def test_it_says_that_there_are_no_goals_and_counts_responses(serve, open_dashboard):
    port = free_port()
    serve(port, "--max-waiting", "1")
    body = {"model": "pocket", "prompt": "a", "n": 2}
    assert httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body).status_code == 400
    page = open_dashboard(port)
    page.wait_for_function("document.getElementById('answers').textContent.includes('1 × 400')", timeout=10_000)
    assert figure(page, "--slo-ttft-ms, --slo-itl-ms") == "no goals"


def test_a_stored_key_that_cannot_be_sent_is_asked_for_again(serve, open_dashboard):
    port = free_port()
    serve(port, "--metrics-key", "secret")
    page = open_dashboard(port)
    page.evaluate("sessionStorage.setItem('stepserve-key', 'k€y')")
    page.reload()
    page.wait_for_function("document.getElementById('state').textContent === 'needs a key'", timeout=10_000)
    page.locator("#ask input").fill("secret")
    page.locator("#ask button").click()
    page.wait_for_function(finished(0), timeout=10_000)


def test_it_asks_for_the_key_and_shows_nothing_before(serve, open_dashboard):
    port = free_port()
    serve(port, "--api-key", "secret")
    page = open_dashboard(port)
    complete(port, 5, key="secret")
    page.wait_for_function("document.getElementById('state').textContent === 'needs a key'", timeout=10_000)
    assert page.locator("#requests").inner_text() == ""
    page.locator("#ask input").fill("wrong")
    page.locator("#ask button").click()
    page.wait_for_timeout(2500)
    assert page.locator("#ask").is_visible() and page.locator("#requests").inner_text() == ""
    page.locator("#ask input").fill("secret")
    page.locator("#ask button").click()
    page.wait_for_function(finished(1), timeout=10_000)
    assert not page.locator("#ask").is_visible()
    assert "secret" not in page.url
