"""How every program in this repository starts and exits, and how it refuses arguments and reads a server's URL."""
import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn
from urllib.parse import urlsplit


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """Call main with the command line's arguments and exit with the status it returns.

    Ctrl-C exits with 130, SIGTERM with 143 and a closed output pipe with 1, all without a message; an OSError is printed,
    and exits with 2.
    """
    # By default, SIGTERM would end this process without its `finally`, and leave the servers behind that it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        # A character that the terminal cannot show must not end the program.
        for stream in (sys.stdin, sys.stdout):
            if stream is not None:
                stream.reconfigure(errors="replace")
        status = main(sys.argv[1:])
        print(end="", flush=True)
    except BrokenPipeError:
        # Nobody reads what is still in the buffer: discard it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)


def take_no_arguments(argv: Sequence[str], module: str, doc: str) -> None:
    """Exit with the docstring if -h is given, and with an error if anything else is: for a program without arguments."""
    argparse.ArgumentParser(prog=f"python -m {module}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)


def server_url(url: str) -> str:
    """A server's URL without a trailing slash and without the /v1 that OpenAI clients expect: the type of an argument.

    >>> server_url("http://gpu:8000/"), server_url("http://gpu:8000/v1/"), server_url("gpu:8000")
    ('http://gpu:8000', 'http://gpu:8000', 'http://gpu:8000')
    """
    url = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError("it needs http or https, a host, and a port above 0 if any")
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{url} is not the address of a server: {error}") from None
    return url.rstrip("/").removesuffix("/v1").rstrip("/")
