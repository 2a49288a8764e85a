"""weight_diff.py as its user drives it, on real checkpoint files."""

import json
import os
import random
import re
import shutil
import subprocess
import sys

import pytest
import torch
from weight_diff_pairs import (
    DTYPES,
    EMBED,
    HEAD,
    assert_same_bits,
    assert_same_files,
    llama_shapes,
    load,
    make_diff,
    make_pair,
    noisy,
    recover,
    refused,
    resave,
    save,
    whole_pair,
    write,
)

import weight_diff
from alpaca.prompts import PROMPT_DICT
from alpaca.tokenizers import load_tokenizer
from alpaca.weight_diff import checkpoint_files


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Raw, tuned and diff, not to be changed."""
    return whole_pair(str(tmp_path_factory.mktemp("pair")))


@pytest.mark.parametrize("raw_dtype", DTYPES)
@pytest.mark.parametrize("tuned_dtype", DTYPES)
@pytest.mark.parametrize(("raw", "tuned"), [({}, {"shards": 3}), ({"bin_files": True, "shards": 2}, {})])
def test_recovered_folder_is_the_tuned_one_byte_for_byte(tmp_path, raw_dtype, tuned_dtype, raw, tuned):
    raw, tuned = make_pair(tmp_path, raw_dtype, tuned_dtype, raw=raw, tuned=tuned)
    diff = make_diff(raw, tuned, tmp_path)
    assert_same_files(recover(raw, diff, tmp_path), tuned)


def test_special_values_survive(tmp_path):
    special = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, -1e-40, 3.4e38, 65504, 6e-8, 1.0, -1.0]
    for dtype in DTYPES:
        folder = os.path.join(tmp_path, dtype)
        grid = torch.tensor([(a, b) for a in special for b in special]).to(DTYPES[dtype])
        shapes = llama_shapes()
        raw = {n: torch.zeros(s, dtype=DTYPES[dtype]) for n, s in shapes.items()}
        tuned = dict(raw)
        raw["model.norm.weight"], tuned["model.norm.weight"] = grid[:, 0].contiguous(), grid[:, 1].contiguous()
        raw, tuned = save(f"{folder}/raw", raw), save(f"{folder}/tuned", tuned)
        assert_same_files(recover(raw, make_diff(raw, tuned, folder), folder), tuned)


def test_another_dtype_is_the_tuned_model_rounded_once(tmp_path):
    raw, tuned = make_pair(tmp_path)
    out = recover(raw, make_diff(raw, tuned, tmp_path), tmp_path, dtype="bfloat16")
    assert_same_bits(load(out), {n: t.bfloat16() for n, t in load(tuned).items()})
    with open(os.path.join(out, "config.json")) as file:
        assert json.load(file)["torch_dtype"] == "bfloat16"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, root):
    """Real models: LLaMA and a tied OPT, each as base and tuned with [PAD] added; transformers wrote them."""
    folder = tmp_path_factory.mktemp("tiny")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from demo import tiny_model

    words = ["".join(random.Random(i).choices("abcdefghijklmnop", k=6)) for i in range(400)]
    examples = [{"instruction": " ".join(words[i : i + 40]), "input": "", "output": words[i]} for i in range(300)]
    write(folder / "data.json", json.dumps(examples))
    generator = torch.Generator().manual_seed(0)
    for kind in ("llama", "opt"):
        with open(f"{root}/configs/tiny_{kind}.json") as file:
            config = {**json.load(file), "vocab_size": 500, "num_hidden_layers": 2}
        write(folder / f"{kind}.json", json.dumps(config))
        tiny_model.make(str(folder / f"{kind}.json"), str(folder / "data.json"), str(folder / kind / "raw"))
        model = AutoModelForCausalLM.from_pretrained(folder / kind / "raw")
        tokenizer = AutoTokenizer.from_pretrained(folder / kind / "raw")
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        model.resize_token_embeddings(model.config.vocab_size + 1, mean_resizing=False)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(noisy(parameter, generator))
        model.save_pretrained(folder / kind / "tuned", max_shard_size="500KB")
        tokenizer.save_pretrained(folder / kind / "tuned")
    return folder


def models_of_2023(raw, other):
    """Both as the original loads them: float32, the base resized, its new row the mean of the others."""
    from transformers import AutoModelForCausalLM

    base, model = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (raw, other))
    base.resize_token_embeddings(model.config.vocab_size, mean_resizing=False)
    embeddings = [e.weight.data for e in (base.get_input_embeddings(), base.get_output_embeddings())]
    means = [embedding[:-1].mean(dim=0, keepdim=True) for embedding in embeddings]
    for embedding, mean in zip(embeddings, means, strict=True):
        embedding[-1:] = mean
    return base.state_dict(), model


@pytest.mark.parametrize("kind", ["llama", "opt"])
@pytest.mark.parametrize("bin_files", [True, False])
def test_diff_of_2023_recovers_as_it_did_then(tiny, tmp_path, kind, bin_files, capsys):
    raw, tuned, diff = tiny / kind / "raw", tiny / kind / "tuned", tmp_path / "diff"
    base, model = models_of_2023(raw, tuned)
    state = model.state_dict()
    with torch.inference_mode():
        for name in state:
            state[name].add_(-base[name])
        model.save_pretrained(diff)
        if bin_files:
            os.unlink(diff / "model.safetensors")
            torch.save(dict(state), diff / "pytorch_model.bin")
        shutil.copyfile(tuned / "tokenizer_config.json", diff / "tokenizer_config.json")
        for name in state:
            state[name].add_(base[name])
    found = load(recover(str(raw), str(diff), str(tmp_path)))
    assert_same_bits(found, {name: tensor for name, tensor in state.items() if name in found})
    assert set(state) - set(found) <= {HEAD if kind == "opt" else ""}
    assert "has no manifest" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_diff_is_read_by_plain_addition_as_the_original_does(tiny, tmp_path, kind):
    raw, tuned = str(tiny / kind / "raw"), str(tiny / kind / "tuned")
    base, model = models_of_2023(raw, make_diff(raw, tuned, str(tmp_path)))
    state = model.state_dict()
    with torch.inference_mode():
        for name in state:
            state[name].add_(base[name])
    wanted = load(tuned)
    assert set(wanted) | {HEAD} == set(state)
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, wanted.get(name, wanted.get("model.decoder.embed_tokens.weight")))


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_python_gets_the_tuned_model_and_its_tokenizer(tiny, tmp_path, kind, capsys):
    from transformers import AutoModelForCausalLM

    raw, tuned = str(tiny / kind / "raw"), str(tiny / kind / "tuned")
    diff = make_diff(raw, tuned, str(tmp_path))
    assert_same_files(recover(raw, diff, str(tmp_path)), tuned)
    model, tokenizer = weight_diff.recover(raw, diff, test_inference=True)
    assert_same_bits(model.state_dict(), AutoModelForCausalLM.from_pretrained(tuned).state_dict())
    assert tokenizer.pad_token == "[PAD]"
    printed = capsys.readouterr().out
    assert (
        PROMPT_DICT["prompt_no_input"].format(instruction="List three technologies that make life easier.") in printed
    )


def test_python_gets_the_corrected_tokenizer(tmp_path):
    """transformers' own AutoTokenizer loses one of the spaces that a text begins with."""
    import sentencepiece
    from transformers import AutoTokenizer

    from demo import tiny_model

    indented = [{"instruction": f"{' ' * i}if a:{' ' * 2 * i}b", "output": f"c{' ' * i}d"} for i in range(1, 17)] * 20
    write(tmp_path / "data.json", json.dumps(indented))
    config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    write(tmp_path / "config.json", json.dumps({**config, "num_attention_heads": 2, "vocab_size": 320}))
    raw, tuned = str(tmp_path / "raw"), str(tmp_path / "tuned")
    tiny_model.make(str(tmp_path / "config.json"), str(tmp_path / "data.json"), raw)
    shutil.copytree(raw, tuned)
    diff = make_diff(raw, tuned, str(tmp_path))
    _, tokenizer = weight_diff.recover(raw, diff, str(tmp_path / "out"), test_inference=False)

    text = "  a  b   if  a:" + " " * 7 + "d"
    reference = sentencepiece.SentencePieceProcessor(os.path.join(raw, "tokenizer.model"))
    ids = [reference.bos_id(), *reference.encode(text)]
    assert tokenizer(text)["input_ids"] == ids == load_tokenizer(raw)[0](text)["input_ids"]
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text)["input_ids"] != ids


