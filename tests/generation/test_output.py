"""alpaca/generation/output.py: the folder's earlier files, and a full disk."""

import json
import resource
import subprocess
import sys

import pytest
from generation_runs import OUTPUTS, fails, flags, generate, outputs

import generate_instruction
from alpaca.files import jload
from alpaca.records import load_examples


def test_files_that_were_there_before_are_not_overwritten(folder, server):
    (folder / "alpaca_data.json").write_text("[1]")
    old = [{"instruction": "Tell an old tale", "input": "", "output": "Once", "avg_similarity_score": 0.1}]
    (folder / "regen.json").write_text(json.dumps(old))
    generate(server, "./", num_instructions_to_generate=10)
    generate(server, "./", num_instructions_to_generate=20)
    assert (folder / "alpaca_data.json").read_text() == "[1]"
    assert jload("regen.json")[0] == old[0]  # as in the original, a run continues the regen.json that it finds
    assert len(jload("regen.json")) == len(load_examples("regen_alpaca_data.json")) == 20


def test_a_regen_json_that_changed_before_the_first_answer_is_the_one_that_counts(folder, server):
    for name in ("Old", "New"):
        (folder / "regen.json").write_text(json.dumps([{"instruction": f"{name} tale", "input": "", "output": "Once"}]))
        server.faults = [{"status": 401}] if name == "Old" else []
        try:
            generate(server, "./", num_instructions_to_generate=10)
        except SystemExit:
            assert name == "Old"
    assert jload("regen.json")[0]["instruction"] == "New tale"


def test_somebodys_rejected_jsonl_is_refused_before_the_first_request(folder, server, capsys):
    (folder / "rejected.jsonl").write_text("my papers\n")
    assert "./rejected.jsonl is not as this script wrote it; move it away" in fails(capsys, server, "./")
    assert (folder / "rejected.jsonl").read_text() == "my papers\n"
    assert not server.requests


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("proof", [True, False], ids=["proof", "no proof"])
def test_an_edit_by_hand_is_refused_and_once_moved_away_the_run_goes_on(folder, server, capsys, name, proof):
    generate(server, "whole", num_instructions_to_generate=80)
    generate(server)
    path = folder / "out" / name
    edited = path.read_text().replace("Tell how", "Say how", 1)
    path.write_text(edited)
    if not proof:  # as in a folder of an earlier version
        (folder / "out" / ".written.json").unlink()
    server.requests.clear()
    said = fails(capsys, server, num_instructions_to_generate=80)
    assert f"out/{name} is not as this script wrote it" in said
    assert path.read_text() == edited
    assert not server.requests
    path.rename(folder / name)
    generate(server, num_instructions_to_generate=80)
    assert outputs(folder / "out") == outputs(folder / "whole")


@pytest.mark.parametrize("written", ["all", "some", "nothing"])
def test_a_folder_of_an_earlier_version_is_proven_by_its_journal_and_goes_on(folder, server, written):
    for name, target in (("whole", 130), ("out", 60)):
        generate(server, name, num_instructions_to_generate=target)
    if written != "all":  # the files lag behind the journal when a run is killed
        generate_instruction.main(flags(server, "short", num_instructions_to_generate=20))
        for name in OUTPUTS:
            text = (folder / "short" / name).read_text() if written == "some" else "" if name[-1] == "l" else "[]"
            (folder / "out" / name).write_text(text)
    (folder / "out" / ".written.json").unlink()
    generate(server, num_instructions_to_generate=130)
    assert outputs(folder / "out") == outputs(folder / "whole")


def test_an_edit_during_a_run_is_kept_and_the_answers_are_safe(folder, server, capsys):
    generate(server, "whole")
    asked = []

    def edit(body):
        asked.append(body)
        if len(asked) == 2:
            (folder / "out" / "regen.json").write_text("mine")
        return {}

    server.faults = [edit] * 9
    assert "out/regen.json is not as this script wrote it" in fails(capsys, server)
    assert (folder / "out" / "regen.json").read_text() == "mine"
    (folder / "out" / "regen.json").unlink()
    server.requests.clear()
    generate(server)
    assert not server.requests
    assert outputs(folder / "out") == outputs(folder / "whole")


@pytest.mark.parametrize("name", OUTPUTS)
def test_replay_replaces_nobody_elses_files_but_its_own(folder, server, capsys, name):
    generate(server)
    (folder / "mine").mkdir()
    (folder / "mine" / name).write_text("[1]\n")
    replay = ["replay", "--journal_path=out/requests.jsonl"]
    with pytest.raises(SystemExit):
        generate_instruction.main([*replay, "--output_dir=mine"])
    assert f"mine/{name} is not as this script wrote it" in capsys.readouterr().err
    assert [(path.name, path.read_text()) for path in (folder / "mine").iterdir()] == [(name, "[1]\n")]
    for words in ("5", "6"):
        generate_instruction.main([*replay, "--output_dir=again", f"--min_words={words}"])


def test_a_full_disk_is_one_line_and_loses_nothing(folder, server):
    generate(server, "whole")
    (folder / "out").mkdir()
    limit = (folder / "whole" / "requests.jsonl").stat().st_size // 2  # the second answer doesn't fit any more
    command = [sys.executable, "-m", "generate_instruction", *flags(server, "out")]
    done = subprocess.run(
        command, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "cannot write to out: File too large" in done.stderr.splitlines()[-1]
    asked = len(server.requests)
    generate(server)
    assert len(server.requests) - asked < 3
    assert outputs(folder / "out") == outputs(folder / "whole")
