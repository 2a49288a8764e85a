"""A small server that continues prompts with a model's own greedy answers, streamed if asked, as an engine does."""

import json
import threading

from openai_server import Server, _Handler


class EngineServer(Server):
    """`openai_server.Server` with a loaded model; `breaks` lists after how many events the next streams break off."""

    def __init__(self, alpaca, **settings):
        super().__init__(models=[f"models/{alpaca.name}"], apis=["completions"], answer=self._continue, **settings)
        self.RequestHandlerClass = _StreamingHandler
        self.alpaca, self.breaks, self.known, self.model_lock = alpaca, [], {}, threading.Lock()

    def _continue(self, prompt: str) -> str:
        with self.model_lock:
            if prompt not in self.known:
                ids = self.alpaca.tokenizer(prompt)["input_ids"]
                settings = self.alpaca.settings(self.requests[-1][1]["max_tokens"], 0.0, 1.0)
                self.known[prompt] = self.alpaca.decode(self.alpaca.generate([ids], settings)[0])
            return self.known[prompt]


class _StreamingHandler(_Handler):
    def _answer(self, path, body, fault):
        if not body.get("stream") or fault or self.server.refusal(path, body):
            return super()._answer(path, body, fault)
        text = self.server.answer(body["prompt"])
        breaks = self.server.breaks.pop(0) if self.server.breaks else None
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        for number, start in enumerate(range(0, len(text), 3)):
            if number == breaks:
                return None
            self._event({"index": 0, "text": text[start : start + 3], "finish_reason": None})
        self._event({"index": 0, "text": "", "finish_reason": "stop"})
        self.wfile.write(b"data: [DONE]\n\n")
        return None

    def _event(self, choice):
        self.wfile.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
        self.wfile.flush()
