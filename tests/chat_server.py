"""A server on loopback that speaks OpenAI's chat protocol, and misbehaves as it is told.

    python tests/chat_server.py LOG '{"trouble": ["429", "hang"], "wait": 0.01, "refuse": 5}'

It prints its port. LOG gets a line of JSON when a request has come and one when it was answered.
`trouble`: what the first requests for each body meet, in order; with "each": true every body meets one
of them, in turn. `wait`: s before an answer. `refuse`: after so many answers everybody gets 401.
"""
import hashlib
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LOG, PLAN = None, {}  # set at the end of this file
LOCK, ASKED, STATE = threading.Lock(), {}, {"now": 0, "answered": 0}

# what a server may say that is no answer: bytes of a body with status 200
NONSENSE = {
    "bad json": b'{"choices": [',
    "a list": b"[]",
    "a number": b"7",
    "no choices": b'{"error": "busy"}',
    "none chosen": b'{"choices": []}',
    "no text": b'{"choices": [{"message": {"content": null}}]}',
    "parts": b'{"choices": [{"message": {"content": [{"text": "x"}]}}]}',
    "half a character": b'{"choices": [{"message": {"content": "\\ud800"}}]}',
    "no text at all": b"\xff\xfe\x00",
    "deep": b"[" * 100_000,
    "empty": b"",
}


def answer_to(body):
    """The text that the server has for a body, so that a test can tell one from another."""
    return f"Text {hashlib.sha256(body).hexdigest()}."


class Chat(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def send(self, code, data=b"{}", **headers):
        self.send_response(code)
        for name, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        with LOCK:
            LOG.write(json.dumps({"what": "get", "auth": self.headers.get("Authorization")}) + "\n")
        self.send(200)

    def do_POST(self):
        size = int(self.headers["Content-Length"])
        body = self.rfile.read(size)
        if len(body) < size:
            return  # its client was killed half-way through
        name = hashlib.sha256(body).hexdigest()
        with LOCK:
            STATE["now"] += 1
            first = name not in ASKED
            order, count = ASKED.setdefault(name, [len(ASKED), 0])
            ASKED[name][1] += 1
            trouble = PLAN.get("trouble", [])
            if PLAN.get("each"):
                trouble = [trouble[order % len(trouble)]]
            what = trouble[count] if count < len(trouble) else "answer"
            if what == "answer" and STATE["answered"] >= PLAN.get("refuse", 10**9):
                what = "401"
            LOG.write(json.dumps({
                "what": what, "name": name, "now": STATE["now"], "path": self.path, "time": time.time(),
                "auth": self.headers.get("Authorization"), "body": body.decode() if first else "",
            }) + "\n")
        try:
            self.reply(what, body)
            with LOCK:
                STATE["answered"] += what == "answer"
                LOG.write(json.dumps({"what": "done", "name": name, "as": what}) + "\n")
        except OSError:
            pass  # the client is gone
        finally:
            with LOCK:
                STATE["now"] -= 1

    def reply(self, what, body):
        time.sleep(PLAN.get("wait", 0))
        text = json.dumps({"choices": [{"message": {"content": f" {answer_to(body)}\n"}}]}).encode()
        if what == "hang":
            time.sleep(PLAN.get("hang", 1.5))
        elif what == "cut":
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text[:20])
            self.close_connection = True
        elif what == "cut at once":
            self.close_connection = True
        elif what == "redirect":
            self.send(302, Location=PLAN["to"])
        elif what == "soon":  # 429 with a time to wait
            self.send(429, Retry_After="0")
        elif what == "odd":
            self.send(503, Retry_After="\xb2")
        elif what in NONSENSE:
            self.send(200, NONSENSE[what])
        elif what.isdigit():
            self.send(int(what))
        else:
            self.send(200, text, Content_Type="application/json")


if __name__ == "__main__":
    LOG, PLAN = open(sys.argv[1], "a", buffering=1), json.loads(sys.argv[2])
    ThreadingHTTPServer.daemon_threads = True
    server = ThreadingHTTPServer(("127.0.0.1", 0), Chat)
    print(server.server_port, flush=True)
    server.serve_forever()