def test_sum_of_alpaca_7b_is_told_with_and_without_rotary_buffers():
    shapes = {EMBED: (32001, 4096), **{f"model.layers.{i}.self_attn.q_proj.weight": (1, 1) for i in range(32)}}
    diff = checkpoint_files.Checkpoint("", {n: checkpoint_files.Tensor(n, "F32", s, "", 0) for n, s in shapes.items()})
    buffers = 32 * sum(10000 ** (-i / 64) for i in range(64))
    assert "with the rotary buffers" in weight_diff._naive_integrity(50637.1836 - buffers, diff)
    assert "as it is that is the 50637.1836" in weight_diff._naive_integrity(50637.1836, diff)
    assert "a file is damaged or the base is another" in weight_diff._naive_integrity(50000.0, diff)
    del diff.tensors["model.layers.31.self_attn.q_proj.weight"]
    assert weight_diff._naive_integrity(50637.1836, diff).endswith("50637.1836")


def test_verify_and_info_tell_what_a_folder_is(pair, tmp_path, capsys):
    raw, tuned, diff = pair
    out = recover(raw, diff, str(tmp_path))
    for path, against, what in (
        (diff, None, "the diff"),
        (out, None, "the tuned model"),
        (raw, diff, "the base of the diff"),
        (tuned, diff, "the tuned model"),
    ):
        capsys.readouterr()
        weight_diff.verify(path, against)
        assert f"{what}, 19 tensors, each as the manifest says" in capsys.readouterr().out
    assert "has no manifest" in refused(weight_diff.verify, raw)
    for path in (raw, diff, out):
        assert f"{out} is a recovered model, not a diff" in refused(weight_diff.verify, path, out)
    weight_diff.info(out)
    assert capsys.readouterr().out.endswith("a recovered model, not a diff\n")
    weight_diff.info(diff)
    printed = capsys.readouterr().out
    assert "base: a model of hidden size 48, 2 layers, 40 rows, fingerprint " in printed
    assert f"adds: 1 row(s) to {HEAD}, 1 row(s) to {EMBED}" in printed
    assert re.search(r"corrections: [\d,]+ elements", printed)
    resave(out, lambda tensors: tensors[EMBED].mul_(2))
    assert f"1 of 19 tensors and files differ from the manifest: {EMBED}" in refused(weight_diff.verify, out, diff)


