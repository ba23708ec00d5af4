"""A served model answers like a loaded one. The HTTP servers are our own, on this machine."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from builders import make_llama, make_tokenizer

from gradpruner.common.errors import ConfigError, ResourceError
from gradpruner.data.examples import Example
from gradpruner.evaluation import connection
from gradpruner.evaluation.endpoint import Endpoint
from gradpruner.evaluation.quality import evaluate

EXAMPLES = [
    Example("a", "the red cat", " sat", (" sat", " ran away")),
    Example("b", "a dog in the big house", " ran away", (" sat", " ran away")),
]


class Served(ThreadingHTTPServer):
    """Answers /v1/models and /v1/completions as vLLM does, with a model in memory."""

    def __init__(self, model, tokenizer, echoes=True):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.tokenizer, self.echoes = model, tokenizer, echoes
        self.names, self.requests, self.headers = ["tiny"], [], []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

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


def test_it_answers_like_the_loaded_model(served):
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


def test_the_name_of_the_model_is_checked(served):
    with pytest.raises(ConfigError, match="does not serve 'other'"):
        Endpoint(served.url, "other")
    served.names = ["one", "two"]
    with pytest.raises(ConfigError, match="serves 2 models: one, two"):
        Endpoint(served.url)
    assert Endpoint(served.url, "two").name == "two"


@pytest.mark.parametrize(
    "url",
    ["localhost:8000", "file:///etc/passwd", "http://", "ftp://x/v1", "http://[::1", "http://x:none/v1",
     "http://x/v1 ", "http://x/\nv1", "http://x/v1?a=b", "http://x/v1#a"],
)  # fmt: skip
def test_invalid_addresses(url):
    with pytest.raises(ConfigError, match=r"is not the address|more than a path"):
        Endpoint(url)


def test_a_password_in_the_address_is_refused_and_not_repeated():
    with pytest.raises(ConfigError, match="OPENAI_API_KEY") as caught:
        Endpoint("http://me:hunter2@localhost:8000/v1")
    assert "hunter2" not in str(caught.value)


def test_a_key_with_invalid_characters(served, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "two\r\nlines: x")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY"):
        Endpoint(served.url)


def test_no_server_at_the_address(served):
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


class Questions:
    """Stands in for two questions, with prompts of two tokens and two options of one token."""

    class tokenizer:
        encode = staticmethod(lambda text, add_special_tokens: list(text))
        decode = staticmethod(lambda ids: f"<{ids[0]}>")

    def __init__(self, *ends):
        self.template_ends = list(ends)

    def cut_prompt(self, index, max_new_tokens):
        return [1, 2]

    def option_set(self, index):
        return type("Set", (), {"prompt": [1, 2], "targets": [[3], [4]]})


class Stranger(BaseHTTPRequestHandler):
    """Sends the bytes in the server's `replies`: one entry per request, the last one for all further ones."""

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.bodies += [json.loads(body)] if body else []
        self.server.seen.append((self.command, self.headers.get("Authorization")))
        replies = self.server.replies
        try:
            for part in replies.pop(0) if len(replies) > 1 else replies[0]:
                self.wfile.write(part)
        except OSError:
            pass
        self.close_connection = True

    do_GET = do_POST = answer

    def log_message(self, *_):
        pass


def reply(body, status=200, *more):
    head = [f"HTTP/1.1 {status} Reason", f"Content-Length: {len(body)}", "Connection: close", *more]
    return ["\r\n".join([*head, "", ""]).encode() + body]


MODELS = reply(b'{"data": [{"id": "x"}]}')


@pytest.fixture
def stranger(monkeypatch):
    """Returns a factory of servers with given replies; pauses between retries are short."""
    monkeypatch.setattr(connection, "_pause", lambda attempt: 0.01)
    servers = []

    def make(*replies):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Stranger)
        server.daemon_threads = True
        server.replies, server.seen, server.bodies = list(replies), [], []
        server.url = f"http://127.0.0.1:{server.server_port}/v1"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return server

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(server):
    return list(Endpoint(server.url).answers(Questions(), [0, 1], 4))


def score(server):
    return list(Endpoint(server.url).option_scores(Questions(), [0]))


def choices(*entries):
    return reply(json.dumps({"choices": list(entries)}).encode())


def endless():
    yield b"HTTP/1.1 200 OK\r\n\r\n"
    while True:
        yield b" " * 65536


