"""OpenAI's Batch API: half the price, answers within a day, and no batch is paid for twice after a crash."""

import asyncio
import json
import os
import uuid
from collections import Counter
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

from alpaca.cli import UserError
from alpaca.client import Client, Completion, Lesson, Malformed, clean, read_completion
from alpaca.files import jdump, jload, parse_json
from alpaca.generation.run import PROMPT_TOO_LONG, Outcome, Run
from alpaca.journal import check_settings

MAX_REQUESTS, MAX_BYTES = 50_000, 200 * 1000 * 1000  # of one input file (platform.openai.com/docs/guides/batch)
_ASSUMED_KEPT_PER_ANSWER = 10.0  # for the size of the first batch
_TRIES = 3  # batches in which one request may fail
_ENDPOINTS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


def refuse_waiting_batch(output_dir: str) -> None:
    """Keeps a run without --batch_api from asking again for what an unfinished batch was paid to answer.

    Raises:
        UserError: There is one.
    """
    if os.path.exists(path := _state_path(output_dir)):
        raise UserError(f"{path} is a batch in progress, already paid for; continue with --batch_api, or delete it")


def _state_path(output_dir: str) -> str:
    return os.path.join(output_dir, "batch.json")


async def ask_in_batches(run: Run, client: Client, show: Callable[[int], None]) -> Outcome:
    """Asks in batches until the target is met or a limit is reached.

    batch.json says what a batch asks for. It is written before the batch is created and removed when the answers are
    in the journal, so an interrupted run finds its batch again, even if it never learned the batch's id.

    Args:
        run: What to ask for.
        client: The server.
        show: Called after each batch with the number of requests in flight, which is 0.

    Raises:
        UserError: The server can't be used, a batch failed, or one request failed in three batches.
    """
    failures: Counter[int] = Counter()
    path = _state_path(run.config.output_dir)
    while run.harvest.remaining or os.path.exists(path):
        state = await _resume_or_start(run, client, path)
        if state is None:
            break
        try:
            batch = await _finished(client, state)
            answers, errors = await _results(client, batch, state["indices"])
        except UserError as error:
            raise UserError(
                f"{error}; run the same command to try this batch again, or delete {path} to ask and pay again"
            ) from error
        for index, error in list(errors.items()):
            if (lesson := _lesson(run, client, state, *error)) and lesson.prompt_too_long:
                answers[index] = PROMPT_TOO_LONG
                del errors[index]
        run.take({index: answer for index, answer in answers.items() if index not in run.journal.records})
        os.unlink(path)
        failures.update(list(errors))
        _check_errors(run, client, state, batch, answers, errors, failures)
        run.harvest_answers()
        show(0)
    return Outcome(run.stopped)


async def _resume_or_start(run: Run, client: Client, path: str) -> dict[str, Any] | None:
    """Returns the state of the batch that batch.json describes, or of a new one; None if no request may be sent.

    The state holds `tag` (the batch's mark at the server), `settings`, `indices` (of its requests), `api`,
    `input_file_id` and `batch_id`.
    """
    settings = {"model": run.model, **run.settings}
    if os.path.exists(path):
        state = _read_state(path)
        check_settings(path, state["settings"], settings)
    else:
        indices, lines = _requests(run, client)
        if not indices:
            return None
        state = {"tag": uuid.uuid4().hex, "settings": settings, "indices": indices}
        state.update(api=client.api, batch_id=None, input_file_id=await _upload(client, lines))
        jdump(state, path)
    if state["batch_id"] is None:
        state["batch_id"] = await _create(client, state)
        jdump(state, path)
        client.log(f"Batch {state['batch_id']}: {len(state['indices'])} requests, noted in {path}.")
    return state


def _read_state(path: str) -> dict[str, Any]:
    state = jload(path)
    kinds = {"tag": str, "settings": dict, "indices": list, "api": str, "input_file_id": str}
    fits = isinstance(state, dict) and all(isinstance(state.get(name), kind) for name, kind in kinds.items())
    if not fits or not all(type(index) is int for index in state["indices"]) or "batch_id" not in state:
        raise UserError(f"{path} is not the state of a batch; restore it, or delete it to ask and pay again")
    return state


def _requests(run: Run, client: Client) -> tuple[list[int], list[bytes]]:
    """Returns indices and lines of the next batch: as many as are probably needed, within the limits."""
    indices: set[int] = set()
    lines: list[bytes] = []
    index, size = -1, 0
    for _ in range(min(MAX_REQUESTS, run.requests_needed(_ASSUMED_KEPT_PER_ANSWER))):
        index = run.next_request(indices, index + 1)
        if index is None:
            break
        api, body = client.request(run.prompt_of(index), run.model, run.parameters_of(index))
        request = {"custom_id": str(index), "method": "POST", "url": _ENDPOINTS[api], "body": body}
        line = json.dumps(request, ensure_ascii=False).encode() + b"\n"
        size += len(line)
        if size > MAX_BYTES:
            break
        indices.add(index)
        lines.append(line)
    return sorted(indices), lines


