"""Generate pocket-tools' training text from a seed: conversations that think, call functions and answer.

The form is that of Hermes and Qwen3: the tools as JSON in the system turn, `<think>`, `<tool_call>` and `<tool_response>`.
`documents(seed)` is endless; the held-out text has a different seed, and cities that the training text never names.
"""
import json
import random
from collections.abc import Iterator

from shared.models.corpus import BOS, EOT, STRANGE_FORMS, SYSTEM, USER, WHAT, WHERE, WHO, vary

HELD_OUT_SEED = 1_000_003
HELD_OUT_TEXTS = 100

# Tokens that, unlike the special ones, are part of the decoded text.
MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<tools>", "</tools>")
NO_THOUGHT = "<think>\n\n</think>\n\n"

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- set last = namespace(question=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set last.question = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- if tools %}
    {{- '<|system|>' }}
    {%- if messages and messages[0].role == 'system' and messages[0].content %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- 'Tools:\\n<tools>\\n' }}
    {%- for tool in tools %}
        {{- tool.function | tojson }}
        {{- '\\n' }}
    {%- endfor %}
    {{- '</tools><|eot|>' }}
{%- endif %}
{%- for message in messages %}
    {%- set content = message.content or '' %}
    {%- if message.role == 'system' and loop.first and tools %}
    {%- elif message.role == 'assistant' %}
        {{- '<|assistant|>' }}
        {%- if message.reasoning_content and loop.index0 > last.question %}
            {{- '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {%- if content or not loop.first %}
                {{- '\\n' }}
            {%- endif %}
            {{- '<tool_call>\\n{"name": ' }}
            {{- call.function.name | tojson }}
            {{- ', "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|eot|>' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}
            {{- '<|user|>' }}
        {%- else %}
            {{- '\\n' }}
        {%- endif %}
        {{- '<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}
            {{- '<|eot|>' }}
        {%- endif %}
    {%- else %}
        {{- '<|' + message.role + '|>' + content + '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

CITIES = (
    "Oslo", "Lima", "Paris", "Berlin", "Tokyo", "Rome", "Cairo", "Madrid", "Vienna", "Athens", "Dublin", "Lisbon", "Prague",
    "Warsaw", "Delhi", "Seoul", "Boston", "Chicago", "London", "Zürich", "Nairobi", "Sydney", "Toronto", "Hamburg", "Munich",
    "Milan", "Kyoto", "Geneva", "New York", "Cape Town", "São Paulo", "Hong Kong",
)
HELD_OUT_CITIES = ("Bergen", "Quito", "Helsinki", "Havana", "Jakarta", "Denver", "Porto", "San Juan")
SKIES = ("rain", "sun", "snow", "clouds", "fog", "wind", "storms", "hail", "light rain", "heavy snow", "a clear sky")
ERRORS = ("no such city", "timeout", "not a number", "the service is down", "too many requests", "access denied", "unknown error")
SYSTEMS = ("You are a helpful assistant.", "Be brief.", "You can call functions.", "Answer in one sentence.", "Today is a quiet day.")

# What each tool is asked for, as the thought names it, and the forms of the question.
ASKED = {"add": "a sum", "multiply": "a product", "weather": "the weather", "time": "the time"}
FORMS = {
    "add": (
        "What is {a} plus {b}?", "What is {a} plus {b}?", "What is {a} + {b}?", "Add {a} and {b}.", "What is the sum of {a} and {b}?",
        "How much is {a} plus {b}?", "Please add {a} and {b}.", "Can you add {a} and {b}?", "Compute {a} + {b}.", "{a} plus {b}?",
    ),
    "multiply": (
        "What is {a} times {b}?", "What is {a} times {b}?", "What is {a} * {b}?", "Multiply {a} by {b}.",
        "What is the product of {a} and {b}?", "How much is {a} times {b}?", "Please multiply {a} by {b}.",
        "Can you multiply {a} by {b}?", "Compute {a} * {b}.", "{a} times {b}?",
    ),
    "weather": (
        "How is the weather in {city}?", "How is the weather in {city}?", "What is the weather in {city}?",
        "What is the weather like in {city}?", "Is it raining in {city}?", "How warm is it in {city}?",
        "Tell me the weather in {city}.", "Do I need an umbrella in {city}?", "What is the temperature in {city}?",
    ),
    "time": (
        "What time is it?", "What time is it?", "What is the time?", "Tell me the time.", "Do you know the time?",
        "How late is it?", "Can you tell me the time?", "What time is it now?",
    ),
}
WEATHER_PAIRS = (
    "How is the weather in {0} and in {1}?", "How is the weather in {0} and in {1}?", "What is the weather in {0} and {1}?",
    "Compare the weather in {0} and {1}.", "Is it warmer in {0} or in {1}?",
)
DESCRIPTIONS = {
    "add": ("Add two numbers.", "Add two integers.", "Return the sum of a and b.", "Adds a and b."),
    "multiply": ("Multiply two numbers.", "Multiply two integers.", "Return the product of a and b.", "Multiplies a and b."),
    "weather": ("Get the weather in a city.", "The weather in a city.", "Return the current weather.", "Look up a city's weather."),
    "time": ("Get the time.", "The current time.", "Return the time of day.", "Tell what time it is."),
}
PARAMETERS = {
    "add": {"a": ("integer", "The first number."), "b": ("integer", "The second number.")},
    "multiply": {"a": ("integer", "The first number."), "b": ("integer", "The second number.")},
    "weather": {"city": ("string", "The name of the city.")},
    "time": {},
}
TALK = (
    (("Hello", "Hi", "Hello!", "Good morning.", "Hi there!", "Good evening."), "Hello! How can I help?"),
    (("Who are you?", "What is your name?", "What are you?"), "I am pocket-tools, a small model that calls functions."),
    (("Thank you.", "Thanks!", "Thank you very much.", "Great, thanks.", "Thank you"), "You are welcome."),
    (("Goodbye.", "Bye!", "See you later.", "Good night."), "Goodbye!"),
    (("How are you?", "How do you do?"), "I am fine, thank you."),
    (("Yes.", "Okay.", "Good.", "I see."), "Is there anything else?"),
)
ABILITIES = ("What can you do?", "Which tools do you have?", "What are your tools?", "Can you help me?", "Which functions can you call?")
# Each phase's share of requests to repeat words.
ECHOES = {"echo": 1.0, "learn": 0.3, "answer": 0.05}
UNKNOWN = "I do not know that."
NO_TOOL = "I have no tool for that."


def city(rng: random.Random, held_out: bool) -> str:
    """A city; half of them are made up, so that a name has to be copied rather than known."""
    if rng.random() < 0.5:
        return rng.choice(HELD_OUT_CITIES if held_out else CITIES)
    syllables = [rng.choice("bcdfghjklmnprstvwyz") + rng.choice("aeiou") + rng.choice(("", "", "n", "r", "l", "s")) for _ in range(3)]
    return "".join(syllables[: rng.choice((2, 2, 3))]).capitalize() + rng.choice(("", "", "", "k", "burg", " City"))


def number(rng: random.Random) -> int:
    """A number of one to four digits."""
    digits = rng.choice((1, 1, 2, 2, 2, 3, 3, 4))
    return rng.randrange(10 ** (digits - 1), 10**digits)


def arguments(name: str, rng: random.Random, held_out: bool) -> dict:
    """A call's arguments."""
    if name == "time":
        return {}
    return {"city": city(rng, held_out)} if name == "weather" else {"a": number(rng), "b": number(rng)}


def ask(calls: list[tuple[str, dict]], rng: random.Random) -> str:
    """A question that takes these calls."""
    if [name for name, _ in calls] == ["weather", "weather"]:
        return rng.choice(WEATHER_PAIRS).format(*(values["city"] for _, values in calls))
    first, *others = (rng.choice(FORMS[name]).format(**values) for name, values in calls)
    for other in others:
        first = first[:-1] + rng.choice((", and ", " and ")) + other[0].lower() + other[1:]
    return vary(first, rng)


def outcome(name: str, values: dict, rng: random.Random) -> tuple[str, str, str]:
    """A call's response, what the thought makes of it, and the answer. Many results are wrong: they are to be copied, not known."""
    if rng.random() < 0.06:
        error = rng.choice(ERRORS)
        content = rng.choice((f"error: {error}", f"error: {error}", json.dumps({"error": error})))
        return content, "an error", f"I could not find out: {error}."
    if name == "weather":
        celsius, sky = rng.randrange(-15, 40), rng.choice(SKIES)
        content = rng.choice((
            json.dumps({"celsius": celsius, "sky": sky}),
            json.dumps({"celsius": celsius, "sky": sky}),
            json.dumps({"city": values["city"], "celsius": celsius, "sky": sky}, ensure_ascii=False),
            f"{celsius} degrees, {sky}",
        ))
        return content, f"{celsius} degrees with {sky}", f"It is {celsius} degrees in {values['city']}, with {sky}."
    if name == "time":
        time = f"{rng.randrange(24):02}:{rng.randrange(60):02}"
        return rng.choice((time, time, json.dumps({"time": time}))), time, f"It is {time}."
    a, b = values["a"], values["b"]
    right, sign = (a + b, "plus") if name == "add" else (a * b, "times")
    result = right if rng.random() < 0.5 else number(rng)
    return rng.choice((str(result), str(result), json.dumps({"result": result}))), str(result), f"{a} {sign} {b} is {result}."


def listed(words: list[str]) -> str:
    """The words as a list in a sentence."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def call_turns(names: list[str], rng: random.Random, held_out: bool) -> list[dict]:
    """A question that takes calls of these tools, the calls, their responses and the answer."""
    calls = [(name, arguments(name, rng, held_out)) for name in names]
    contents, found, answers = zip(*(outcome(name, values, rng) for name, values in calls))
    wish, which = (listed(list(dict.fromkeys(words))) for words in ([ASKED[name] for name in names], names))
    return [
        {"role": "user", "content": ask(calls, rng)},
        {
            "role": "assistant",
            "reasoning_content": f"The user asks for {wish}. I call {which}.",
            "content": "",
            "tool_calls": [
                {"type": "function", "id": f"call_{i}", "function": {"name": name, "arguments": values}}
                for i, (name, values) in enumerate(calls)
            ],
        },
        *({"role": "tool", "tool_call_id": f"call_{i}", "content": content} for i, content in enumerate(contents)),
        {
            "role": "assistant",
            "reasoning_content": f"The tool says {found[0]}." if len(found) == 1 else f"The tools say {listed(list(found))}.",
            "content": " ".join(dict.fromkeys(answers)),
        },
    ]


def plain_turns(question: str, thought: str, answer: str) -> list[dict]:
    """A question and an answer without a call."""
    return [{"role": "user", "content": question}, {"role": "assistant", "reasoning_content": thought, "content": answer}]


def talk_turns(tools: list[str], rng: random.Random) -> list[dict]:
    """Small talk, a question about the tools, or one about something else."""
    kind = rng.random()
    if kind < 0.25:
        answer = f"I can call {listed(tools)}." if tools else "I have no tools."
        return plain_turns(vary(rng.choice(ABILITIES), rng), "No tool is needed.", answer)
    if kind < 0.45:
        question = rng.choice(STRANGE_FORMS).format(who=rng.choice(WHO), where=rng.choice(WHERE), what=rng.choice(WHAT))
        return plain_turns(question, "No tool is needed.", UNKNOWN)
    questions, answer = rng.choice(TALK)
    return plain_turns(vary(rng.choice(questions), rng), "No tool is needed.", answer)


def echo(rng: random.Random) -> list[dict]:
    """A request to repeat a few names, numbers and words: to copy is the hardest thing that the model learns."""
    makers = (lambda: city(rng, False), lambda: str(number(rng)), lambda: rng.choice(SKIES), lambda: rng.choice(WHAT))
    words = " ".join(rng.choice(makers)() for _ in range(rng.randrange(1, 12)))
    return plain_turns(f"Say: {words}", words, words)


def turns(tools: list[str], rng: random.Random, held_out: bool = False) -> list[dict]:
    """One question and all that follows from it."""
    kind = rng.random()
    missing = [name for name in FORMS if name not in tools]
    if kind < 0.13 or not tools and kind < 0.5:
        return talk_turns(tools, rng)
    if missing and (kind < 0.28 or not tools):
        name = rng.choice(missing)
        question = ask([(name, arguments(name, rng, held_out))], rng)
        return plain_turns(question, f"The user asks for {ASKED[name]}. I have no tool for that.", NO_TOOL)
    names = [rng.choice(tools)]
    if kind > 0.75:
        names.append(rng.choice([name for name in tools if name != "time" or names != ["time"]] or tools))
        if rng.random() < 0.3 and "weather" in tools:
            names = ["weather", "weather"]
        if names == ["time", "time"]:
            names = ["time"]
    return call_turns(names, rng, held_out)


def describe(name: str, rng: random.Random) -> dict:
    """A tool's description, as a client sends it."""
    verbose = rng.random() < 0.3
    properties = {
        key: {"type": kind, "description": text} if verbose else {"type": kind} for key, (kind, text) in PARAMETERS[name].items()
    }
    parameters = {"type": "object", "properties": properties}
    if properties and rng.random() < 0.8:
        parameters["required"] = list(properties)
    return {
        "type": "function",
        "function": {"name": name, "description": rng.choice(DESCRIPTIONS[name]), "parameters": parameters},
    }


def conversation(rng: random.Random, questions: int, count: int, held_out: bool = False) -> tuple[list[dict], list[dict]]:
    """The messages and the tools of a conversation; every assistant turn has a thought."""
    names = rng.sample(list(FORMS), count)
    messages = [{"role": "system", "content": rng.choice(SYSTEMS)}] if rng.random() < 0.15 else []
    for _ in range(questions):
        messages += turns(names, rng, held_out)
    return messages, [describe(name, rng) for name in names]


def render(messages: list[dict], tools: list[dict], thinking: bool = True) -> str:
    """A conversation as CHAT_TEMPLATE renders it; without thinking, the last turn has the empty thought of its prompt."""
    text, messages = BOS, list(messages)
    if tools:
        system = messages.pop(0)["content"] + "\n\n" if messages[0]["role"] == "system" else ""
        lines = [json.dumps(tool["function"], ensure_ascii=False) + "\n" for tool in tools]
        text += f"{SYSTEM}{system}Tools:\n<tools>\n{''.join(lines)}</tools>{EOT}"
    roles = [message["role"] for message in messages]
    question = max(i for i, role in enumerate(roles) if role == "user")
    for i, (role, message) in enumerate(zip(roles, messages)):
        if role == "tool":
            # All of a turn's responses share one user turn.
            text += "\n" if roles[i - 1] == "tool" else USER
            text += f"<tool_response>\n{message['content']}\n</tool_response>"
            text += EOT if roles[i + 1] != "tool" else ""
            continue
        text += f"<|{role}|>"
        if role == "assistant" and i > question:
            if thinking:
                text += f"<think>\n{message['reasoning_content']}\n</think>\n\n"
            elif i == len(messages) - 1:
                text += NO_THOUGHT
        calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
        text += message["content"] + "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls) + EOT
    return text


def document(rng: random.Random, phase: str = "answer", held_out: bool = False) -> str:
    """One training text: a conversation, without thinking in a third of them; some of those end with the call."""
    if rng.random() < ECHOES[phase]:
        return render(echo(rng), [])
    questions, count = rng.choice((1, 1, 1, 1, 2, 2, 3)), rng.choice((0, 1, 2, 2, 3, 3, 4, 4))
    if phase == "learn":
        questions, count = 1, rng.choice((0, 1, 1, 1, 2))
    messages, tools = conversation(rng, questions, count, held_out)
    thinking = rng.random() < 2 / 3
    if not thinking and rng.random() < 0.5:
        last = max(i for i, message in enumerate(messages) if message["role"] == "user")
        messages = messages[: last + 2]
    return render(messages, tools, thinking)


def documents(seed: int, held_out: bool = False) -> Iterator[str]:
    """An endless sequence of texts; the same seed gives the same texts."""
    rng = random.Random(seed)
    while True:
        yield document(rng, held_out=held_out)


def held_out() -> list[str]:
    """Texts that the model was not trained on."""
    stream = documents(HELD_OUT_SEED, held_out=True)
    return [next(stream) for _ in range(HELD_OUT_TEXTS)]
