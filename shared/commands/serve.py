"""Serve a model by the last chapter that can: what `make serve` runs.

    python -m shared.commands.serve [--model directory-or-hub-id] [flags of the chapter's serve command]
"""
import importlib
import sys

from shared.chapters import last_with


def main(argv: list[str]) -> int:
    from shared.checkpoints import checkpoint

    chapter = last_with("serve")
    if "--model" in argv[:-1]:
        where = argv.index("--model") + 1
        try:
            model_dir = checkpoint(argv[where])
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        # A checkpoint of the hub lies in a directory that is named by a hash.
        name = [] if model_dir.name in argv[where] else ["--served-model-name", argv[where]]
        argv = [*argv[:where], str(model_dir), *name, *argv[where + 1:]]
    return importlib.import_module(f"milestones.{chapter.name}.__main__").main(["serve", *argv])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
