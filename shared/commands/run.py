"""One prompt through one chapter, with a checkpoint by name: what `make run-v01` calls.

    python -m shared.commands.run v01 "Explain KV cache in one sentence." --model pocket --stats
"""
import argparse
import importlib
import json
import sys
from pathlib import Path

from shared.chapters import find
from shared.programs import run


def has_chat_template(model_dir: Path) -> bool:
    """Whether the checkpoint brings a template, in either of the places where transformers puts it."""
    if (model_dir / "chat_template.jinja").exists():
        return True
    config = model_dir / "tokenizer_config.json"
    return config.exists() and bool(json.loads(config.read_text()).get("chat_template"))


def main(argv: list[str]) -> int:
    """Resolve the model, choose chat where there is a template and say so, and leave the rest to the chapter."""
    parser = argparse.ArgumentParser(prog="python -m shared.commands.run", usage="%(prog)s vNN PROMPT [--model MODEL] [flags of generate]")
    parser.add_argument("--model", default="pocket", help="directory, hub id, or a name of shared.checkpoints")
    if len(argv) < 2:
        parser.error("name a chapter and a prompt")
    # A prompt may begin with a dash.
    name, prompt, *given = argv
    args, others = parser.parse_known_args(given)
    from shared.checkpoints import checkpoint

    try:
        chapter = find(name)
        model_dir = checkpoint(args.model)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    flags = ["--stream"]
    if has_chat_template(model_dir):
        print(f"{args.model} has a chat template: the prompt is sent as a user's turn", file=sys.stderr)
        flags.append("--chat")
    command_line = importlib.import_module(f"milestones.{chapter.name}.__main__")
    return command_line.main(["generate", "--model", str(model_dir), *flags, *others, "--", prompt])


if __name__ == "__main__":
    run(main)
