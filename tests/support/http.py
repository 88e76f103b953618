"""One client for all tests: creating one takes longer than most requests."""
import json

import httpx

HTTP = httpx.Client(verify=False, timeout=30, limits=httpx.Limits(max_connections=None))


def post(server, path, body, **options):
    """Send a body to a server, as JSON, or as is if it is bytes."""
    content = {"json": body} if isinstance(body, (dict, list)) else {"content": body}
    headers = {"content-type": "application/json"} | options.pop("headers", {})
    return HTTP.post(f"{server.url}{path}", headers=headers, **content, **options)


def assert_names(response, param):
    """Assert a 400 in OpenAI's format that names the parameter; return the error."""
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["param"].split(".")[0] == param.split(".")[0] and error["param"].startswith(param)
    assert param.split("[")[0] in error["message"] or param in ("messages", "input")
    return error


def counts(usage):
    """The numbers of tokens in a usage object of OpenAI's client, without where they came from."""
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


def events_of(response):
    """The JSON of each event of a stream; its last one must be [DONE]."""
    data = [line.removeprefix("data: ") for line in response.text.split("\n") if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(each) for each in data[:-1]]
