"""Chat with an OpenAI-compatible server in the terminal.

    make chat                    # with the server that `make serve` started
    python -m shared.commands.chat --url http://127.0.0.1:8000

Ctrl-C stops an answer, /new starts a new conversation, /quit quits.
"""
import argparse
import sys

import openai

from shared.commands.agent import CLIENT_ERRORS, Printer, first_model
from shared.programs import run, server_url


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.commands.chat", description="Chat with an OpenAI-compatible server.")
    parser.add_argument("--url", type=server_url, default="http://127.0.0.1:8000")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--model", help="(default: the first model the server lists)")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--max-tokens", type=int, help="(default: the rest of the context)")
    args = parser.parse_args(argv)
    try:
        client = openai.OpenAI(base_url=f"{args.url}/v1", api_key=args.api_key or "none", max_retries=0)
        model = args.model or first_model(client)
    except openai.APIConnectionError:
        print(f"no server answers at {args.url}; start one with `make serve` in another terminal", file=sys.stderr)
        return 2
    except openai.APIStatusError as error:
        print(f"{args.url} is not an OpenAI server, or it requires a different --api-key: {error.message}", file=sys.stderr)
        return 2
    except CLIENT_ERRORS as error:
        print(f"{error}; check --url and --api-key", file=sys.stderr)
        return 2
    print(f"chatting with {model}; /new starts a new conversation, Ctrl-C stops an answer, /quit quits")
    talk(client, model, args.temperature, args.max_tokens)
    return 0


def talk(client: openai.OpenAI, model: str, temperature: float, max_tokens: int | None) -> None:
    messages = []
    while True:
        try:
            text = input("\nyou: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text == "/quit":
            return
        if text == "/new":
            messages = []
        elif text:
            messages.append({"role": "user", "content": text})
            try:
                answer = listen(client, model, messages, temperature, max_tokens)
            except CLIENT_ERRORS as error:
                print(f"error: {error}; your last message is removed from the conversation")
                messages.pop()
                continue
            if answer:
                messages.append({"role": "assistant", "content": answer})
            else:
                print("(nothing is said; your last message is removed from the conversation)")
                messages.pop()


def listen(client: openai.OpenAI, model: str, messages: list[dict], temperature: float, max_tokens: int | None) -> str:
    """Print an answer and its thought as they arrive; return the answer, or the part that had arrived at Ctrl-C."""
    answer, finish_reason = "", None
    body = dict(model=model, messages=messages, temperature=temperature, max_tokens=max_tokens)
    with Printer() as printer:
        try:
            with client.chat.completions.create(**body, stream=True) as stream:
                for chunk in stream:
                    if not chunk.choices:
                        continue
                    choice = chunk.choices[0]
                    finish_reason = choice.finish_reason or finish_reason
                    # OpenAI's client knows no reasoning_content, but keeps what it does not know.
                    if thought := getattr(choice.delta, "reasoning_content", None):
                        printer.add("thought", thought)
                    if piece := choice.delta.content:
                        answer += piece
                        printer.add(model, piece)
        except KeyboardInterrupt:
            pass
    if finish_reason == "length":
        print("(cut off by max_tokens)")
    return answer


if __name__ == "__main__":
    run(main)
