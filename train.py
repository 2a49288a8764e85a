r"""Fine-tunes LLaMA or OPT on instruction data, as Stanford Alpaca did.

    torchrun --nproc_per_node=4 --master_port=29500 train.py \
        --model_name_or_path DIR --data_path ./alpaca_data.json --bf16 True --output_dir OUT \
        --num_train_epochs 3 --per_device_train_batch_size 4 --per_device_eval_batch_size 4 \
        --gradient_accumulation_steps 8 --evaluation_strategy "no" --save_strategy "steps" --save_steps 2000 \
        --save_total_limit 1 --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03 \
        --lr_scheduler_type "cosine" --logging_steps 1 --fsdp "full_shard auto_wrap" \
        --fsdp_transformer_layer_cls_to_wrap 'LlamaDecoderLayer' --tf32 True

`python train.py merge --adapter_dir OUT --output_dir MERGED` puts a LoRA adapter into its model's weights.
"""

import sys

from utils import UserError

if __name__ == "__main__" and sys.argv[1:2] != ["merge"]:
    from flags import check_flags

    try:
        check_flags(sys.argv[1:], __file__)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import transformers
from torch.utils.data import Dataset

import packing
import tokenization
from utils import (
    DEFAULT_BOS_TOKEN,
    DEFAULT_EOS_TOKEN,
    DEFAULT_PAD_TOKEN,
    DEFAULT_UNK_TOKEN,
    PROMPT_DICT,
    alpaca_chat_template,
    smart_tokenizer_and_embedding_resize,
)

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

IGNORE_INDEX = -100


@dataclass
class ModelArguments:
    """What to train."""

    model_name_or_path: str = field(default="facebook/opt-125m", metadata={"help": "A folder or a Hub id."})
    lora_r: int = field(default=0, metadata={"help": "Rank of a LoRA adapter; 0 trains all weights."})
    lora_alpha: float = field(default=16.0, metadata={"help": "LoRA's scale is lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the adapter's input."})
    lora_target_modules: str | None = field(
        default=None, metadata={"help": "Comma-separated module names; by architecture when not given."}
    )


