"""Film real commands in a terminal, as animated SVG pictures.

    make film                # all of them: docs/pictures/film_*.svg
    make film ARGS=race      # only one

A film plays in real time, except that pauses are cut to a second. For readers who prefer reduced motion, it shows only the
last frame. Only the typing is simulated.

Reads: what commands print. Writes: docs/pictures/film_*.svg.
"""
import argparse
import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape

from shared.chapters import ROOT
from shared.programs import run

PICTURES = ROOT / "docs" / "pictures"
LONGEST_PAUSE_S, LAST_S = 1.0, 5.0
FRAME_S = 0.15
SILENT_S = 1.2  # how long the terminal is silent before the next line is typed
CHAR, LINE = 7.2, 16
PORT = 8017
# With these, a make inside another prints where it is.
OF_MAKE = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
COLORS = {"default": "#e6edf3", "red": "#ff7b72", "green": "#7ee787", "cyan": "#79c0ff", "brown": "#d29922", "blue": "#79c0ff"}


@dataclass(frozen=True)
class Film:
    """Commands, typed one after the other, and the lines typed into the last one."""

    commands: tuple[str, ...]
    lines: int
    typed: tuple[str, ...] = ()
    server: bool = False
    columns: int = 104


FILMS = {
    "race": Film(("make demo",), lines=42),
    "diff": Film(("make diff-v04",), lines=47, columns=108),
    "hunt": Film(
        ('make break-v03 ARGS="--seed 1"', 'make hunt ASK="What is a KV cache?"', "make reveal"),
        lines=34,
    ),
    "chat": Film((f'make chat ARGS="--url http://127.0.0.1:{PORT}"',), lines=16, typed=("What is a block table?", ""), server=True),
}


@dataclass(frozen=True)
class Frame:
    """What the terminal showed for some seconds."""

    seconds: float
    rows: tuple[tuple[tuple[str, str, bool], ...], ...]  # each line's runs: text, color, bold


class Camera:
    """A terminal whose screen is recorded."""

    def __init__(self, columns: int, lines: int):
        import pyte

        self.screen = pyte.Screen(columns, lines)
        self.stream = pyte.Stream(self.screen)
        self.shots: list[tuple[float, tuple]] = []  # (second, rows shown from then on)
        self.now = 0.0
        self.size = struct.pack("HHHH", lines, columns, 0, 0)

    def show(self, text: str, seconds: float) -> None:
        """Show text that no command prints, such as the prompt and typed letters, and let `seconds` pass."""
        self.stream.feed(text)
        self.shoot()
        self.now += seconds

    def shoot(self) -> None:
        rows = tuple(runs(self.screen.buffer[y], self.screen.columns) for y in range(self.screen.lines))
        if not self.shots or self.shots[-1][1] != rows:
            self.shots.append((self.now, rows))

    def frames(self) -> list[Frame]:
        """The recorded frames; pauses are cut to LONGEST_PAUSE_S."""
        ends = [moment for moment, _ in self.shots[1:]] + [self.now]
        return [Frame(min(end - moment, LONGEST_PAUSE_S), rows) for (moment, rows), end in zip(self.shots, ends, strict=True)]

    def film(self, command: str, typed: tuple[str, ...]) -> None:
        """Run a command in the terminal, and type the next line whenever it has been silent for SILENT_S; "" types Ctrl-D."""
        for letter in command:
            self.show(letter, 0.03)
        self.show("\r\n", 0.2)
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, self.size)
        environment = {name: value for name, value in os.environ.items() if name not in OF_MAKE}
        environment |= {"TERM": "xterm", "COLUMNS": str(self.screen.columns), "LINES": str(self.screen.lines)}
        process = subprocess.Popen(
            command, shell=True, cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
        )
        os.close(slave)
        waiting, begun = list(typed), time.monotonic() - self.now
        last_shot = last_read = self.now
        while True:
            ready, _, _ = select.select([master], [], [], 0.04)
            self.now = time.monotonic() - begun
            if ready:
                try:
                    read = os.read(master, 65536)
                except OSError:  # the command closed its end
                    break
                if not read:
                    break
                self.stream.feed(read.decode(errors="replace"))
                last_read = self.now
            elif process.poll() is not None:
                break
            if self.now - last_shot >= FRAME_S:
                self.shoot()
                last_shot = self.now
            if waiting and self.now - last_read > SILENT_S:
                line = waiting.pop(0)
                os.write(master, f"{line}\n".encode() if line else b"\x04")
                last_read = self.now
        process.wait()
        os.close(master)
        self.shoot()
        self.now += 0.8


