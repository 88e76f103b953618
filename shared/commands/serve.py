"""Serve a model by the last chapter that can: what `make serve` runs.

    python -m shared.commands.serve [--model directory-or-hub-id] [flags of the chapter's serve command]
"""
import argparse
import importlib
import sys
from pathlib import Path

from shared.chapters import last_with
from shared.programs import run


def main(argv: list[str]) -> int:
    """Resolve the model, and leave the rest to the chapter."""
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
        # A directory has a name of its own; other checkpoints lie in directories that are named by a hash.
        if not Path(args.model).is_dir():
            model += ["--served-model-name", args.model]
    # What the user says comes last, and counts.
    return importlib.import_module(f"milestones.{chapter.name}.__main__").main(["serve", *model, *others])


if __name__ == "__main__":
    run(main)
