"""A small OpenAI-compatible server that can be told to fail. Its answers depend on the prompt alone.

    python tests/openai_server.py --seconds_per_answer 1    # prints its base URL; for benchmarks/generation.py

In a test: `with Server(models=["tiny"]) as server: ... server.base_url`. `server.faults` lists the faults of the next
completions, one each, for instance
    {"status": 429, "error": {...}, "headers": {"Retry-After": "1"}}   {"drop": True}   {"half": True}   {"raw": "hi"}
or a function from the request's body to a fault. `server.refuses` maps a parameter to the status and body with which
every request that has it is refused. `Server(context=2048, wording="vllm")` has a model with so short a context and
refuses in the words of that server. `server.down = 503, {...}` answers everything like that.
"""

import hashlib
import json
import random
import re
import sys
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_TEXT = (
    "amber anchor badger barley beacon birch bishop blossom bramble brass bridge candle canyon cedar cherry cinder "
    "clover cobalt comet copper coral cotton cricket crystal daisy dapple delta desert drift eagle ember fable falcon "
    "fathom feather fennel ferry fiddle flint forest fossil garnet ginger glacier granite harbor hazel heather hollow "
    "honey indigo island ivory jasmine jasper juniper kettle lagoon lantern lavender lemon lily linen lotus lunar "
    "magnet maple marble meadow mellow mirror mosaic nectar nickel nutmeg oak ocean olive onyx opal orchid otter "
    "paper pearl pebble pepper pine plover poplar prairie quartz quill raven reef ribbon river rosemary ruby saddle "
    "saffron sage salmon sand sapphire shadow silver sparrow spruce stone summit sunset swallow tango thistle thunder "
    "tiger timber topaz tulip tundra umber valley velvet violet walnut willow winter yarrow zephyr zinc"
)
WORDS = _TEXT.split()


def tasks_for(prompt: str, count: int = 17) -> list[tuple[str, str, str]]:
    """Returns the tasks in the server's answer: different for every prompt, the same for the same prompt."""
    rng = random.Random(hashlib.sha256(prompt.encode()).hexdigest())
    tasks = []
    for _ in range(count):
        words = rng.sample(WORDS, 9)
        given = f"{words[5]} and {words[6]}" if rng.random() < 0.4 else "<noinput>"
        tasks.append((f"Tell how {' '.join(words[:6])} differ.", given, f"They differ by {words[7]}.\n- {words[8]}"))
    return tasks


def completion_for(prompt: str, tasks: list[tuple[str, str, str]] | None = None) -> str:
    """Writes a well-formed completion, like those of the original's model."""
    first = int(re.findall(r"^(\d+)\. Instruction:", prompt, re.MULTILINE)[-1])
    text = ""
    for number, (instruction, given, output) in enumerate(tasks or tasks_for(prompt), start=first):
        text += f"###\n{number}. Instruction: {instruction}\n{number}. Input:\n{given}\n{number}. Output:\n{output}\n"
    return text.removeprefix(f"###\n{first}. Instruction:").removesuffix("\n")


