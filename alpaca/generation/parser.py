r"""Finds the tasks in a completion: those that the original's rules find, and those it lost to an odd heading.

" Name a prime.\n4. Input:\n<noinput>\n4. Output:\n7\n###\n5. Instruction: ..."
-> [ParsedTask("Name a prime.", "", "7"), ...]
"""

import json
import re
from dataclasses import dataclass

# Each run of blanks has one place in these patterns: with two, a line of blanks would be tried in every split of them.
_FIELD = (
    r"(?P<field>Instruction|Input|Output|Response|INSTRUCTION|INPUT|OUTPUT|RESPONSE)"
    r"(?:[ \t]*(?P<closing>\*\*|__))?[ \t]*:"
)
_START = r"^[ \t>]*(?:[-*•][ \t]+)?(?:(?P<hashes>#{1,6})[ \t]*)?(?P<opening>\*\*|__)?"
# "4. Instruction:", "**4. Input:**", "4) **Output**:", "### 4. Instruction:", "Task 4 - Input:", "- 4. Response:".
_NUMBERED = re.compile(
    rf"{_START}(?:Task[ \t]+)?(?P<number>\d{{1,9}})(?:[ \t]*[.):-])?[ \t]*(?P<inner>\*\*|__)?{_FIELD}", re.MULTILINE
)
# "Instruction:", "**Input:**", "### Output:", "* Response:": for answers without any number, and for tasks of which
# only the instruction has one.
_UNNUMBERED = re.compile(rf"{_START}(?P<number>)(?P<inner>){_FIELD}", re.MULTILINE)
_SEPARATOR = re.compile(r"^[ \t]*#{3,}[ \t]*$", re.MULTILINE)
# The start of a heading at which an answer was cut: "", "5", "5. Instr", "**5. In".
_GAP = r"\s*(?=\S|\Z)"  # all the blanks there are
_HALF_A_HEADING = re.compile(rf"{_GAP}(?:(?:\*\*)?\d{{1,9}}[.)]?{_GAP}|\*\*{_GAP})?(?:\*\*)?\w{{0,11}}\s*\Z")
_NO_INPUT = re.compile(
    r"[<(\[]?\s*(no[ _-]?input( (is )?(needed|required|provided|necessary))?|n/?a|none)\s*[>)\]]?\.?\Z", re.IGNORECASE
)
_THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_JSON_LIST = re.compile(r"\A\s*(?:```(?:json)?\s*)?(?=\[\s*\{)")

PROBLEMS = ("malformed", "truncated")  # why a stretch of text is not a task


@dataclass
class ParsedTask:
    """A task found in a completion, or the stretch of text where one should have been.

    Attributes:
        instruction: Its text, or the whole stretch if there is a problem.
        input: "" if the task needs none.
        output: The model's answer to it.
        problem: None, "malformed" (it lacks a field) or "truncated" (the completion ends before it does).
    """

    instruction: str
    input: str = ""
    output: str = ""
    problem: str | None = None


@dataclass
class _Heading:
    number: str
    field: str
    start: int
    end: int
    separated: bool


def parse_tasks(text: str, first_number: int, truncated: bool = False) -> list[ParsedTask]:
    """Finds the tasks in a completion.

    A numbered `Instruction:` heading at the start of a line begins a task, whether its number is the next one, repeats,
    skips or restarts. A line of ### ends the task before it. Inside a task only headings with its own number count, so
    an output may contain ### and numbered headings itself. If only the instruction has a number, the first bare
    `Input:` and `Output:` lines count. "Response:" means "Output:" if no "Output:" occurs. A JSON list of objects with
    `instruction` and `output` is read as such.

    Args:
        text: The model's answer after the prompt's last `{first_number}. Instruction:`.
        first_number: The number in that heading. An answer that repeats the heading is understood too.
        truncated: True if the answer was cut (by length or a content filter), so that its last task is incomplete.

    Returns:
        The tasks in order, including those with a problem; none for an empty text.
    """
    text = _THOUGHT.sub("", text)
    if not text.strip():
        return []
    if (found := _JSON_LIST.match(text)) and (tasks := _read_json(text[found.end() :], truncated)):
        return tasks
    pattern = _NUMBERED if _NUMBERED.search(text) else _UNNUMBERED
    headings = _headings(text, pattern)
    has_separators = any(heading.separated for heading in headings)
    starts = _task_starts(headings, str(first_number) if pattern is _NUMBERED else "")
    tasks = []
    for start, following in zip(starts, [*starts[1:], None], strict=True):
        end, complete = (following.start, True) if following else _end_of_text(text, start.end, headings, truncated)
        inner = [heading for heading in headings if start.end <= heading.start < end]
        if following and start is starts[0] and not inner and _is_preamble(text[:end], following, first_number):
            continue
        segment = _without_separator(text[:end], "#" if has_separators else "#-*")
        if complete:
            tasks.append(_read_task(segment, start, inner))
        else:
            tasks.append(ParsedTask(segment[start.end :].strip(), problem="truncated"))
    return tasks