@dataclass
class DataArguments:
    """What to train on."""

    data_path: str = field(default=None, metadata={"help": "Instruction data: JSON, JSON Lines or a Hub data set id."})
    eval_data_path: str | None = field(default=None, metadata={"help": "Instruction data to evaluate on."})
    eval_fraction: float = field(
        default=0.0, metadata={"help": "Share of --data_path to set aside for evaluation, 0 to 1."}
    )


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """How to train: the Trainer's arguments, the original's own, and the spellings of 2023."""

    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads go."})
    optim: str = field(default="adamw_torch", metadata={"help": "The optimizer."})
    model_max_length: int = field(
        default=512, metadata={"help": "Longest sequence in tokens; examples are right-padded, and cut beyond it."}
    )
    loss_reduction: str = field(
        default="micro_batch",
        metadata={
            "help": "micro_batch: the mean over micro-batches of each one's token mean, as the original. "
            "global: the mean over all tokens of a step, across accumulation and ranks."
        },
    )
    padding_free: str = field(
        default="auto",
        metadata={
            "help": "true: the examples of a step are laid end to end, without padding. false: padded batches, as the "
            "original. auto: true wherever loss and gradients are the padded batch's."
        },
    )
    shared_prefix: str = field(
        default="auto",
        metadata={
            "help": "true: the template's opening words are computed once per padding-free pass, not once per example. "
            "false: they are not. auto: true wherever that changes nothing."
        },
    )
    max_tokens_per_pass: int = field(
        default=0, metadata={"help": "Tokens of a padding-free pass; by the device's memory when 0."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Train into a folder that already holds a run; its files are replaced."}
    )
    evaluation_strategy: str | None = field(default=None, metadata={"help": "2023's name of --eval_strategy."})
    warmup_ratio: float | None = field(
        default=None, metadata={"help": "Warmup as a share of all steps; --warmup_steps takes fractions too now."}
    )
    fsdp_transformer_layer_cls_to_wrap: str | None = field(
        default=None, metadata={"help": "Layer class that FSDP wraps; found in the model when not given."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Kept off: batches carry record numbers."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Kept off: a NaN loss stops the run."})

    def __post_init__(self):
        """Translates the spellings of 2023 and asks for no more than the machine has."""
        if self.evaluation_strategy is not None:
            self.eval_strategy = self.evaluation_strategy
        if self.warmup_ratio is not None and not self.warmup_steps:
            self.warmup_steps = self.warmup_ratio
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False
        if not torch.accelerator.is_available():
            self.use_cpu = True
        has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        if self.bf16 and not has_bf16:
            self.bf16 = False
            say(f"--bf16: {device_name()} has no bfloat16 arithmetic; going on in float32")
        if self.tf32 and not (torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8):
            self.tf32 = None
            say(f"--tf32: {device_name()} has no TF32 arithmetic; going on without")
        if self.fsdp and not can_shard():
            say("--fsdp: accelerate shards only across accelerators, not on this machine; going on data-parallel")
            self.fsdp = None
        if self.fsdp and self.fsdp_transformer_layer_cls_to_wrap:
            self.fsdp_config = self.fsdp_config or {}
            self.fsdp_config["transformer_layer_cls_to_wrap"] = self.fsdp_transformer_layer_cls_to_wrap
        if self.deepspeed and not can_shard():
            say("--deepspeed: accelerate starts DeepSpeed only on accelerators, not on this machine; going on without")
            self.deepspeed = None
        super().__post_init__()


def say(line: str) -> None:
    """Prints a line, once for all ranks."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def device_name() -> str:
    """Names what this machine computes on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "this machine (no GPU)"


def can_shard() -> bool:
    """Whether accelerate applies FSDP and DeepSpeed here: up to 1.15 it leaves processes on a CPU data-parallel."""
    return torch.accelerator.is_available()


# ---------------------------------------------------------------------------------------------------------------------
# Data


def preprocess(sources: Sequence[str], targets: Sequence[str], tokenizer) -> dict[str, list[torch.Tensor]]:
    """Turns prompts and answers into tokens and labels.

    Args:
        sources: prompts.
        targets: answers; the original appends EOS to them, and so may the caller.
        tokenizer: the tokenizer.

    Returns:
        `input_ids` and `labels`, one int64 tensor each per example; labels of prompt tokens are IGNORE_INDEX.
    """
    targets = [target.removesuffix(tokenizer.eos_token) for target in targets]
    return _as_tensors(tokenization.tokenize_examples(sources, targets, tokenizer))


def _as_tensors(tokenized: tokenization.TokenizedExamples) -> dict[str, list[torch.Tensor]]:
    input_ids = torch.from_numpy(tokenized.input_ids.astype("int64"))
    lengths = torch.from_numpy(tokenized.lengths())
    position = torch.arange(len(input_ids)) - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    is_prompt = position < torch.repeat_interleave(torch.from_numpy(tokenized.prompt_lengths), lengths)
    labels = input_ids.masked_fill(is_prompt, IGNORE_INDEX)
    return {"input_ids": list(input_ids.split(lengths.tolist())), "labels": list(labels.split(lengths.tolist()))}


class SupervisedDataset(Dataset):
    """Instruction data as tokens.

    Attributes:
        input_ids: one int64 tensor per example.
        labels: likewise, IGNORE_INDEX where nothing is to be learned.
    """

    def __init__(self, data_path: str, tokenizer, examples: Sequence[Mapping] | None = None):
        """Tokenizes `examples`, or the records of `data_path` when they aren't given."""
        super().__init__()
        examples = tokenization.load_dataset_examples(data_path) if examples is None else examples
        progress = os.environ.get("RANK", "0") == "0"
        tokenized, _ = tokenization.tokenize_once(examples, tokenizer, progress=progress)
        tensors = _as_tensors(tokenized)
        self.input_ids, self.labels = tensors["input_ids"], tensors["labels"]
        self.truncated = tokenized.truncated

    def __len__(self) -> int:
        """Counts the examples."""
        return len(self.input_ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        """Gets an example, with its number as `record`."""
        return {"input_ids": self.input_ids[i], "labels": self.labels[i], "record": torch.tensor(i)}


@dataclass
class DataCollatorForSupervisedDataset:
    """Pads examples on the right, to the longest of the batch."""

    tokenizer: transformers.PreTrainedTokenizerBase

    def __call__(self, instances: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Collates.

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


def make_supervised_data_module(tokenizer, data_args: DataArguments) -> dict:
    """Makes the datasets and the collator that the Trainer takes."""
    train_dataset = SupervisedDataset(data_args.data_path, tokenizer)
    return {
        "train_dataset": train_dataset,
        "eval_dataset": None,
        "data_collator": DataCollatorForSupervisedDataset(tokenizer),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Training


class AlpacaTrainer(packing.PackedTrainer):
    """The Trainer with the original's loss."""

    def __init__(self, *args, **kwargs):
        """Chooses how the losses of a step's micro-batches are weighed."""
        super().__init__(*args, **kwargs)
        # The one place that decides it. True: the Trainer divides by the tokens of the whole step, over accumulation
        # and ranks. False: each micro-batch is averaged over its own tokens, then the micro-batches over each other.
        self.model_accepts_loss_kwargs = self.args.loss_reduction == "global"

    def compute_loss(self, model, inputs, *args, **kwargs):
        """Computes a micro-batch's loss."""
        inputs = {name: value for name, value in inputs.items() if name != "records"}
        return super().compute_loss(model, inputs, *args, **kwargs)


def train() -> None:
    """Trains as the command line says."""
    parser = transformers.HfArgumentParser((ModelArguments, DataArguments, TrainingArguments), allow_abbrev=False)
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    tokenizer, notes = tokenization.load_tokenizer(
        model_args.model_name_or_path, training_args.model_max_length, training_args.cache_dir
    )
    for note in notes:
        say(note)
    added = tokenization.special_tokens_to_add(tokenizer)
    adds_bos = bool(tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)
    tokenizer.chat_template = alpaca_chat_template(adds_bos)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_args.model_name_or_path, cache_dir=training_args.cache_dir, dtype=torch.float32
    )
    rows = smart_tokenizer_and_embedding_resize(added, tokenizer, model)
    if rows:
        say(f"added {rows} row(s) to the embeddings for {', '.join(added.values())}")
    with training_args.main_process_first(local=True):
        data_module = make_supervised_data_module(tokenizer, data_args)
    packed, shared, why_not = packing.choose(
        model.config,
        training_args.padding_free,
        training_args.shared_prefix,
        lora_dropout=model_args.lora_dropout if model_args.lora_r else 0.0,
    )
    if why_not:
        say(why_not)
    if packed:
        packing.install(model)
    trainer = AlpacaTrainer(model=model, args=training_args, processing_class=tokenizer, **data_module)
    if packed:
        say(trainer.pack(training_args.max_tokens_per_pass or 16384, shared))
    trainer.train()
    trainer.save_state()
    trainer.save_model()


def main() -> None:
    """Runs `train` and turns a user's mistake into one line."""
    try:
        train()
    except UserError as error:
        say(f"error: {error}")
        sys.exit(2)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
