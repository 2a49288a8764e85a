"""Runs ten checks for silent errors in this project and in its peers, with the same tiny LLaMA and the same records.

    python -m benchmarks.correctness
    python -m benchmarks.correctness --columns ours,TRL --venvs kept_environments

Each peer is installed from the package index into an environment of its own, which is removed at the end unless
--venvs names a folder to keep them in. A peer that doesn't install or run is listed as "not run", with the line that
stopped it. Writes benchmarks/results/correctness.json, docs/correctness.md and assets/correctness.png. The exit
status is 0 if this project is right everywhere, by default or by an option that the table names, and 1 if not.
"""

import contextlib
import dataclasses
import json
import os
import sys
import tempfile

from alpaca.cli import UserError, run_cli
from alpaca.files import jdump, jload
from benchmarks.correctness import inputs, report, running, verdicts
from benchmarks.correctness.columns import COLUMNS, PEERS, Column
from benchmarks.provenance import RESULTS, ROOT, provenance

SHARED = ("torch", "transformers", "accelerate", "sentencepiece")


def run(
    columns: str = "all",
    venvs: str = "",
    work_dir: str = "",
    quick: bool = False,
    reuse: bool = False,
    result_path: str = os.path.join(RESULTS, "correctness.json"),
    page_path: str = os.path.join(ROOT, "docs", "correctness.md"),
    picture_path: str = os.path.join(ROOT, "assets", "correctness.png"),
) -> None:
    """Runs all checks, prints what they found, and writes the result, the page and the picture.

    Args:
        columns: Comma-separated columns, or all. A comma inside of a name counts: name them as the page does.
        venvs: Folder to keep the peers' environments in, or to find them; by default they are removed at the end.
        work_dir: Folder to keep what the runs wrote; by default it is removed.
        quick: Leave out speed and memory.
        reuse: Run nothing; judge again what --work_dir holds.
        result_path: JSON file to write.
        page_path: Markdown page to write.
        picture_path: Picture to write.
    """
    chosen = choose(columns)
    if reuse and not os.path.isfile(os.path.join(work_dir, "inputs.json")):
        raise UserError(f"--reuse: {work_dir or 'no --work_dir'} holds no earlier run; name the folder that one kept")
    with contextlib.ExitStack() as stack:
        venvs = os.path.abspath(venvs or stack.enter_context(tempfile.TemporaryDirectory()))
        work_dir = os.path.abspath(work_dir or stack.enter_context(tempfile.TemporaryDirectory()))
        os.makedirs(work_dir, exist_ok=True)
        found = measure(chosen, venvs, work_dir, quick, reuse)
    result = {**provenance(*SHARED), "columns": found}
    jdump(result, result_path)
    report.write(result, page_path, picture_path)
    print(f"written to {', '.join(map(os.path.relpath, (result_path, page_path, picture_path)))}")
    sys.exit(exit_status(result))


def choose(columns: str) -> list[Column]:
    """Finds the columns of a comma-separated list, and the base of each that packs.

    Raises:
        UserError: There is no such column.
    """
    titles = [column.title for column in COLUMNS]
    if columns == "all":
        return COLUMNS
    wanted, rest = set(), columns
    while rest:
        title = max((title for title in titles if rest == title or rest.startswith(title + ",")), key=len, default="")
        if not title:
            raise UserError(f"--columns {rest}: no such column; there are {'; '.join(titles)}")
        wanted.add(title)
        rest = rest[len(title) + 1 :].strip()
    wanted |= {column.base for column in COLUMNS if column.title in wanted and column.base}
    return [column for column in COLUMNS if column.title in wanted]


def exit_status(result: dict) -> int:
    """Gets 0 if our own column is right everywhere, by default or by an option; peers don't count."""
    ours = next((column for column in result["columns"] if column["title"] == "ours"), None)
    cells = {name: verdicts.Cell(**cell) for name, cell in ours["cells"].items()} if ours else {}
    return 0 if ours and verdicts.is_right(cells) else 1


def measure(chosen: list[Column], venvs: str, work_dir: str, quick: bool, reuse: bool = False) -> list[dict]:
    """Runs and judges each column.

    Returns:
        For each its title, peer, settings, versions, cells and speed.
    """
    paths = jload(os.path.join(work_dir, "inputs.json")) if reuse else make_inputs(work_dir)
    runners: dict[str, running.Runner] = {}
    environments: dict[str, str | running.NotRun] = {}
    found = []
    for column in chosen:
        peer = PEERS[column.peer]
        entry = {"title": column.title, "peer": column.peer, "settings": column.settings, "versions": {}}
        try:
            if column.peer not in environments:
                environments[column.peer] = running.environment(peer, venvs)
            python = environments[column.peer]
            if isinstance(python, running.NotRun):
                raise python
            entry["versions"] = running.versions(python)
            runner = running.Runner(column, python, paths, os.path.join(work_dir, column.title.replace(" ", "_")))
            runner.run(running.plan_jobs(runner, quick), reuse)
            if "tokens" not in runner.facts["step"]:
                raise running.NotRun(runner.facts["step"]["error"])
            runners[column.title] = runner
            base = runners.get(column.base, runner)
            cells = {check.name: verdicts.judge(check, runner, base) for check in verdicts.CHECKS}
            entry["speed"] = running.speed(runner)
        except running.NotRun as stopped:
            line = " ".join(str(stopped).split())
            cells = {check.name: verdicts.Cell("", "not run", line) for check in verdicts.CHECKS}
            entry["speed"] = {"error": line}
        entry["cells"] = {name: dataclasses.asdict(cell) for name, cell in cells.items()}
        for check in verdicts.CHECKS:
            cell = cells[check.name]
            print(f"{column.title}: {check.title}: {cell.text or '-'} ({cell.verdict}) {cell.note}", flush=True)
        found.append(entry)
    return found


def make_inputs(folder: str) -> dict:
    """Writes the models, the records, the texts and the chat template.

    Returns:
        Their paths: "model", "larger model", "texts", "template"; "uneven", "chat", "many" and each bad file by format;
        "bad", the names of the bad files; and the user "messages" of the
        records, which have no input.
    """
    records = inputs.load_examples(inputs.DATA)
    uneven = inputs.uneven_records()
    config = jload(os.path.join(ROOT, "configs", "tiny_llama.json"))
    larger = {name: value for name, value in config.items() if name not in ("model_type", "vocab_size")}
    paths: dict = {
        "model": inputs.make_model(os.path.join(folder, "model"), [*uneven, *records]),
        "larger model": inputs.make_model(os.path.join(folder, "larger"), [*uneven, *records], larger),
        "texts": os.path.join(folder, "texts.json"),
        "template": os.path.join(folder, "alpaca.jinja"),
        "uneven": inputs.write_records(folder, "uneven", uneven),
        "many": inputs.write_records(folder, "many", records[: running.SPEED_EXAMPLES]),
        "bad": list(inputs.BAD),
        "messages": [record["instruction"] for record in uneven],
    }
    for name, bad in inputs.bad_records().items():
        paths[f"bad: {name}"] = inputs.write_records(folder, f"bad {name}".replace(" ", "_"), bad)
    paths["chat"] = inputs.write_chat(folder, uneven, paths["template"])
    with open(paths["texts"], "w", encoding="utf-8") as file:
        json.dump(inputs.texts(), file)
    jdump(paths, os.path.join(folder, "inputs.json"))
    return paths


if __name__ == "__main__":
    run_cli({"run": run}, ["run", *sys.argv[1:]])