@pytest.mark.parametrize(
    "replies",
    [
        reply(b'{"data": null}'), reply(b'{"data": "abc"}'), reply(b'{"data": [1]}'), reply(b"[]"),
        reply(b"null"),
        reply(b'{"data": [{"id": 5}]}'), reply(b'{"data": [{"id": ""}]}'), reply(b'{"data": [], "data": []}'),
        reply(b"<html>"), reply(b""), reply(b"\xff\xfe{}"), reply(b"[" * 200_000), reply(b"9" * 5000),
        reply(b'{"data": [{"id": "\\ud800"}]}'), reply(b'{"a": NaN}'), reply(b'{"a": 1e999}'),
        [b"hello\r\n\r\n"], [], [b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"],
        [b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n{}"],
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n"],
        [b"HTTP/1.1 200 OK\r\n" + b"X: " + b"x" * 500_000 + b"\r\n\r\n{}"],
        reply(b"{}", 200, "Content-Encoding: gzip"), reply(b"{}", 204), reply(b"no", 404),
        reply(b"\xff", 401),
    ],
)  # fmt: skip
def test_invalid_lists_of_models(stranger, replies):
    with pytest.raises(ResourceError):
        Endpoint(stranger(replies).url)


@pytest.mark.parametrize(
    "entries",
    [
        [], [{"index": 0, "text": "a"}], [{"index": i, "text": "a"} for i in range(3)],
        [{"index": 0}, {"index": 1}], [{"index": 0, "text": None}, {"index": 1, "text": "a"}],
        [{"index": 0, "text": "a"}, {"index": "b", "text": "a"}], [{"index": 0, "text": "a"}] * 2,
        [{"text": "a"}, {"text": "b"}], [{"index": 0, "text": "a"}, {"index": True, "text": "a"}],
        [{"index": 1, "text": "a"}, {"index": 2, "text": "a"}], [{"index": 0, "text": 5}, None], ["a", "b"],
    ],
)  # fmt: skip
def test_invalid_answers(stranger, entries):
    with pytest.raises(ResourceError, match="sent a reply that cannot be used"):
        ask(stranger(MODELS, choices(*entries)))


def test_a_single_answer_may_lack_its_index_but_not_have_a_wrong_one(stranger):
    def first(entry):
        return list(Endpoint(stranger(MODELS, choices(entry)).url).answers(Questions(), [0], 4))

    assert first({"text": "a"})[0][1][0].text == first({"text": "a", "index": 0})[0][1][0].text == "a"
    with pytest.raises(ResourceError, match=r"the indexes \[1\]"):
        first({"text": "a", "index": 1})


@pytest.mark.parametrize("value", [None, "a", True, 0.5, [], -(10**400)])
def test_invalid_log_probabilities(stranger, value):
    entries = [{"index": i, "text": "", "logprobs": {"token_logprobs": [None, -1, value]}} for i in (0, 1)]
    with pytest.raises(ResourceError, match=r"log-probability|64 bits"):
        score(stranger(MODELS, choices(*entries)))


def test_answers_are_sorted_and_the_first_token_needs_no_log_probability(stranger):
    two = [{"index": 1, "text": "b"}, {"index": 0, "text": "a", "finish_reason": "stop"}]
    ((indices, found),) = ask(stranger(MODELS, choices(*two)))
    assert indices == [0, 1] and [(a.text, a.finished) for a in found] == [("a", True), ("b", False)]
    held = [{"index": i, "text": "", "logprobs": {"token_logprobs": [None, None, -i - 0.5]}} for i in (0, 1)]
    assert score(stranger(MODELS, choices(*held))) == [([0], [[-0.5, -1.5]])]


def test_the_end_token_of_a_chat_template_ends_an_answer(stranger):
    entries = [{"text": "cat<7>dog", "index": 0, "finish_reason": "length"}]
    entries += [{"text": "cat dog", "index": 1, "finish_reason": "length"}]
    server = stranger(MODELS, choices(*entries))
    ((_, (cut, whole)),) = Endpoint(server.url).answers(Questions(7), [0, 1], 9)
    assert (cut.text, cut.finished) == ("cat", True) and (whole.text, whole.finished) == ("cat dog", False)
    assert server.bodies[-1]["stop"] == ["<7>"] and server.bodies[-1]["stop_token_ids"] == [7]
    server = stranger(MODELS, choices(*entries))
    assert len(list(Endpoint(server.url).answers(Questions(), [0, 1], 9))) == 1
    assert "stop" not in server.bodies[-1]  # the server knows the tokenizer's own


def test_a_key_goes_to_no_other_host(stranger, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    other = stranger(MODELS)
    for status in (301, 302, 303, 307, 308):
        one = stranger(reply(b"", status, f"Location: http://localhost:{other.server_port}/models"))
        with pytest.raises(ResourceError, match="Redirects are not followed"):
            Endpoint(one.url)
        assert one.seen == [("GET", "Bearer secret")]
    assert other.seen == []


@pytest.mark.parametrize("status", [429, 500, 503])
def test_transient_failures_are_retried(stranger, status):
    server = stranger(reply(b"busy", status), reply(b"busy", status), MODELS)
    assert Endpoint(server.url).name == "x" and len(server.seen) == 3
    never = stranger(reply(b"busy", status))
    with pytest.raises(ResourceError, match=f"answered {status}: busy .tried {connection.TRIES} times"):
        Endpoint(never.url)
    assert len(never.seen) == connection.TRIES


def test_other_errors_are_not_retried(stranger):
    server = stranger(reply(b"bad", 400))
    with pytest.raises(ResourceError, match="answered 400: bad"):
        Endpoint(server.url)
    assert len(server.seen) == 1


def test_pauses_grow_and_respect_retry_after():
    for attempt, most in ((1, 0.5), (2, 1), (3, 2), (4, 4), (20, 60)):
        assert most / 2 <= connection._pause(attempt) <= most


def test_an_endless_body_is_cut_off(stranger, monkeypatch):
    monkeypatch.setattr("gradpruner.evaluation.endpoint._MODELS_LIMIT", 10**6)
    with pytest.raises(ResourceError, match="more than 1000000 bytes"):
        Endpoint(stranger(endless()).url)


def test_the_deadline_covers_endless_headers(stranger, monkeypatch):
    def drip():
        yield b"HTTP/1.1 200 OK\r\nX: "
        while True:
            time.sleep(0.05)
            yield b"x"

    monkeypatch.setattr(connection, "DEADLINE_SECONDS", 0.5)
    started = time.monotonic()
    with pytest.raises(ResourceError, match=r"within 0\.5 seconds"):
        Endpoint(stranger(drip()).url)
    assert time.monotonic() - started < 10
