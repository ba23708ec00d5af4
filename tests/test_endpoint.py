"""A served model, asked over HTTP, answers what the loaded one does. The server is ours, on this machine."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from builders import make_llama, make_tokenizer

from gradpruner.data.examples import Example
from gradpruner.errors import ConfigError, ResourceError
from gradpruner.evaluation.endpoint import Endpoint
from gradpruner.evaluation.quality import evaluate

EXAMPLES = [
    Example("a", "the red cat", " sat", (" sat", " ran away")),
    Example("b", "a dog in the big house", " ran away", (" sat", " ran away")),
]


class Served(ThreadingHTTPServer):
    """What vLLM does with /v1/models and /v1/completions, for a model in memory."""

    def __init__(self, model, tokenizer, echoes=True):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.tokenizer, self.echoes = model, tokenizer, echoes
        self.names, self.requests, self.headers = ["tiny"], [], []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def complete(self, ids, body):
        with torch.no_grad():
            logits = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        scores = [None] + [float(logits[i, token]) for i, token in enumerate(ids[1:])]
        end, new = self.tokenizer.eos_token_id, []
        while len(new) < body["max_tokens"]:
            with torch.no_grad():
                new.append(int(self.model(torch.tensor([ids + new])).logits[0, -1].argmax()))
            if new[-1] == end:
                break
        stopped = new[-1] == end
        text = self.tokenizer.decode(new[:-1] if stopped else new, clean_up_tokenization_spaces=False)
        reply = {"text": text, "finish_reason": "stop" if stopped else "length"}
        if body.get("echo") and self.echoes:
            reply["logprobs"] = {"token_logprobs": [*scores, -1.0]}
        return reply


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply({"data": [{"id": name} for name in self.server.names]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        self.server.headers.append(dict(self.headers))
        choices = [self.server.complete(ids, body) | {"index": i} for i, ids in enumerate(body["prompt"])]
        self.reply({"choices": choices[::-1]})  # in no particular order

    def reply(self, value):
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def served():
    tokenizer = make_tokenizer()
    server = Served(make_llama(vocab_size=len(tokenizer)).eval(), tokenizer)
    yield server
    server.shutdown()
    server.server_close()


def test_it_answers_what_the_loaded_model_answers(served):
    there = evaluate(Endpoint(served.url), served.tokenizer, EXAMPLES, max_new_tokens=4, max_length=64)
    here = evaluate(served.model, served.tokenizer, EXAMPLES, max_new_tokens=4, max_length=64)
    for one, two in zip(there.outputs, here.outputs, strict=True):
        assert (one.generated, one.finished, one.chosen) == (two.generated, two.finished, two.chosen)
        assert one.choice_scores == pytest.approx(two.choice_scores, abs=1e-4)
    assert list(there.metrics) == list(here.metrics)
    assert served.requests[0]["temperature"] == 0
    assert all(isinstance(token, int) for token in served.requests[0]["prompt"][0])


def test_prompts_go_in_batches(served):
    evaluate(
        Endpoint(served.url, batch_size=1), served.tokenizer, EXAMPLES, metrics=["exact_match"], max_length=64
    )
    assert [len(body["prompt"]) for body in served.requests] == [1, 1]


def test_a_key_is_sent(served, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    evaluate(Endpoint(served.url), served.tokenizer, EXAMPLES, metrics=["exact_match"], max_length=64)
    assert served.headers[0]["Authorization"] == "Bearer secret"


def test_a_server_without_echo_is_refused(served):
    served.echoes = False
    with pytest.raises(ConfigError, match="log-probabilities of a prompt") as caught:
        evaluate(Endpoint(served.url), served.tokenizer, EXAMPLES, max_length=64)
    assert "exact_match" in caught.value.hint


def test_which_model(served):
    with pytest.raises(ConfigError, match="does not serve 'other'"):
        Endpoint(served.url, "other")
    served.names = ["one", "two"]
    with pytest.raises(ConfigError, match="serves 2 models: one, two"):
        Endpoint(served.url)
    assert Endpoint(served.url, "two").name == "two"


@pytest.mark.parametrize("url", ["localhost:8000", "file:///etc/passwd", "http://", "ftp://x/v1"])
def test_what_is_no_address(url):
    with pytest.raises(ConfigError, match="is no address"):
        Endpoint(url)


def test_nobody_answers(served):
    url = served.url
    served.shutdown()
    served.server_close()
    with pytest.raises(ResourceError, match="No answer from") as caught:
        Endpoint(url)
    assert "vllm serve" in caught.value.hint


def test_a_server_that_refuses(served, monkeypatch):
    def refuse(self):
        self.send_error(400, "no such thing")

    monkeypatch.setattr(Handler, "do_POST", refuse)
    with pytest.raises(ResourceError, match="answered 400"):
        evaluate(Endpoint(served.url), served.tokenizer, EXAMPLES, metrics=["exact_match"], max_length=64)
