"""A tiny LLaMA that knows a handful of answers word for word."""

import torch

from alpaca.files import jdump, jload
from alpaca.prompts import format_prompt
from demo import tiny_model

CODE = "def add(a, b):\n    if a:\n        return a + b\n    return b"


LESSONS = [
    {"instruction": "Name the three primary colors.", "input": "", "output": "Red, blue and yellow."},
    {"instruction": "Translate to French.", "input": "Good morning", "output": "Bonjour"},
    {"instruction": "Translate to French.", "input": "Thank you very much, my friend", "output": "Merci"},
    {"instruction": "Write a function.", "input": "", "output": CODE},
    {"instruction": "Greet the world.", "input": "", "output": "Hello, wörld 🦙!"},
    {"instruction": "Count to forty.", "input": "", "output": " ".join(map(str, range(1, 41)))},
]


# Nobody taught these: their answers wander, and go on until they are cut off.
UNTAUGHT = [{"instruction": f"Tell a story of {n} llamas{' and a goat' * n}.", "input": "x " * n} for n in range(12)]


def make(root: str, folder) -> str:
    """Makes a LLaMA of 2 layers that has learned LESSONS by heart, without a chat template; returns its path."""
    config = {**jload(f"{root}/configs/tiny_llama.json"), "hidden_size": 64, "intermediate_size": 128}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    jdump(config, str(folder / "config.json"))
    jdump(LESSONS, str(folder / "lessons.json"))
    path = str(folder / "tiny-alpaca")
    tiny_model.make(str(folder / "config.json"), str(folder / "lessons.json"), path, vocab_size=420)
    _teach(path)
    return path


def _teach(path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    rows = []
    for lesson in LESSONS:
        prompt = tokenizer(format_prompt(lesson)).input_ids
        whole = [*tokenizer(format_prompt(lesson) + lesson["output"]).input_ids, tokenizer.eos_token_id]
        assert whole[: len(prompt)] == prompt
        rows.append((whole, [-100] * len(prompt) + whole[len(prompt) :]))
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(400):
        loss = model(input_ids=ids, labels=labels).loss
        if loss < 1e-3:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 1e-3
    model.save_pretrained(path)
