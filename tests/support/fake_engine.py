"""An engine that computes nothing and that tests control."""
import importlib
import threading


class FakeEngine:
    """Returns each prompt, one token per step, for a limited number of requests; waits while `gate` is closed."""

    name = "fake"

    def __init__(self, chapter, tokenizer, places=2, max_model_len=1000):
        outputs = importlib.import_module(f"milestones.{chapter.name}.outputs")
        self.StepOutput, self.Stats = outputs.StepOutput, outputs.Stats
        self.RequestError = chapter.load().RequestError
        self.tokenizer, self.places = tokenizer, places
        self.max_model_len = self.max_request_len = max_model_len
        self.requests, self.num_requests, self.aborted = {}, 0, []
        self.gate = threading.Event()
        self.gate.set()
        self.fault = None
        self.num_resets = 0

    def compile_grammars(self, params, call, is_wanted):
        return True

    def add_request(self, prompt, params, arrived=None):
        if 13 in prompt:
            raise self.RequestError("prompt has the token 13, which this engine refuses", "prompt")
        self.num_requests += 1
        self.requests[self.num_requests] = [list(prompt), params.max_tokens]
        return self.num_requests

    def abort_request(self, request_id):
        self.aborted.append(request_id)
        return self.requests.pop(request_id, None) is not None

    def has_unfinished_requests(self):
        return bool(self.requests)

    def running(self):
        return list(self.requests)[: self.places]

    def step(self):
        self.gate.wait()
        if self.fault:
            fault, self.fault = self.fault, None
            raise fault
        outputs = []
        for request_id in self.running():
            said = self.requests[request_id]
            token_id = said[0].pop(0)
            said[1] -= 1
            ended = not said[0] or not said[1]
            text = self.tokenizer.decode([token_id])
            outputs.append(self.StepOutput(request_id, token_id, text, None, "length" if ended else None))
            if ended:
                del self.requests[request_id]
        return outputs

    def close(self):
        self.requests.clear()

    def report_failed(self, request_ids):
        pass

    def report_nothing(self, request_ids):
        pass

    def take_report(self):
        return None

    def block_states(self):
        return bytes(self.places)

    def reset_prefix_cache(self):
        self.num_resets += 1

    def fail_step(self):
        failed = self.running()
        for request_id in failed:
            del self.requests[request_id]
        return failed

    def stats(self):
        running = len(self.running())
        return self.Stats(
            running=running,
            waiting=len(self.requests) - running,
            free_blocks=self.places - running,
            total_blocks=self.places,
        )
