"""Every run leaves a model card, and never over somebody's README.md."""

import hashlib
import json

import pytest
import yaml
from training_runs import run

from alpaca.prompts import PROMPT_DICT

pytest_plugins = ["training_runs"]


@pytest.fixture(scope="module")
def out(models, data, tmp_path_factory):
    """The output folder of a run with held-out data."""
    folder = tmp_path_factory.mktemp("run") / "tuned"
    with pytest.MonkeyPatch.context() as patch:
        run(patch, models["llama"], data, folder, "--eval_fraction", "0.25")
    return folder


def test_card_says_what_a_user_of_the_weights_must_know(out, data):
    text = (out / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "llama",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "other",
        "license_name": "of-base-model-and-data",
        "tags": ["alpaca", "instruction-tuning"],
    }
    with open(data, "rb") as file:
        assert f"24 examples of `data.json`, sha256 `{hashlib.sha256(file.read()).hexdigest()}`; 8 examples" in body
    for row in (
        "| learning_rate | 0.001 |",
        "| examples per step | 8 |",
        "| steps | 3 |",
        "| prompt_boundary | joint |",
    ):
        assert row in body
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    [held_out] = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert f"| training loss | 1 | {losses[0]:.4f} |\n| training loss | 3 | {losses[-1]:.4f} |" in body
    assert f"| held-out loss | 3 | {held_out:.4f} |" in body
    assert all(prompt in body for prompt in PROMPT_DICT.values())
    assert "vllm serve tuned" in body
    assert "licence of the base model" in body
    assert str(out.parent) not in text, "no path of the machine that trained it"


def test_cards_of_earlier_runs_are_renewed_and_everything_else_stays(models, data, out, monkeypatch, capsys):
    card = out / "README.md"
    before = card.read_text(encoding="utf-8")
    again = ("--overwrite_output_dir", "True", "--learning_rate", "2e-3")
    run(monkeypatch, models["llama"], data, out, *again)
    assert "| learning_rate | 0.002 |" in card.read_text(encoding="utf-8")
    for mine in ("# Mine\n", before.replace("0.001", "0.003")):
        card.write_text(mine, encoding="utf-8")
        run(monkeypatch, models["llama"], data, out, *again)
        assert card.read_text(encoding="utf-8") == mine
        assert "README.md is there already and stays as it is; no model card was written" in capsys.readouterr().out
