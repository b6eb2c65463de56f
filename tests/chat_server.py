"""An OpenAI-compatible chat server on loopback that judges honestly, or misbehaves as it is told."""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ANSWERS = re.compile(r"<answer_A>\n(.*?)\n</answer_A>.*<answer_B>\n(.*?)\n</answer_B>", re.DOTALL)


@dataclass
class Say:
    """One answer of the server: a chat completion with `text`, or the literal `body`."""

    text: str = ""
    status: int = 200
    headers: dict = field(default_factory=dict)
    body: str | None = None
    usage: bool = True
    delay: float = 0.0
    hang_up: bool = False
    message: dict = field(default_factory=dict)
    finish_reason: str = "stop"

    def content(self):
        if self.body is not None:
            return self.body
        if self.status != 200:
            return json.dumps({"error": {"message": self.text, "code": self.message.get("code")}})
        choice = {"index": 0, "finish_reason": self.finish_reason}
        choice["message"] = {"role": "assistant", "content": self.text, **self.message}
        usage = {"usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}} if self.usage else {}
        return json.dumps({"id": "1", "object": "chat.completion", "created": 0, "choices": [choice], **usage})


def longer(question):
    """An honest judge: the longer answer is better."""
    one, two = (len(text) for text in ANSWERS.search(question).groups())
    return Say("Because. " + json.dumps({"verdict": "A" if one > two else "B" if two > one else "tie"}))


class Judging:
    """What the server says, and what it was asked. `first` are its answers before it becomes honest."""

    def __init__(self, *first, answer=longer):
        self.first, self.answer = list(first), answer
        self.bodies, self.times, self.keys, self.at_once, self.most_at_once = [], [], [], 0, 0
        self.reached, self.reach = threading.Event(), None
        self._lock = threading.Lock()
        self.url = ""

    @property
    def questions(self):
        return [body["messages"][-1]["content"] for body in self.bodies]

    def handle(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            assert handler.path == "/v1/chat/completions"
            self.bodies.append(body)
            self.times.append(time.monotonic())
            self.keys.append(handler.headers["Authorization"])
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            say = self.first.pop(0) if self.first else self.answer(body["messages"][-1]["content"])
            if len(self.bodies) == self.reach:
                self.reached.set()
        time.sleep(say.delay)
        with self._lock:
            self.at_once -= 1
        if say.hang_up:
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True
            return
        content = say.content().encode()
        handler.send_response(say.status)
        for name, value in {"Content-Type": "application/json", **say.headers}.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)


@contextmanager
def serving(judging):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            judging.handle(self)

        def log_message(self, *args):
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request, client_address):
            # Clients that gave up or were killed do not read their answer.
            if not isinstance(sys.exception(), OSError):
                super().handle_error(request, client_address)

    server = Quiet(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    judging.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield judging
    finally:
        server.shutdown()
        server.server_close()