class Server(ThreadingHTTPServer):
    """See the module's docstring. `requests` holds the path and body of every completion that was asked for."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(
        self, models=("tiny",), key=None, seconds_per_answer=0.0, apis=("chat", "completions"), answer=None,
        context=None, wording="openai", port=0,
    ):  # fmt: skip
        super().__init__(("127.0.0.1", port), _Handler)
        self.context, self.wording, self.down, self.probes = context, wording, None, 0
        self.models, self.key, self.seconds, self.apis = list(models), key, seconds_per_answer, apis
        self.answer = answer or completion_for
        self.base_url = f"http://127.0.0.1:{self.server_port}/v1"
        self.faults, self.refuses, self.requests, self.files, self.batches = [], {}, [], {}, {}
        self.polls_per_batch = 1
        self.answered, self.in_flight, self.most_in_flight = 0, 0, 0
        self.began, self.ended, self.busy = None, 0.0, 0.0  # first request, last answer, work; seconds
        self.lock = threading.Lock()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """Prints errors, but not that a client has hung up: many tests do."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def model_list(self) -> dict:
        """Returns the body of /models."""
        return {"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]}

    def prompts(self) -> list[str]:
        """Returns the prompts of all requests in order of arrival."""
        return [_prompt_of(body) for _, body in self.requests]

    def completion(self, path: str, body: dict) -> dict:
        """Returns the body of an answer."""
        prompt = _prompt_of(body)
        answer = self.answer(prompt)
        answer = answer if isinstance(answer, dict) else {"text": answer}
        text, reason = answer["text"], answer.get("finish_reason", "stop")
        chat = path.endswith("/chat/completions")
        content = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        usage = {"prompt_tokens": len(prompt) // 4, "completion_tokens": len(text) // 4}
        usage["total_tokens"] = sum(usage.values())
        choice = {"index": 0, "finish_reason": reason, **content}
        kind = "chat.completion" if chat else "text_completion"
        return {"id": f"c-{uuid.uuid4()}", "object": kind, "model": body["model"], "choices": [choice], "usage": usage}

    def refusal(self, path: str, body: dict) -> tuple[int, dict] | None:
        """Returns status and body if this server was told to refuse such a request, else None."""
        chat = path.endswith("/chat/completions")
        if ("chat" if chat else "completions") not in self.apis:
            return 404, {"detail": "Not Found"}
        if body.get("model") not in self.models and "/deployments/" not in path:
            message = f"The model `{body.get('model')}` does not exist."
            return 404, {"error": {"message": message, "type": "invalid_request_error", "code": "model_not_found"}}
        for name, refusal in self.refuses.items():
            if name in body:
                return refusal
        if self.context:
            limit = next((name for name in ("max_tokens", "max_completion_tokens") if name in body), "max_tokens")
            return too_long(self.wording, self.context, len(_prompt_of(body)) // 4, limit, body.get(limit, 16))
        return None


def unsupported(name: str, hint: str = "") -> tuple[int, dict]:
    """Returns status and body with which OpenAI refuses a parameter."""
    message = f"Unsupported parameter: '{name}' is not supported with this model. {hint}"
    error = {"message": message, "type": "invalid_request_error", "param": name, "code": "unsupported_parameter"}
    return 400, {"error": error}


def too_long(wording: str, context: int, prompt: int, limit: str, asked: int) -> tuple[int, dict] | None:
    """Returns status and body with which a server refuses more tokens than its model's context has, None if they fit.

    The words of vLLM 0.32, llama.cpp (build 11434) and litellm 1.106 were recorded from those servers, OpenAI's are
    those that its users quote. vLLM and llama.cpp cut an answer short where the context ends, so they refuse less.
    """
    model_has = f"This model's maximum context length is {context} tokens. However, "
    if wording == "vllm":
        if asked > context:
            said = (
                f"{limit}={asked} cannot be greater than max_model_len={context}. Please request fewer output tokens. "
            )
            param, value = limit, asked
        elif prompt > context:
            said = (
                f"{model_has}your prompt contains at least {context + 1} input tokens, which exceeds this limit even "
            )
            said += "without any output tokens. Please reduce the length of the input prompt. "
            param, value = "input_tokens", context + 1
        else:
            return None
        said += f"(parameter={param}, value={value})"
        return 400, {"error": {"message": said, "type": "BadRequestError", "param": param, "code": 400}}
    if wording == "llama.cpp":
        if prompt < context:
            return None
        said = f"request ({prompt} tokens) exceeds the available context size ({context} tokens), try increasing it"
        error = {"code": 400, "message": said, "type": "exceed_context_size_error"}
        return 400, {"error": {**error, "n_prompt_tokens": prompt, "n_ctx": context}}
    if prompt + asked <= context:
        return None
    said = f"{model_has}you requested {prompt + asked} tokens ({prompt} in the messages, {asked} in the completion). "
    said += "Please reduce the length of the messages or completion."
    if prompt >= context:
        said = f"{model_has}your messages resulted in {prompt} tokens. Please reduce the length of the messages."
    error = {"message": said, "type": "invalid_request_error", "param": "messages", "code": "context_length_exceeded"}
    if wording == "litellm":
        exceeded = "ContextWindowExceededError"
        said = f"litellm.{exceeded}: litellm.BadRequestError: {exceeded}: OpenAIException - {said}"
        said += "\nmodel=tiny. context_window_fallbacks=None. fallbacks=None.\n\nSet 'context_window_fallback' - "
        said += "https://docs.litellm.ai/docs/routing#fallbacks\n\nLiteLLM: model group 'tiny' failed with the error "
        said += "above. No fallback was attempted."
        error = {"message": said, "type": "invalid_request_error", "param": None, "code": "400"}
    return 400, {"error": error}


def _prompt_of(body: dict) -> str:
    return body["messages"][-1]["content"] if "messages" in body else body["prompt"]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, *_):
        pass

    def _send(self, status, body, headers=None):
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refuses_key(self) -> bool:
        given = self.headers.get("api-key") or self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.server.key is None or given == self.server.key:
            return False
        error = {"message": f"Incorrect API key provided: {given[:4]}****.", "code": "invalid_api_key"}
        self._send(401, {"error": {**error, "type": "invalid_request_error", "param": None}})
        return True

    def do_GET(self):
        path, server = self.path.split("?")[0], self.server
        if self._refuses_key():
            return
        server.probes += path.endswith("/models")
        if server.down:
            self._send(*server.down)
            return
        if path.endswith("/models"):
            self._send(200, server.model_list())
        elif path.endswith("/batches"):
            data = list(server.batches.values())[::-1]
            self._send(200, {"object": "list", "data": data, "has_more": False})
        elif "/batches/" in path:
            batch = server.batches[path.rsplit("/", 1)[1]]
            self._work_on(batch)
            self._send(200, batch)
        elif path.endswith("/times"):
            self._send(200, {"seconds": server.ended - server.began, "busy": server.busy, "answers": server.answered})
            server.began, server.busy, server.answered = None, 0.0, 0
        elif path.endswith("/content"):
            self._send(200, server.files[path.split("/")[-2]])
        else:
            self._send(404, {"detail": "Not Found"})

    def do_POST(self):
        length = int(self.headers.get("Content-Length", 0))
        data = self.rfile.read(length)
        if len(data) < length:  # the client was killed
            return
        path = self.path.split("?")[0]
        if self._refuses_key():
            return
        if path.endswith("/completions"):
            self._complete(path, json.loads(data))
        elif path.endswith("/files"):
            self._upload(data)
        elif path.endswith("/batches"):
            self._create_batch(json.loads(data))
        else:
            self._send(404, {"detail": "Not Found"})

    def _complete(self, path, body):
        server = self.server
        with server.lock:
            server.requests.append((path, body))
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
            fault = server.faults.pop(0) if server.faults else {}
            began = time.monotonic()
            server.began = server.began or began
        try:
            fault = fault(body) if callable(fault) else fault
            time.sleep(fault.get("delay", server.seconds))
            self._answer(path, body, fault)
        finally:
            with server.lock:
                server.in_flight -= 1
                server.ended = time.monotonic()
                server.busy += server.ended - began

    def _answer(self, path, body, fault):
        server = self.server
        if fault.get("drop"):
            self.close_connection = True
        elif server.down:
            self._send(*server.down)
        elif "drip" in fault:
            self._drip(json.dumps(server.completion(path, body)).encode(), fault["drip"])
        elif "status" in fault:
            self._send(
                fault["status"], {"error": fault.get("error", {"message": "told to fail"})}, fault.get("headers")
            )
        elif refusal := server.refusal(path, body):
            self._send(*refusal)
        elif fault.get("half"):
            whole = json.dumps(server.completion(path, body)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(whole)))
            self.end_headers()
            self.wfile.write(whole[: len(whole) // 2])
            self.close_connection = True
        elif "raw" in fault:
            self._send(200, fault["raw"], {"Content-Type": fault.get("type", "application/json")})
        else:
            with server.lock:
                server.answered += 1
            self._send(200, server.completion(path, body))

    def _drip(self, data, seconds):
        """Sends an answer byte by byte with pauses, as long as the client listens."""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        try:
            for i in range(len(data)):
                self.wfile.write(data[i : i + 1])
                time.sleep(seconds)
        except OSError:
            self.close_connection = True

    def _upload(self, data):
        boundary = self.headers["Content-Type"].split("boundary=")[1].encode()
        part = next(part for part in data.split(b"--" + boundary) if b'name="file"' in part)
        name = f"file-{uuid.uuid4().hex}"
        self.server.files[name] = part.split(b"\r\n\r\n", 1)[1].removesuffix(b"\r\n").decode()
        self._send(200, {"id": name, "object": "file", "purpose": "batch", "bytes": len(data), "filename": "f"})

    def _create_batch(self, body):
        name = f"batch_{uuid.uuid4().hex}"
        batch = {"id": name, "object": "batch", "status": "validating", "created_at": int(time.time()), **body}
        self.server.batches[name] = {**batch, "output_file_id": None, "error_file_id": None, "polls": 0}
        self._send(200, self.server.batches[name])

    def _work_on(self, batch):
        """Takes a batch one step further, as every poll does: in progress, then completed."""
        server = self.server
        batch["polls"] += 1
        if batch["status"] == "completed" or batch["polls"] <= server.polls_per_batch:
            batch["status"] = "in_progress" if batch["status"] == "validating" else batch["status"]
            return
        good, bad = [], []
        for line in server.files[batch["input_file_id"]].splitlines():
            request = json.loads(line)
            server.requests.append((request["url"], request["body"]))
            refusal = server.refusal(request["url"], request["body"])
            status, body = refusal or (200, server.completion(request["url"], request["body"]))
            response = {"status_code": status, "request_id": "r", "body": body}
            line = {"id": "b", "custom_id": request["custom_id"], "response": response, "error": None}
            (bad if refusal else good).append(json.dumps(line) + "\n")
        for lines, field in ((good, "output_file_id"), (bad, "error_file_id")):
            if lines:
                batch[field] = f"file-{uuid.uuid4().hex}"
                server.files[batch[field]] = "".join(lines[::-1])  # a batch's output need not have its input's order
        batch["status"] = "completed"


if __name__ == "__main__":
    from alpaca.cli import run_cli

    def serve(seconds_per_answer: float = 1.0) -> None:
        """Serves until the process is killed."""
        with Server(seconds_per_answer=seconds_per_answer) as server:
            print(server.base_url, flush=True)
            threading.Event().wait()

    run_cli({"serve": serve})
