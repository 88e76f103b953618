"""The service against its own schema: whatever that allows, and a little more, is answered without a 5xx."""
import pytest
import schemathesis
import schemathesis.specs.openapi.schemas  # now: pytest parses modules as they are imported, which Python 3.11 cannot do in two threads at once
from hypothesis import HealthCheck, given, seed, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from shared.checkpoints import checkpoint
from shared.verify.serving import serving

pytestmark = pytest.mark.needs("openai")

CHECKS = (not_a_server_error, response_schema_conformance, content_type_conformance)


@pytest.fixture(scope="session")
def server(chapter, engine_way):
    engine = chapter.load().Engine(checkpoint("pocket"), max_num_seqs=16, max_model_len=256)
    # The server's thread must not be the first to compile the chat template, while hypothesis parses: see the import above.
    engine.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    # A small default for the number of tokens fits more requests into the time.
    with serving(chapter, engine, default_max_tokens=2, max_waiting=16) as server:
        yield server


def test_no_request_that_the_schema_allows_is_a_5xx(server, chapter, num_examples=30):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    posts = {"/v1/completions", "/v1/chat/completions", *(["/v1/responses"] if "responses" in chapter.capabilities else [])}
    assert {operation.path for operation in operations} >= posts
    statuses = {}
    for operation in operations:
        seen = statuses[f"{operation.method} {operation.path}"] = set()
        fuzz(operation, seen, num_examples if operation.method == "post" else 5)
    # If everything had been refused, this would test nothing.
    for path in posts:
        assert 200 in statuses[f"post {path}"] and 400 in statuses[f"post {path}"], statuses


SIMPLE = {"messages": [{"role": "user", "content": "Hi"}], "input": "Hi", "tools": [], "tool_choice": "auto", "chat_template_kwargs": {}}


def fuzz(operation, seen, num_examples):
    tried = []

    @seed(1)
    @settings(max_examples=num_examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy())
    def one(case):
        # Random names are hardly ever the model's.
        if isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = "pocket"
            # Nor do random results belong to calls, and random names of functions to tools: every third body does without.
            tried.append(1)
            if len(tried) % 3 == 0:
                for name in SIMPLE.keys() & case.body.keys():
                    case.body[name] = SIMPLE[name]
        response = case.call(timeout=20)
        seen.add(response.status_code)
        case.validate_response(response, checks=CHECKS)

    one()
