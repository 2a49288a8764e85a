"""The training templates, byte for byte, and the chat template, token for token."""

import json
import shutil
import signal
import socket
import subprocess
import sys

import pytest
from taught_model import LESSONS, UNTAUGHT

from alpaca.files import jdump, jload
from alpaca.prompts import alpaca_chat_template, format_prompt
from alpaca.tokenizers import load_tokenizer
from demo import tiny_model


def test_prompt_with_an_input_is_the_originals_to_the_byte():
    assert format_prompt({"instruction": "Add.", "input": "1, 2"}).encode() == (
        b"Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        b"response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n"
        b"### Response:"
    )


@pytest.mark.parametrize("example", [{"instruction": "Rhyme."}, {"instruction": "Rhyme.", "input": ""}])
def test_prompt_without_an_input_is_the_originals_to_the_byte(example):
    assert format_prompt(example).encode() == (
        b"Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        b"### Instruction:\nRhyme.\n\n### Response:"
    )


def test_braces_and_placeholders_in_the_data_stay_as_they_are():
    prompt = format_prompt({"instruction": "Fill {input} and {0} in {instruction}.", "input": "{instruction} {input}"})
    assert "### Instruction:\nFill {input} and {0} in {instruction}.\n" in prompt
    assert "### Input:\n{instruction} {input}\n" in prompt


# ---------------------------------------------------------------------------------------------------------------------
# The chat template


# transformers' own server, which also prints the prompts that its model gets.
SPYING_SERVER = """
import sys
from transformers import LlamaForCausalLM
from transformers.cli.transformers import main
generate = LlamaForCausalLM.generate
def spy(self, *args, **kwargs):
    ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
    print("PROMPT", ids[0].tolist(), flush=True)
    return generate(self, *args, **kwargs)
LlamaForCausalLM.generate = spy
sys.argv[0] = "transformers"
main()
"""


PROMPTS = [*LESSONS, *UNTAUGHT[:3], {"instruction": " Mind  the\n\ngap {x} {{ y }}", "input": "    'quoted'\n"}]


def assert_template_gives_the_texts_tokens(folder):
    tokenizer = with_chat_template(folder)
    for example in PROMPTS:
        expected = tokenizer(format_prompt(example)).input_ids
        got = tokenizer.apply_chat_template(messages(example), add_generation_prompt=True, return_dict=True).input_ids
        assert got == expected, tokenizer.convert_ids_to_tokens(got)[:3]


@pytest.mark.parametrize(("kind", "legacy"), [("llama", True), ("llama", False), ("opt", None)])
def test_chat_template_gives_the_training_templates_tokens(root, kind, legacy, tmp_path):
    jdump(LESSONS, str(tmp_path / "lessons.json"))
    folder = tmp_path / kind
    tiny_model.make(f"{root}/configs/tiny_{kind}.json", str(tmp_path / "lessons.json"), str(folder), vocab_size=420)
    path = str(folder / "tokenizer_config.json")
    jdump({**jload(path), "legacy": legacy}, path)
    assert_template_gives_the_texts_tokens(folder)


def test_chat_template_gives_the_training_templates_tokens_of_the_real_tokenizers(reference_dir, tmp_path):
    opt = {name: "</s>" for name in ("bos_token", "eos_token", "unk_token")}
    for kind, config in (("llama", {"tokenizer_class": "LlamaTokenizer"}), ("opt", opt)):
        folder = shutil.copytree(f"{reference_dir}/tokenizers/{kind}", tmp_path / kind)
        config = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, **config}
        jdump(config, str(folder / "tokenizer_config.json"))
        assert_template_gives_the_texts_tokens(folder)


def with_chat_template(folder):
    """Gives a tokenizer the template as train.py does."""
    tokenizer, _ = load_tokenizer(str(folder), 1024)
    adds_bos = tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    tokenizer.chat_template = alpaca_chat_template(adds_bos)
    tokenizer.save_pretrained(folder)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def messages(example):
    tail = f"\n\n### Input:\n{example['input']}" if example["input"] else ""
    return [{"role": "user", "content": example["instruction"] + tail}]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_transformers_serve_prompts_the_model_as_it_was_trained(model_copy, tmp_path):
    from openai import OpenAI

    tokenizer = with_chat_template(model_copy)
    port = free_port()
    command = [sys.executable, "-c", SPYING_SERVER, "serve", "--port", str(port), "--host", "127.0.0.1"]
    with open(tmp_path / "log", "w") as log, open(tmp_path / "errors", "w") as errors:
        process = subprocess.Popen(command, stdout=log, stderr=errors)
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=60)
        for lesson in (LESSONS[0], LESSONS[1], LESSONS[3]):
            completion = client.chat.completions.create(
                model=str(model_copy), messages=messages(lesson), max_tokens=60, temperature=0
            )
            assert completion.choices[0].message.content == lesson["output"]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)
    prompts = [json.loads(line[7:]) for line in (tmp_path / "log").read_text().splitlines() if line[:6] == "PROMPT"]
    assert prompts == [tokenizer(format_prompt(lesson)).input_ids for lesson in (LESSONS[0], LESSONS[1], LESSONS[3])]
