"""alpaca/generation/harvest.py: which tasks are kept, and what becomes of the others."""

import json

from generation_runs import generate
from openai_server import completion_for, tasks_for


def test_rejected_tasks_are_written_with_reason_nearest_neighbour_and_score(folder, server):
    def answer(prompt):
        tasks = tasks_for(prompt, 3)
        again = [(tasks[0][0] + "!", "<noinput>", "x"), ("Draw a map of the town", "<noinput>", "x")]
        text = completion_for(prompt, [*tasks, *again, ("A good task that is cut", "<noinput>", "half")])
        return {"text": text, "finish_reason": "length"}

    server.answer = answer
    generate(server, num_instructions_to_generate=3)
    first = tasks_for(server.prompts()[0], 3)[0][0]
    rejected = [json.loads(line) for line in (folder / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [task["reason"] for task in rejected] == ["similar", "keyword", "truncated"]
    assert (rejected[0]["nearest_instruction"], rejected[0]["score"]) == (first, 1.0)
    assert rejected[1]["nearest_instruction"]
    assert 0 <= rejected[1]["score"] < 0.7
    assert "A good task" in rejected[2]["instruction"]
