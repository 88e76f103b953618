"""The log of a process: a thread prints it, so that nothing else waits for whoever reads it."""
import logging
import queue
import sys
import threading
from contextlib import suppress

# Lines that may wait for a slow reader of the log, and how long the process waits for them when it ends.
MOST_LINES, FLUSH_S = 1_000, 1.0


class Log(logging.Handler):
    """Prints to stderr, in a thread of its own, the lines that it is given and what the process logs."""

    def __init__(self):
        super().__init__()
        self.num_lost = 0  # since the last line that was queued
        # What the garbage collector finds may be logged in the middle of a put, which only this queue allows.
        self.lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.print_lines, name="log", daemon=True)
        self.thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue what a logger has been given. Loggers call this."""
        self.put(self.format(record))

    def put(self, line: str | None) -> None:
        """Queue a line to be printed, or None to end the thread. If nobody reads the log, the line is lost: answers matter more."""
        with self.lock:
            if line is not None and self.lines.qsize() >= MOST_LINES:
                self.num_lost += 1
                return
            if self.num_lost:
                self.lines.put(f"{self.num_lost} lines of the log are missing here: nobody read it, and no more may wait")
                self.num_lost = 0
            self.lines.put(line)

    def print_lines(self) -> None:
        """Print lines. A log that cannot be written, since its reader has gone or its disk is full, loses them."""
        while (line := self.lines.get()) is not None:
            with suppress(OSError, ValueError):
                print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Print what is queued, for at most FLUSH_S. Python's own exit calls this too."""
        self.put(None)
        self.thread.join(FLUSH_S)
        super().close()


def log_to(log: Log) -> None:
    """Let this process's loggers, and Python's warnings, use a log."""
    logging.basicConfig(handlers=[log])
    logging.captureWarnings(True)
