"""What every program of this repository does at its beginning and its end."""
import os
import sys
from collections.abc import Callable
from typing import NoReturn


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """End the process with what main returns for its arguments; quietly if the user or whoever reads has seen enough."""
    try:
        # What a terminal cannot show is no reason to end.
        for stream in (sys.stdin, sys.stdout):
            if stream is not None:
                stream.reconfigure(errors="replace")
        status = main(sys.argv[1:])
        print(end="", flush=True)
    except BrokenPipeError:
        # What is still in the buffer goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)


def server_url(url: str) -> str:
    """A server's address as our programs know it: without a slash, nor the /v1 that other programs want.

    >>> server_url("http://gpu:8000/"), server_url("http://gpu:8000/v1/"), server_url("gpu:8000")
    ('http://gpu:8000', 'http://gpu:8000', 'http://gpu:8000')
    """
    url = url if "://" in url else f"http://{url}"
    return url.rstrip("/").removesuffix("/v1").rstrip("/")
