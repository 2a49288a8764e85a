"""alpaca/generation/output.py: the folder's earlier files, and a full disk."""

import json
import resource
import subprocess
import sys

from generation_runs import flags, generate, outputs

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
