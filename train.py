r"""Fine-tunes LLaMA or OPT on instruction data, as Stanford Alpaca did.

    torchrun --nproc_per_node=4 --master_port=29500 train.py \
        --model_name_or_path DIR --data_path ./alpaca_data.json --bf16 True --output_dir OUT \
        --num_train_epochs 3 --per_device_train_batch_size 4 --per_device_eval_batch_size 4 \
        --gradient_accumulation_steps 8 --evaluation_strategy "no" --save_strategy "steps" --save_steps 2000 \
        --save_total_limit 1 --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03 \
        --lr_scheduler_type "cosine" --logging_steps 1 --fsdp "full_shard auto_wrap" \
        --fsdp_transformer_layer_cls_to_wrap 'LlamaDecoderLayer' --tf32 True

`python train.py merge --adapter_dir OUT --output_dir MERGED` merges a LoRA adapter into its model's weights.
"""

import copy
import os
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import transformers
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers.trainer_utils import set_seed

from alpaca.cli import UserError, run_cli, steady_streams
from alpaca.models import tensor_shapes
from alpaca.prompts import PROMPT_DICT, format_prompt
from alpaca.ranks import announce, is_main, refuse
from alpaca.tokenizers import (
    DEFAULT_BOS_TOKEN,
    DEFAULT_EOS_TOKEN,
    DEFAULT_PAD_TOKEN,
    DEFAULT_UNK_TOKEN,
    continuation_tokenizer,
    smart_tokenizer_and_embedding_resize,
)
from alpaca.training import card, lora, resuming, saving
from alpaca.training.arguments import (
    DataArguments,
    ModelArguments,
    TrainingArguments,
    misfits_in_one_line,
    parse_arguments,
)
from alpaca.training.data import IGNORE_INDEX, describe_data, load_dataset_examples, token_index, tokenize_once
from alpaca.training.loading import load_for_training, load_skeleton, stand_in
from alpaca.training.packing.model import compile_layers
from alpaca.training.packing.trainer import PackedTrainer
from alpaca.training.plan import Plan, check_data, make_plan, total_steps, write
from alpaca.training.throughput import run_table
from alpaca.training.trainer import AlpacaTrainer

__all__ = [
    "DEFAULT_BOS_TOKEN",
    "DEFAULT_EOS_TOKEN",
    "DEFAULT_PAD_TOKEN",
    "DEFAULT_UNK_TOKEN",
    "IGNORE_INDEX",
    "PROMPT_DICT",
    "DataArguments",
    "DataCollatorForSupervisedDataset",
    "ModelArguments",
    "SupervisedDataset",
    "TrainingArguments",
    "make_supervised_data_module",
    "preprocess",
    "smart_tokenizer_and_embedding_resize",
    "train",
]


# ---------------------------------------------------------------------------------------------------------------------
# Data


def preprocess(
    sources: Sequence[str], targets: Sequence[str], tokenizer, boundary: str = "joint"
) -> dict[str, list[torch.Tensor]]:
    """Turns prompts and answers into tokens and labels.

    An example is BOS (if the tokenizer adds one), the tokens of prompt + answer as one text, and EOS, cut at
    `tokenizer.model_max_length`. Labels are the same tokens, IGNORE_INDEX in the prompt. A token belongs to the prompt
    if it starts before the answer does. So a token that straddles the two (LLaMA joins the prompt's last `:` with `-`
    or `//`) is not learned, as in the original: at inference the prompt ends with `:`, and the model cannot produce it.

    Args:
        sources: Prompts.
        targets: Answers, with or without the EOS that the original's callers append.
        tokenizer: A fast tokenizer with an EOS.
        boundary: "joint" as above, or "separate", which tokenizes prompt and answer apart. No token straddles them
            then: all of the answer is learned, after the very tokens that a prompt has at inference.

    Returns:
        `input_ids` and `labels`, one int64 tensor each per example.
    """
    eos, limit, backend = tokenizer.eos_token_id, tokenizer.model_max_length, tokenizer.backend_tokenizer
    backend.no_truncation()  # an earlier call of the tokenizer leaves its settings behind
    backend.no_padding()
    targets = [target.removesuffix(tokenizer.eos_token) for target in targets]
    answers = continuation_tokenizer(tokenizer) if boundary == "separate" else None
    fields: dict[str, list[torch.Tensor]] = {"input_ids": [], "labels": []}
    starts = range(0, len(sources), 1000)
    for start in tqdm(starts, "tokenizing", unit=" thousand examples", disable=len(starts) < 2 or not is_main()):
        texts = list(zip(sources[start : start + 1000], targets[start : start + 1000], strict=True))
        encodings = backend.encode_batch([source if answers else source + target for source, target in texts])
        for (source, target), encoding in zip(texts, encodings, strict=True):
            ids = encoding.ids
            if ids[-1:] == [eos] and encoding.special_tokens_mask[-1] and encoding.offsets[-1][1] == 0:
                ids.pop()  # this tokenizer adds EOS itself
            prompt_length = token_index(encoding, len(source), len(ids))
            answer = answers.encode(target, add_special_tokens=False).ids if answers else []
            input_ids = torch.tensor([*ids, *answer, eos][:limit])
            labels = input_ids.clone()
            labels[:prompt_length] = IGNORE_INDEX
            fields["input_ids"].append(input_ids)
            fields["labels"].append(labels)
    return fields


