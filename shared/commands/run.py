"""Run one prompt through one chapter, with a checkpoint given by name: what `make run-v01` calls.

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
    """Whether the checkpoint has a chat template, in either of the files where transformers stores it."""
    if (model_dir / "chat_template.jinja").exists():
        return True
    config = model_dir / "tokenizer_config.json"
    return config.exists() and bool(json.loads(config.read_text()).get("chat_template"))


def main(argv: list[str]) -> int:
    """Resolve the model, add --chat if it has a chat template, then run the chapter's own generate command."""
    parser = argparse.ArgumentParser(prog="python -m shared.commands.run", usage="%(prog)s vNN PROMPT [--model MODEL] [flags of generate]")
    parser.add_argument("--model", default="pocket", help="directory, hub id, or a name in shared.checkpoints")
    if len(argv) < 2:
        parser.error("a chapter and a prompt are required")
    # A prompt may begin with a dash.
    name, prompt, *rest = argv
    args, others = parser.parse_known_args(rest)
    from shared.checkpoints import checkpoint

    try:
        chapter = find(name)
        model_dir = checkpoint(args.model)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    flags = ["--stream"]
    if has_chat_template(model_dir):
        print(f"{args.model} has a chat template, so the prompt is sent as a user message", file=sys.stderr)
        flags.append("--chat")
    command_line = importlib.import_module(f"milestones.{chapter.name}.__main__")
    return command_line.main(["generate", "--model", str(model_dir), *flags, *others, "--", prompt])


if __name__ == "__main__":
    run(main)