async def _upload(client: Client, lines: list[bytes]) -> str:
    import openai

    async def upload() -> str:
        try:
            content = ("requests.jsonl", b"".join(lines))
            return (await client.openai.files.create(file=content, purpose="batch")).id
        except openai.APIStatusError as error:
            if error.status_code not in (404, 405, 501):
                raise
            found = f"{client.url} has no Batch API: it answered {error.status_code} to /files"
            raise UserError(clean(f"{found}; leave out --batch_api")) from error

    return await client.patiently(upload)


async def _create(client: Client, state: dict[str, Any]) -> str:
    """Creates the batch, or finds it by its tag if a crash came between its creation and the note of its id."""

    async def find_or_create() -> str:
        for batch in (await client.openai.batches.list(limit=100)).data:
            if (batch.metadata or {}).get("alpaca_run") == state["tag"]:
                return batch.id
        batch = await client.openai.batches.create(
            input_file_id=state["input_file_id"],
            endpoint=_ENDPOINTS["completions" if state["api"] == "completions" else "chat"],
            completion_window="24h",
            metadata={"alpaca_run": state["tag"]},
        )
        return batch.id

    return await client.patiently(find_or_create)


async def _finished(client: Client, state: dict[str, Any]) -> Any:
    """Waits for the batch, polling after 1 s, 1.5 s, 2.25 s and so on up to once a minute."""
    pause, said = 1.0, None
    while True:
        batch = await client.patiently(lambda: client.openai.batches.retrieve(state["batch_id"]))
        if batch.status in ("completed", "failed", "expired", "cancelled"):
            return batch
        counts = batch.request_counts
        line = f"Batch {batch.id}: {batch.status}" + (f", {counts.completed} of {counts.total} done" if counts else "")
        if line != said:
            client.log(line)
            said = line
        await asyncio.sleep(pause)
        pause = min(60.0, 1.5 * pause)


async def _results(
    client: Client, batch: Any, indices: list[int]
) -> tuple[dict[int, Completion], dict[int, tuple[int, dict]]]:
    """Returns the answers by request index, and status and error of the requests that failed."""
    answers, errors = {}, {}
    for file_id in filter(None, (batch.output_file_id, batch.error_file_id)):
        for index, status, body in await client.patiently(partial(_result_lines, client, file_id)):
            try:
                answers[index] = read_completion(body)
            except Malformed:
                said = body.get("error") or body if isinstance(body, dict) else body
                errors[index] = status, said if isinstance(said, dict) else {"message": str(said)}
    if answers:  # without any, the batch itself says why
        absent = 0, {"message": "it is missing from the batch's files"}
        errors = {index: errors.get(index, absent) for index in indices if index not in answers}
    return {index: answers[index] for index in indices if index in answers}, errors


async def _result_lines(client: Client, file_id: str) -> list[tuple[int, int, Any]]:
    """Downloads a batch's results: request index, status and body of each.

    Raises:
        Malformed: A line is not a result, as in a file that was cut short.
    """
    content = await client.openai.files.content(file_id)
    results = []
    for number, line in enumerate(content.text.split("\n"), start=1):
        if line.strip():
            try:
                result = parse_json(line, f"the batch's file {file_id}", number)
                response = result.get("response") or {}
                body = response.get("body") or result.get("error") or {}
                results.append((int(result["custom_id"]), response.get("status_code", 0), body))
            except (UserError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise Malformed(f"line {number} of the batch's file {file_id} is no result") from error
    return results


def _check_errors(
    run: Run, client: Client, state: dict, batch: Any, answers: dict, errors: dict, failures: Counter
) -> None:
    """Learns from refusals.

    Raises:
        UserError: The next batch would fail like this one.
    """
    learned = False
    for index, (status, body) in errors.items():
        if lesson := _lesson(run, client, state, status, body):
            client.learn(lesson)
            learned = True
        if failures[index] >= _TRIES or not (learned or answers):
            said = clean(str(body.get("message") or body))[:300]
            raise UserError(f"batch {batch.id}, request {index} failed with status {status}: {said}")
    if not answers and not learned:
        said = (
            "; ".join(error.message or "" for error in (batch.errors.data or [])) if batch.errors else "no reason given"
        )
        raise UserError(clean(f"batch {batch.id} {batch.status} without an answer: {said}"))


def _lesson(run: Run, client: Client, state: dict, status: int, body: dict) -> Lesson | None:
    """Returns what the refusal of one of a batch's requests teaches; see `Client.lesson`."""
    _, sent = client.request("", run.model, run.parameters_of(0))
    fields = {name: body.get(name) for name in ("code", "param", "type")}
    return client.lesson(SimpleNamespace(status_code=status, body=body, **fields), sent, state["api"])