class SupervisedDataset(Dataset):
    """Instruction data as tokens.

    Attributes:
        input_ids: One int64 tensor per example.
        labels: Likewise, IGNORE_INDEX for tokens that are not learned.
        data_path: Where the examples come from.
        records: The number of each example there, from 0.
    """

    def __init__(
        self, data_path: str, tokenizer, examples: Mapping[int, Mapping] | None = None, boundary: str = "joint"
    ):
        """Tokenizes the records of `data_path`, or only `examples`, record number -> record."""
        super().__init__()
        examples = dict(enumerate(load_dataset_examples(data_path))) if examples is None else examples
        sources = [format_prompt(example) for example in examples.values()]
        targets = [f"{example['output']}{tokenizer.eos_token}" for example in examples.values()]
        fields = tokenize_once(preprocess, sources, targets, tokenizer, boundary=boundary)
        self.data_path, self.records = data_path, list(examples)
        self.input_ids, self.labels = fields["input_ids"], fields["labels"]

    def __len__(self) -> int:
        """Counts the examples."""
        return len(self.input_ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        """Gets an example, with the number of its record."""
        return {"input_ids": self.input_ids[i], "labels": self.labels[i], "record": torch.tensor(self.records[i])}

    def unlearnable(self) -> list[int]:
        """Lists the records without a label, whose prompt alone fills `model_max_length`."""
        return [n for n, labels in zip(self.records, self.labels, strict=True) if labels[-1] == IGNORE_INDEX]


@dataclass
class DataCollatorForSupervisedDataset:
    """Pads examples on the right, to the longest of the batch."""

    tokenizer: transformers.PreTrainedTokenizerBase

    def __call__(self, instances: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Collates a batch.

        Args:
            instances: `input_ids` and `labels` of each example, and perhaps its `record` number.

        Returns:
            `input_ids`, `labels` and `attention_mask`, int64 of shape (batch, longest), and `records` (batch,).
        """
        pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        pad = torch.nn.utils.rnn.pad_sequence
        ids = [instance["input_ids"] for instance in instances]
        batch = {
            "input_ids": pad(ids, batch_first=True, padding_value=pad_id),
            "labels": pad([instance["labels"] for instance in instances], batch_first=True, padding_value=IGNORE_INDEX),
            # From true lengths: a mask from `input_ids != pad` hides real tokens where pad is also EOS, BOS or UNK.
            "attention_mask": pad([torch.ones_like(one) for one in ids], batch_first=True),
        }
        if "record" in instances[0]:
            batch["records"] = torch.stack([instance["record"] for instance in instances])
        return batch


def make_supervised_data_module(tokenizer, data_args: DataArguments, seed: int = 42) -> dict:
    """Makes the datasets and the collator that the Trainer takes.

    Args:
        tokenizer: The tokenizer.
        data_args: Where the examples are, and which are for evaluation.
        seed: Draws the examples that `eval_fraction` sets aside.

    Raises:
        UserError: A record is wrong; names the first one and what was found there.
    """
    examples = dict(enumerate(load_dataset_examples(data_args.data_path)))
    held_out = {}
    if data_args.eval_fraction:
        if len(examples) < 2:
            raise UserError(f"--eval_fraction {data_args.eval_fraction}: {data_args.data_path} has only one record")
        count = min(len(examples) - 1, max(1, round(len(examples) * data_args.eval_fraction)))
        held_out = {i: examples.pop(i) for i in sorted(random.Random(seed).sample(range(len(examples)), count))}
    eval_dataset, boundary = None, data_args.prompt_boundary
    if held_out:
        eval_dataset = SupervisedDataset(data_args.data_path, tokenizer, held_out, boundary)
    elif data_args.eval_data_path:
        eval_dataset = SupervisedDataset(data_args.eval_data_path, tokenizer, boundary=boundary)
    return {
        "train_dataset": SupervisedDataset(data_args.data_path, tokenizer, examples, boundary),
        "eval_dataset": eval_dataset,
        "data_collator": DataCollatorForSupervisedDataset(tokenizer),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Training


def train() -> None:
    """Trains as the command line says: arguments, skeleton, plan, data, model, Trainer, saved and reloaded.

    Raises:
        UserError: A user's mistake, found before the weights load wherever possible.
        SystemExit: Status 143 after SIGTERM.
    """
    model_args, data_args, args = parse_arguments(description=__doc__)
    resume = resuming.find_resume_point(args.output_dir, args.resume_from_checkpoint)
    inputs = model_args.model_name_or_path, (data_args.data_path, data_args.eval_data_path)
    saving.check_output(args.output_dir, resume, args.overwrite_output_dir, *inputs)
    tokenizer, skeleton = load_skeleton(model_args, args)
    plan = make_plan(model_args, data_args, args, skeleton)
    write(args, plan.settings)
    announce(str(plan))
    with args.main_process_first(local=True):
        data = make_supervised_data_module(tokenizer, data_args, args.seed)
    describe_data(data, tokenizer)
    steps = total_steps(args, len(data["train_dataset"]))
    record = resuming.run_record(model_args, data_args, args, data, steps)
    check_data(plan, args, data, steps, resume)
    if resume:
        resuming.check_same_run(resume, skeleton.config, record)
    parts = {"processing_class": tokenizer, "record": record, **data}
    if not args.deepspeed:  # a process has one DeepSpeed engine; what doesn't fit shows when the real Trainer is made
        with misfits_in_one_line(), tempfile.TemporaryDirectory() as elsewhere:
            trial = copy.deepcopy(args)  # the Trainer writes into them, and makes the folder
            trial.output_dir = os.path.join(elsewhere, os.path.basename(os.path.abspath(args.output_dir)))
            rehearsed = stand_in(model_args, skeleton, args.device, tokenizer)
            make_trainer(plan, model=rehearsed, args=trial, **parts).rehearse(steps)
    set_seed(args.seed)
    model = load_for_training(model_args, args, plan, tokenizer, skeleton.config)
    shapes = lora.adapter_shapes(model) if plan.lora_r else tensor_shapes(skeleton)
    with misfits_in_one_line():
        trainer = make_trainer(plan, model=model, args=args, **parts)
    announce(trainer.describe())
    if plan.compile_layers:
        compile_layers(trainer.model)
    # SIGTERM also waits while the model is saved, which may be the run's first save.
    claimed = saving.claimed(args.output_dir, clear=args.overwrite_output_dir and not resume)
    with claimed, saving.disk_watched(args.output_dir), trainer.stop_signal:
        trainer.train(resume_from_checkpoint=resume)
        if trainer.stopped:
            last = saving.last_checkpoint(args.output_dir)
            announce(f"SIGTERM: stopped, saved {last}; the same command with --resume_from_checkpoint True continues")
            raise SystemExit(143)
        trainer.save_state()
        tensors = trainer.save_verified(*shapes)
    announce(run_table(trainer.state, trainer.throughput))
    announce(f"{args.output_dir}: saved and reloaded {tensors} tensors, every one present, right shape, finite")
    if data["eval_dataset"] is not None:
        trainer.log_metrics("eval", trainer.evaluate())
        trainer.save_state()
    if is_main():
        card.write_card(args.output_dir, record, trainer.state)
    if plan.lora_r:
        announce(f"merge the adapter: python train.py merge --adapter_dir {args.output_dir} --output_dir MERGED")
        announce(f"or serve it: {card.serving_command(model_args.model_name_or_path, args.output_dir)}")


def make_trainer(plan: Plan, **kwargs) -> AlpacaTrainer:
    """Makes the trainer that the plan calls for."""
    if not plan.padding_free:
        return AlpacaTrainer(shape=plan.shape, **kwargs)
    passes = {"tokens_per_pass": plan.tokens_per_pass, "shared_prefix": plan.shared_prefix}
    return PackedTrainer(shape=plan.shape, **passes, **kwargs)


def main() -> None:
    """Runs `train` or `merge`; reports a user's mistake in one line and with exit status 2."""
    if sys.argv[1:2] == ["merge"]:
        return run_cli({"merge": lora.merge})
    steady_streams()
    try:
        train()
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        refuse(error)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