def runs(row, columns: int) -> tuple[tuple[str, str, bool], ...]:
    """A line of the screen as runs of the same color, without trailing blanks."""
    found = []
    for x in range(columns):
        cell = row[x]
        kind = (cell.fg, cell.bold)
        if found and found[-1][1:] == kind:
            found[-1] = (found[-1][0] + cell.data, *kind)
        else:
            found.append((cell.data, *kind))
    while found and not found[-1][0].strip():
        found.pop()
    return tuple(found)


def svg(frames: list[Frame], columns: int, lines: int, title: str) -> str:
    """The film as one SVG: all frames below each other, of which an animation shows one at a time."""
    frames = [*frames[:-1], Frame(LAST_S, frames[-1].rows)]
    total = sum(frame.seconds for frame in frames)
    width, height = columns * CHAR + 24, lines * LINE + 24
    keys, body, at = [], [], 0.0
    for number, frame in enumerate(frames):
        keys.append(f"{100 * at / total:.3f}%{{transform:translateY({-number * height:g}px)}}")
        at += frame.seconds
        for y, row in enumerate(frame.rows):
            if row:
                body.append(text(row, 12, 12 + number * height + (y + 0.8) * LINE))
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img" aria-labelledby="t">
<title id="t">{escape(title)}</title>
<style>
  .page {{ fill: #0d1117 }}
  text {{ font: 12px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #e6edf3; white-space: pre }}
  .film {{ animation: film {total:.2f}s steps(1, end) infinite }}
  @keyframes film {{ {" ".join(keys)} }}
  @media (prefers-reduced-motion: reduce) {{ .film {{ animation: none; transform: translateY({-(len(frames) - 1) * height:g}px) }} }}
</style>
<rect class="page" width="{width:g}" height="{height:g}" rx="8"/>
<svg width="{width:g}" height="{height:g}"><g class="film">
{chr(10).join(body)}
</g></svg>
</svg>
"""


def text(row: tuple, x: float, y: float) -> str:
    spans, column = [], 0
    for words, color, bold in row:
        style = f' fill="{COLORS[color]}"' if color in COLORS and color != "default" else ""
        style += ' font-weight="bold"' if bold else ""
        if words.strip():
            spans.append(f'<tspan x="{x + column * CHAR:g}"{style}>{escape(words.rstrip())}</tspan>')
        column += len(words)
    return f'<text y="{y:g}" xml:space="preserve">{"".join(spans)}</text>'


@contextmanager
def serving() -> Iterator[None]:
    """Run the last chapter's server during the block."""
    process = subprocess.Popen(
        ["make", "serve", f"ARGS=--port {PORT}"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        else:
            raise RuntimeError(f"the server on port {PORT} did not answer within a minute")
        yield
    finally:
        os.killpg(process.pid, 15)
        process.wait()


def take(name: str, film: Film) -> list[Frame]:
    """Type and run the film's commands; the frames."""
    camera = Camera(film.columns, film.lines)
    for number, command in enumerate(film.commands):
        camera.show("$ ", 0.5)
        camera.film(command, film.typed if number == len(film.commands) - 1 else ())
    return camera.frames()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.book.site.film", description="Film real commands in a terminal.")
    parser.add_argument("films", nargs="*", metavar="FILM", help=f"{', '.join(FILMS)}; default: all")
    args = parser.parse_args(argv)
    unknown = set(args.films) - set(FILMS)
    if unknown:
        parser.error(f"there is no film {', '.join(sorted(unknown))}; the films are {', '.join(FILMS)}")
    for name in args.films or FILMS:
        film = FILMS[name]
        if film.server:
            with serving():
                frames = take(name, film)
        else:
            frames = take(name, film)
        path = PICTURES / f"film_{name}.svg"
        path.write_text(svg(frames, film.columns, film.lines, f"A terminal: {', then '.join(film.commands)}"))
        seconds = sum(frame.seconds for frame in frames)
        print(f"{path.relative_to(ROOT)}: {len(frames)} frames, {seconds:.0f} s, {path.stat().st_size // 1024} KiB")
    return 0


if __name__ == "__main__":
    run(main)
