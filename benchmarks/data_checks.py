"""Checks of single tasks: code that runs, tables that parse, conditions on length, facts of a document, copied text.

Each check finds mistakes and proves nothing about what it doesn't read. `benchmarks.data_quality check` runs them all.
"""

import calendar
import csv
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator

from alpaca.generation.parser import ParsedTask

RUNNERS = {"python": [sys.executable, "-"], "javascript": ["node", "-"], "bash": ["bash", "-n"]}
NGRAM = 13  # words; GPT-3 called 13 words in common an overlap with a test set (Brown et al., 2020, appendix C)
CODE = ("python", "py", "javascript", "js", "sql", "bash", "sh", "html", "css", "c", "java", "r")

_FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")
_LIST_NUMBER = re.compile(r"^\s*(?:\d+[.)]|[-*])\s", re.MULTILINE)
_NAME = re.compile(r"(?<=[a-z,;] )[A-Z][a-zA-Z'’-]+")  # a capital within a sentence
_DAYS_AND_MONTHS = frozenset(
    [day.lower() for day in calendar.day_name] + [month.lower() for month in calendar.month_name if month]
)
_UNITS = "zero one two three four five six seven eight nine ten eleven twelve".split()  # noqa: SIM905
_SPELLED = {word: number for number, word in enumerate(_UNITS)}
_STRICT = ("under", "below", "fewer than", "less than")
_LIMIT = re.compile(
    r"\b(exactly|under|below|fewer than|less than|at most|no more than|max|maximum|up to) "
    rf"(\d+|{'|'.join(_UNITS)}) words\b(?! (?:each|per|apiece|and))",
    re.IGNORECASE,
)


def fenced_blocks(text: str) -> list[tuple[str, str]]:
    """Gets the fenced blocks of a text as (language, content)."""
    return _FENCED.findall(text)


def run_blocks(task: ParsedTask, program: str | None) -> tuple[list[str], int]:
    """Runs the code blocks of one answer and its check program.

    Python and JavaScript run to their end, bash is only parsed, JSON and CSV are read. A language whose program is not
    installed is left out.

    Args:
        task: The task.
        program: Python that fails if the answer is wrong. It sees the strings INSTRUCTION, INPUT and OUTPUT.

    Returns:
        What went wrong, and the number of blocks and programs that ran.
    """
    names = {"INSTRUCTION": task.instruction, "INPUT": task.input, "OUTPUT": task.output}
    jobs = [("python", "".join(f"{k} = {v!r}\n" for k, v in names.items()) + program)] if program else []
    jobs += [block for block in fenced_blocks(task.output) if block[0] in (*RUNNERS, "json", "csv")]
    jobs = [job for job in jobs if job[0] not in RUNNERS or shutil.which(RUNNERS[job[0]][0])]
    return [f"{language}: {problem}" for language, code in jobs if (problem := _run(language, code))], len(jobs)


def _run(language: str, code: str) -> str:
    if language == "json":
        try:
            json.loads(code)
        except ValueError as error:
            return str(error)
        return ""
    if language == "csv":
        widths = {len(row) for row in csv.reader(io.StringIO(code)) if row}
        return "" if len(widths) == 1 else f"rows of {sorted(widths)} fields"
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(RUNNERS[language], input=code, cwd=folder, capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired:
            return "still running after 60 s"
    return (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1] if done.returncode else ""


def prose(text: str) -> str:
    """Gets a text without its fenced blocks."""
    return _FENCED.sub("", text)


def is_tabular(output: str) -> bool:
    """True if an answer has a Markdown table, or a fenced block of JSON or CSV."""
    return bool(tables(output)) or any(language in ("json", "csv") for language, _ in fenced_blocks(output))


def opens_with_colon(instruction: str) -> bool:
    """True for "Calibrate my hopes: ...": one to five words, and the task behind a colon."""
    return re.match(r"[\w'’-]+(?: [\w'’-]+){0,4}: ", instruction) is not None


def tables(output: str) -> list[str]:
    """Gets the Markdown tables of a text."""
    return re.findall(r"(?:^\|.*\|[ ]*\n?){2,}", output, re.MULTILINE)


def table_problems(output: str) -> Iterator[str]:
    """Finds Markdown tables with rows of unequal width."""
    for table in tables(output):
        widths = {len(re.findall(r"(?<!\\)\|", line)) - 1 for line in table.strip().splitlines()}
        if len(widths) > 1:
            yield f"a table with rows of {sorted(widths)} cells"


def length_conditions(instruction: str) -> list[tuple[str, int]]:
    """Gets the conditions on the length of the whole answer: "under 60 words" -> ("under", 60).

    A limit for a part of an answer can't be told from one for the whole, unless it says "each" or the instruction goes
    on with "and": "a headline of at most eight words and three bullets".
    """
    return [
        (word.lower(), int(number) if number.isdigit() else _SPELLED[number.lower()])
        for word, number in _LIMIT.findall(instruction)
    ]


def length_problems(task: ParsedTask) -> Iterator[str]:
    """Finds answers that are longer than their instruction allows, or not exactly as long as it asks."""
    words = len(task.output.split())
    for word, number in length_conditions(task.instruction):
        longest = number - 1 if word in _STRICT else number
        if words > longest or (word == "exactly" and words < number):
            yield f"{words} words, asked for {word} {number}"


def document_problems(task: ParsedTask) -> Iterator[str]:
    """Finds numbers and names in an answer to a document that the document and the instruction don't have.

    A number that was computed is found too: such a task needs a check program. Numbers of list items, days of the week
    and months are left out.
    """
    source = f"{task.input} {task.instruction}"
    body = _LIST_NUMBER.sub("", task.output)
    numbers = set(_NUMBER.findall(source))
    if strange := sorted({found for found in _NUMBER.findall(body) if found not in numbers}):
        yield f"numbers that the document doesn't have: {', '.join(strange)}"
    low = source.lower()
    names = {name for name in _NAME.findall(body) if name.split("'")[0].split("’")[0].lower() not in low}
    if strange := sorted(name for name in names if name.lower() not in _DAYS_AND_MONTHS):
        yield f"names that the document doesn't have: {', '.join(strange)}"


def ngrams(text: str) -> set[tuple[str, ...]]:
    """Gets all runs of 13 words, in lower case and without punctuation."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)}


def texts_in(value: object) -> Iterator[str]:
    """Yields every string in JSON data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from texts_in(part)


def overlaps(tasks: Iterable[ParsedTask], texts: Iterable[str]) -> Iterator[tuple[ParsedTask, str]]:
    """Yields each task that has 13 words in a row in common with one of the texts, and those words."""
    theirs = set().union(*map(ngrams, texts))
    for task in tasks:
        if common := ngrams(f"{task.instruction} {task.input} {task.output}") & theirs:
            yield task, " ".join(min(common))
