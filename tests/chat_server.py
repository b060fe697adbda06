"""A server on loopback that speaks OpenAI's chat protocol, and misbehaves as it is told.

    python tests/chat_server.py LOG '{"trouble": ["429", "hang"], "wait": 0.01, "refuse": 5}'

It prints its port. LOG gets a line of JSON when a request has come and one when it was answered.
`trouble`: what the first requests for each body meet, in order; with "each": true every body meets one
of them, in turn. `wait`: s before an answer. `refuse`: after so many answers everybody gets 401.
`tiny`: the embedded model answers, read through its own chat template. `reason`: said beside a status.
"""
import base64
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


def told(content):
    """An answer with a box, and something in place of the log-probabilities of its tokens."""
    return b'{"choices": [{"message": {"content": "[1, 2, 3, 4]"}, "logprobs": %b}]}' % content


NONSENSE |= {f"told {what.decode()[:40]}": told(what) for what in (
    b"7", b"[1]", b'{"content": 7}', b'{"content": "abc"}', b'{"content": [{"token": "[1, 2, 3, 4]"}]}',
    b'{"content": [{"token": "[1, 2, 3, 4]", "logprob": NaN}]}',
    b'{"content": [{"token": "[1, 2, 3, 4]", "logprob": -1e999}]}',
    b'{"content": [{"token": "[1, 2, 3, 4]", "logprob": null}]}',
    b'{"content": [{"token": 7, "logprob": -1.0}]}')}


class Tiny:
    """The embedded model: what its chat template makes of messages is read and answered."""

    def __init__(self):
        import torch
        from ivt_min.model import load
        torch.set_num_threads(1)
        self.vlm, self.lock = load(device="cpu"), threading.Lock()

    def dialogue(self, messages):
        from ivt_min.model import Dialogue, to_patches
        vlm, pictures, chat = self.vlm, [], []
        for m in messages:
            content = m["content"]
            if not isinstance(content, str):
                content = []
                for part in m["content"]:
                    if part["type"] == "image_url":
                        head, data = part["image_url"]["url"].split(",")
                        assert head == "data:image/png;base64"
                        pictures.append(to_patches(vlm, base64.b64decode(data)))
                        part = {"type": "image"}
                    content.append(part)
            chat.append({"role": m["role"], "content": content})
        text = vlm.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        first, *rest = text.split("<|image_pad|>")
        for picture, after in zip(pictures, rest, strict=True):
            first += "<|image_pad|>" * (picture.grid[1] * picture.grid[2] // 4) + after
        return Dialogue(tuple(vlm.tokenizer.encode(first, add_special_tokens=False)), tuple(pictures))

    def choice(self, asked):
        from ivt_min.answer import answer
        with self.lock:
            keys = [("served", asked["seed"])] if asked["temperature"] else None
            [turn], _ = answer(self.vlm, [self.dialogue(asked["messages"])], None,
                               asked["max_tokens"], asked["temperature"], keys)
        tokens = [{"token": self.vlm.tokenizer.decode([i]), "logprob": p, "bytes": None, "top_logprobs": []}
                  for i, p in zip(turn.ids, turn.logps)]
        logprobs = {"content": tokens} if asked.get("logprobs") else None
        return {"message": {"content": turn.text}, "logprobs": logprobs}


def answer_to(body):
    """The text that the server has for a body, so that a test can tell one from another."""
    return f"Text {hashlib.sha256(body).hexdigest()}."


class Chat(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def drip(self, part, pause, longest=6):
        end = time.time() + longest
        while time.time() < end:
            self.wfile.write(part)
            time.sleep(pause)

    def send(self, code, data=b"{}", **headers):
        self.send_response(code, PLAN.get("reason"))
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
        choice = {"message": {"content": f" {answer_to(body)}\n"}}
        if what == "answer" and "tiny" in PLAN:
            choice = PLAN["tiny"].choice(json.loads(body))
        text = json.dumps({"choices": [choice]}).encode()
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
        elif what == "drip":  # a byte now and then, for as long as anybody listens
            self.send_response(200)
            self.end_headers()
            self.drip(b" ", .1)
        elif what == "drip head":
            self.wfile.write(b"HTTP/1.0 200 OK\r\nX: ")
            self.drip(b"x", .1)
        elif what == "continue":
            self.drip(b"HTTP/1.1 100 Continue\r\n\r\n", .01)
        elif what == "later":
            self.send(503, Retry_After="9" * 5000)
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
    if "tiny" in PLAN: PLAN["tiny"] = Tiny()
    ThreadingHTTPServer.daemon_threads = True
    server = ThreadingHTTPServer(("127.0.0.1", 0), Chat)
    print(server.server_port, flush=True)
    server.serve_forever()