def test_model_that_does_not_fit_in_memory_is_not_asked(pair, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(weight_diff, "host_memory", lambda: 1000)
    weight_diff.recover(pair[0], pair[2], str(tmp_path / "out"))
    assert "no test inference: the model needs" in capsys.readouterr().out


def test_a_device_that_is_not_there_costs_no_recovered_model(tiny, tmp_path, capsys):
    raw, tuned = str(tiny / "llama" / "raw"), str(tiny / "llama" / "tuned")
    weight_diff.recover(raw, make_diff(raw, tuned, str(tmp_path)), str(tmp_path / "out"), device="cuda:99")
    assert "no test inference: " in capsys.readouterr().out


MEASURED = """
import sys, weight_diff
getattr(weight_diff, sys.argv[1])(*sys.argv[2:], **({"test_inference": False} if sys.argv[1] == "recover" else {}))
loaded = [name for name in ("torch", "transformers", "openai") if name in sys.modules]
print(*loaded, next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def measured(*arguments) -> tuple[list[str], float]:
    """Runs one command in a process of its own.

    Returns:
        Which of torch, transformers and openai it has loaded, and its peak resident memory in MB.
    """
    done = subprocess.run([sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True, check=True)
    *loaded, peak = done.stdout.split("\n")[-2].split()
    assert re.search(r"\[\d\d:\d\d<.*B/s\]", done.stderr)  # progress: time left and bytes a second
    return loaded, int(peak) / 1024


def test_memory_is_bounded_and_does_not_grow_with_the_model(tmp_path):
    peaks = []
    for hidden in (256, 640):
        folder = tmp_path / str(hidden)
        shapes = llama_shapes(rows=8000, hidden=hidden, inner=4 * hidden)
        raw, tuned = make_pair(folder, shapes=shapes)
        for arguments in (
            ("make_diff", raw, tuned, str(folder / "diff")),
            ("recover", raw, str(folder / "diff"), str(folder / "out")),
        ):
            loaded, peak = measured(*arguments)
            assert loaded == []
            peaks.append(peak)
        assert os.path.getsize(folder / "out" / "model.safetensors") > hidden * 70_000
        if hidden == 256:
            bins = save(folder / "bin", load(raw), bin_files=True)
            loaded, peak = measured("recover", bins, str(folder / "diff"), str(folder / "from_bin"))
            assert loaded == ["torch"]
            # A build for GPUs takes 500 MB for its import alone, one for CPUs 220.
            command = [sys.executable, "-c", "import sys, torch\nloaded = []\n" + MEASURED.split("\n")[-2]]
            alone = subprocess.check_output(command, text=True)
            assert peak < int(alone.split()[0]) / 1024 + 100
            assert_same_files(folder / "from_bin", tuned)
        shutil.rmtree(folder)
    assert max(peaks) < 100
    assert abs(max(peaks[2:]) - max(peaks[:2])) < 10


def test_command_line_takes_the_originals_flags_and_refuses_in_one_line(pair, tmp_path, root):
    raw, _, diff = pair
    script = [sys.executable, f"{root}/weight_diff.py"]
    flags = ["--path_raw", raw, "--path_diff", diff, "--path_tuned", str(tmp_path / "out")]
    old = ["--device", "cpu", "--test_inference", "False", "--check_integrity_naively", "False"]
    done = subprocess.run([*script, "recover", *flags, *old], capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path / 'out'}: 19 tensors recovered, each one verified\n"
    again = subprocess.run([*script, "recover", *flags], capture_output=True, text=True)
    assert again.returncode == 2
    assert re.fullmatch(r"error: .* exists; .*\n", again.stderr)
    shown = subprocess.run([*script, "make_diff", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0
    assert "PATH_TUNED" in shown.stdout + shown.stderr
    resumed = subprocess.run([*script, "recover", *flags, "--resume"], capture_output=True, text=True)
    assert (resumed.returncode, resumed.stdout) == (2, "")
    assert resumed.stderr.startswith("error: unknown flag --resume; ")


def test_main_runs_a_command(pair, tmp_path, capsys):
    weight_diff.main(["verify", "--path", pair[2]])
    assert "the diff, 19 tensors, each as the manifest says" in capsys.readouterr().out
