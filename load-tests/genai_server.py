"""An OpenAI-like front before onnxruntime-genai, which has none of its own, so that it can be measured as a peer.

    python genai_server.py MODEL_FOLDER PORT BATCH_MAX

Only what the load generator asks for: streamed chat completions, greedy, of exactly `max_tokens` tokens. On the CPU
onnxruntime-genai batches statically: what waits when a batch has ended becomes the next batch, padded to its longest
prompt, up to BATCH_MAX. Never meant for anything but a comparison on this machine.
"""

import http.server
import json
import queue
import sys
import threading
import time

import numpy
import onnxruntime_genai

WAITING_MAX = 256
# Requests that come together go together.
GATHERING_SECONDS = 0.02


class Engine(threading.Thread):
    """The one thread that talks to the model."""

    def __init__(self, folder, batch_max):
        super().__init__(daemon=True)
        self.model = onnxruntime_genai.Model(folder)
        self.tokenizer = onnxruntime_genai.Tokenizer(self.model)
        with open(f"{folder}/genai_config.json", encoding="utf-8") as file:
            self.pad = json.load(file)["model"]["pad_token_id"]
        self.batch_max = batch_max
        self.waiting = queue.Queue(WAITING_MAX)

    def prompt(self, messages):
        text = self.tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True)
        return list(self.tokenizer.encode(text))

    def run(self):
        while True:
            batch = [self.waiting.get()]
            if self.batch_max > 1:
                time.sleep(GATHERING_SECONDS)
            while len(batch) < self.batch_max:
                try:
                    batch.append(self.waiting.get_nowait())
                except queue.Empty:
                    break
            try:
                self.generate(batch)
            except Exception as fault:  # The client must not wait for an answer that will not come.
                for request in batch:
                    request.events.put(fault)

    def generate(self, batch):
        width = max(len(request.tokens) for request in batch)
        rows = [[self.pad] * (width - len(request.tokens)) + request.tokens for request in batch]
        length = width + max(request.max_tokens for request in batch)
        parameters = onnxruntime_genai.GeneratorParams(self.model)
        # Never shorter, as `ignore_eos` says.
        parameters.set_search_options(
            batch_size=len(batch), do_sample=False, max_length=length, min_length=length
        )
        generator = onnxruntime_genai.Generator(self.model, parameters)
        generator.append_tokens(numpy.array(rows if len(rows) > 1 else rows[0], dtype=numpy.int32))
        streams = [self.tokenizer.create_stream() for _ in batch]
        for made in range(1, length - width + 1):
            generator.generate_next_token()
            for request, stream, token in zip(batch, streams, generator.get_next_tokens()):
                if made <= request.max_tokens:
                    request.events.put(stream.decode(token))
                if made == request.max_tokens:
                    request.events.put(None)


class Request:
    def __init__(self, tokens, max_tokens):
        self.tokens, self.max_tokens = tokens, max_tokens
        self.events = queue.Queue(max_tokens + 2)


class Listener(http.server.ThreadingHTTPServer):
    # Clients that arrive together must not be refused.
    request_queue_size = WAITING_MAX


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    engine = None

    def do_GET(self):
        self.reply(200 if self.path == "/health" else 404, {})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        request = Request(self.engine.prompt(asked["messages"]), asked["max_tokens"])
        try:
            self.engine.waiting.put_nowait(request)
        except queue.Full:
            self.reply(429, {"error": {"message": "too many requests wait"}})
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True
        while (event := request.events.get()) is not None:
            if isinstance(event, Exception):
                self.event({"error": {"message": str(event)}})
                return
            self.event({"choices": [{"index": 0, "delta": {"content": event}}]})
        usage = {"prompt_tokens": len(request.tokens), "completion_tokens": request.max_tokens}
        self.event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, body):
        self.wfile.write(b"data: " + json.dumps(body).encode() + b"\n\n")

    def reply(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def main():
    folder, port, batch_max = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    Handler.engine = Engine(folder, batch_max)
    Handler.engine.start()
    Listener(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
