"""Serves recorded completions like an OpenAI-compatible server, so that a run can be repeated without an API key.

    python -m demo.replay --port 8765
    python -m generate_instruction generate_instruction_following_data --seed 0 --base_url http://127.0.0.1:8765/v1

Each prompt is looked up by its SHA-256 and answered at once with the completion recorded for it. A prompt that was
never recorded gets a 404 that says so. The server needs only the standard library, listens on loopback only, and runs
until Ctrl-C.
"""

import argparse
import hashlib
import http.server
import json
import pathlib
import sys

RECORDING = pathlib.Path(__file__).parent.parent / "recordings" / "completions.jsonl"
MODEL = "recorded"


def load_recording(path: pathlib.Path) -> dict[str, dict]:
    """Reads a recording.

    Args:
        path: JSON Lines with `prompt_sha256`, `text`, `finish_reason` and `usage`.

    Returns:
        Prompt hash -> record.

    Raises:
        ValueError: Names the first line that is not such a record.
    """
    records = {}
    lines = path.read_text(encoding="utf-8").strip("\n").split("\n")  # not splitlines: a text may contain U+2028
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            records[record["prompt_sha256"]] = {key: record[key] for key in ("text", "finish_reason", "usage")}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a recorded completion ({error!r})") from error
    return records


def _answer(request: dict, chat: bool, records: dict[str, dict]) -> tuple[int, dict]:
    """Looks up the completion for a request; returns the HTTP status and the body."""
    prompt = "\n".join(message["content"] for message in request["messages"]) if chat else request["prompt"]
    digest = hashlib.sha256(prompt.encode("utf-8")).hexdigest()
    record = records.get(digest)
    if record is None:
        message = (
            f"no completion was recorded for this prompt (sha256 {digest[:12]}…); the recording was made with "
            "--seed 0 and the bundled prompt.txt and seed_tasks.jsonl"
        )
        return 404, {"error": {"message": message, "type": "invalid_request_error", "code": "prompt_not_recorded"}}
    text = record["text"]
    choice = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    choice |= {"index": 0, "logprobs": None, "finish_reason": record["finish_reason"]}
    return 200, {
        "id": f"recorded-{digest[:12]}",
        "object": "chat.completion" if chat else "text_completion",
        "created": 0,
        "model": MODEL,
        "choices": [choice],
        "usage": record["usage"],
    }


def make_server(records: dict[str, dict], port: int = 0) -> http.server.ThreadingHTTPServer:
    """Makes a server on a loopback port (0: any free one). The caller runs `serve_forever` and `shutdown`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self):
            if self.path.rstrip("/") == "/v1/models":
                model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "recording"}
                self._send(200, {"object": "list", "data": [model]})
            else:
                self._send(404, {"error": {"message": f"no such path: {self.path}", "type": "invalid_request_error"}})

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            chat = self.path == "/v1/chat/completions"
            if not chat and self.path != "/v1/completions":
                self._send(404, {"error": {"message": f"no such path: {self.path}", "type": "invalid_request_error"}})
                return
            try:
                status, answer = _answer(json.loads(body), chat, records)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                status, answer = 400, {"error": {"message": repr(error), "type": "invalid_request_error"}}
            self._send(status, answer)

        def _send(self, status: int, answer: dict) -> None:
            body = json.dumps(answer).encode("utf-8")
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            """Prints nothing for a request."""

    return http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)


def main() -> None:
    """Serves until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Replay recorded completions over HTTP on the loopback interface.")
    parser.add_argument(
        "--port", type=int, default=8765, help="The port to listen on; 0 takes any free one (default: 8765)."
    )
    parser.add_argument(
        "--recording",
        type=pathlib.Path,
        default=RECORDING,
        help="The JSON Lines file of completions (default: the bundled one).",
    )
    arguments = parser.parse_args()
    try:
        records = load_recording(arguments.recording)
        server = make_server(records, arguments.port)
    except (OSError, OverflowError) as error:
        what = f"port {arguments.port}" if not getattr(error, "filename", None) else str(arguments.recording)
        sys.exit(_refuse(f"{what}: {getattr(error, 'strerror', None) or error}; choose another (see --help)"))
    except ValueError as error:
        sys.exit(_refuse(str(error)))
    port = server.server_address[1]
    print(f"replaying {len(records)} recorded completions at http://127.0.0.1:{port}/v1", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
