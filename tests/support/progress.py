"""On a terminal, one line that shows the progress of the tests, instead of a dot for each."""
import time

import pytest


class OneLine:
    """A pytest plugin for the process that prints."""

    def __init__(self, reporter):
        self.reporter = reporter
        reporter._show_progress_info = False  # the percentage, which this line replaces
        self.total = self.done = self.failed = 0
        self.began = time.monotonic()
        self.drawn = 0.0

    def pytest_collection_finish(self, session):
        self.total = len(session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node, ids):
        self.total = len(ids)

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report):
        """Print no letter; the report comes at the end."""
        if report.when == "call" and report.passed:
            return "passed", "", "PASSED"
        if report.failed:
            return ("failed", "", "FAILED") if report.when == "call" else ("error", "", "ERROR")
        return ("skipped", "", "SKIPPED") if report.skipped else ("", "", "")

    def pytest_runtest_logreport(self, report):
        self.failed += report.failed
        self.done += report.when == "teardown"
        now = time.monotonic()
        if now - self.drawn > 0.1:
            self.drawn = now
            minutes, seconds = divmod(int(now - self.began), 60)
            failed = f", {self.failed} failed" if self.failed else ""
            self.reporter.rewrite(f"{self.done} of {self.total} tests{failed}, {minutes}:{seconds:02}", erase=True)

    def pytest_sessionfinish(self):
        self.reporter.rewrite("", erase=True)
