"""Serve a model with the latest chapter that has a server: what `make serve` runs.

    python -m shared.commands.serve [--model directory-or-hub-id] [flags of the chapter's serve command]
"""
import argparse
import importlib
import sys
from pathlib import Path

from shared.chapters import last_with
from shared.programs import run


def main(argv: list[str]) -> int:
    """Resolve the model, then run the chapter's own serve command."""
    from shared.checkpoints import checkpoint

    chapter = last_with("serve")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model")
    args, others = parser.parse_known_args(argv)
    model = []
    if args.model is not None:
        try:
            model = ["--model", str(checkpoint(args.model))]
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        # A directory's own name serves as the model's name. Other checkpoints are in directories named by a hash.
        if not Path(args.model).is_dir():
            model += ["--served-model-name", args.model]
    # The user's flags are last, so they override these.
    return importlib.import_module(f"milestones.{chapter.name}.__main__").main(["serve", *model, *others])


if __name__ == "__main__":
    run(main)