def _headings(text: str, pattern: re.Pattern) -> list[_Heading]:
    found = []
    for match in pattern.finditer(text):
        end = match.end()
        bold = match["opening"] or match["inner"]
        if bold and not match["closing"] and text.startswith(bold, end):  # "**4. Input:**" closes after the colon
            end += len(bold)
        separated = bool(match["hashes"]) or text[: match.start()].rstrip().endswith("###")
        found.append(_Heading(match["number"], match["field"].lower(), match.start(), end, separated))
    if any(heading.field == "output" for heading in found):
        return [heading for heading in found if heading.field != "response"]
    for heading in found:
        heading.field = heading.field.replace("response", "output")
    return found


def _without_separator(text: str, marks: str) -> str:
    """Removes the separator at the end: ###, or --- or *** on its own line if no ### separates the tasks.

    Args:
        text: A task, and the text between it and the next one.
        marks: The characters of a separator.
    """
    text = text.rstrip()
    bare = text.rstrip(marks)
    separates = len(text) - len(bare) >= 3 and (text.endswith("###") or bare.endswith("\n"))
    return bare.rstrip() if separates else text


def _task_starts(headings: list[_Heading], first_number: str) -> list[_Heading]:
    """Returns the headings that begin a task. The first is the prompt's own, just before the text."""
    has_separators = any(heading.separated for heading in headings)
    starts = [_Heading(first_number, "instruction", 0, 0, True)]
    fields = set()
    for heading in headings:
        if heading.field != "instruction":
            fields.add(heading.field)
            continue
        step = int(heading.number) - int(starts[-1].number) if heading.number else 0
        # If ### separates the tasks, a smaller number without ### is an example inside an output.
        unseparated = step == 1 or ("output" in fields and (step > 0 or not has_separators))
        if heading.separated or unseparated or (len(starts) == 1 and not fields):
            starts.append(heading)
            fields = set()
    return starts


def _is_preamble(text: str, following: _Heading, first_number: int) -> bool:
    """True if the text before the first heading is no task but an introduction: "Sure, here are 20 tasks:"."""
    return not text.strip("#` \n") or not following.number or int(following.number) <= first_number


def _end_of_text(text: str, start: int, headings: list[_Heading], truncated: bool) -> tuple[int, bool]:
    """Returns where the last task ends, and True if it is complete: a line of ### after its last heading ends it."""
    last_heading = max((heading.end for heading in headings), default=start)
    for separator in _SEPARATOR.finditer(text, max(start, last_heading)):
        if not truncated or _HALF_A_HEADING.match(text, separator.end()):
            return separator.start(), True
    return len(text), not truncated


def _read_task(text: str, start: _Heading, inner: list[_Heading]) -> ParsedTask:
    """Cuts a task, which ends where `text` does, into its fields.

    Args:
        text: The completion up to the task's end.
        start: The task's `Instruction:` heading.
        inner: The headings after it.
    """
    own = [heading for heading in inner if heading.number == start.number]
    if not any(heading.field == "output" for heading in own):  # a model may number the fields of one task 4, 5, 6
        own = [heading for heading in inner if heading.field != "instruction"]
        outputs = [heading for heading in own if heading.field == "output"]
        own = [heading for heading in own if heading.field == "input"][:1] + outputs[:1]
    if not own:  # "4. Instruction:", and bare "Input:" and "Output:" below it
        bare = [heading for heading in _headings(text, _UNNUMBERED) if heading.start >= start.end]
        outputs = [heading for heading in bare if heading.field == "output"][:1]
        inputs = [
            heading for heading in bare if heading.field == "input" and outputs and heading.end <= outputs[0].start
        ]
        own = inputs[:1] + outputs
    if [heading.field for heading in own] not in (["input", "output"], ["output"]):
        return ParsedTask(text[start.end :].strip(), problem="malformed")
    edges = [start.end, *(edge for heading in own for edge in (heading.start, heading.end)), len(text)]
    fields = [text[a:b].strip() for a, b in zip(edges[::2], edges[1::2], strict=True)]
    instruction, task_input, output = fields if len(fields) == 3 else (fields[0], "", fields[1])
    return ParsedTask(instruction, "" if _NO_INPUT.match(task_input) else task_input, output)


def _read_json(text: str, truncated: bool) -> list[ParsedTask]:
    """Reads a JSON list of tasks, object by object; none if the objects are no tasks.

    Example:
        '[{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instr' -> one task, and one with a problem
    """
    tasks, position = [], 1
    while match := re.compile(r"[\s,]*(?=\{)").match(text, position):
        try:
            found, position = json.JSONDecoder().raw_decode(text, match.end())
        except (ValueError, RecursionError):
            tasks.append(ParsedTask(text[match.end() :], problem="truncated" if truncated else "malformed"))
            break
        fields = [found.get("instruction"), found.get("input") or "", found.get("output", found.get("response"))]
        if not all(isinstance(field, str) for field in fields):
            return []
        instruction, task_input, output = (field.strip() for field in fields)
        tasks.append(ParsedTask(instruction, "" if _NO_INPUT.match(task_input) else task_input, output))
    return tasks if any(not task.problem for task in tasks) else []
