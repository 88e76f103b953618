"""Which files a test run has imported or opened."""
import os
import sys
from pathlib import Path


class Seen:
    """Records every file that this process opens from now on, but none that a fork or another process opens."""

    def __init__(self):
        self.opened = set()
        sys.addaudithook(self.on_event)

    def on_event(self, event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            self.opened.add(os.path.abspath(arguments[0]))

    def files(self) -> set[Path]:
        """The files opened, and the source of every module imported."""
        opened = {Path(path.decode(errors="replace") if isinstance(path, bytes) else path) for path in self.opened.copy()}
        modules = {Path(file) for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None))}
        return {path.absolute() for path in opened | modules}
