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

from alpaca.cli import UserError
from alpaca.ranks import refuse
from alpaca.training import arguments

if __name__ == "__main__" and sys.argv[1:2] != ["merge"]:
    try:
        arguments.check_flags(sys.argv[1:], __file__)
    except UserError as error:
        refuse(error)

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import transformers
from torch.utils.data import Dataset
from transformers.trainer_utils import IntervalStrategy, set_seed

from alpaca import models, tokenizers
from alpaca.cli import run_cli
from alpaca.prompts import PROMPT_DICT, alpaca_chat_template
from alpaca.ranks import announce, is_main
from alpaca.tokenizers import (
    DEFAULT_BOS_TOKEN,
    DEFAULT_EOS_TOKEN,
    DEFAULT_PAD_TOKEN,
    DEFAULT_UNK_TOKEN,
    smart_tokenizer_and_embedding_resize,
)
from alpaca.training import data as training_data
from alpaca.training import lora, memory, saving, sharding, throughput
from alpaca.training.packing import model as packed_model
from alpaca.training.packing import passes
from alpaca.training.packing.passes import IGNORE_INDEX
from alpaca.training.trainer import AlpacaTrainer, check_labels

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
# Arguments


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

    def adapt(self, model):
        """Puts the LoRA adapter that was asked for into a model."""
        return lora.add_adapter(model, self.lora_r, self.lora_alpha, self.lora_dropout, self.lora_target_modules)


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

    cache_dir: str | None = field(default=None, metadata={"help": "Where the model's downloads go."})
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
        default="auto", metadata={"help": "No padding: true, false, or auto: where losses stay the padded batch's."}
    )
    shared_prefix: str = field(
        default="auto", metadata={"help": "Compute the template's opening words once per pass: true, false or auto."}
    )
    max_tokens_per_pass: int = field(
        default=0, metadata={"help": "Tokens of a padding-free pass; by the device's memory when 0."}
    )
    compile_layers: str = field(
        default="auto", metadata={"help": "torch.compile the layers: true, false, or auto: padding-free on a GPU."}
    )
    pure_bf16: bool = field(
        default=False, metadata={"help": "Weights and Adam's states in bfloat16, where small updates vanish."}
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
        sharding.fit_machine(self)
        if self.fsdp and self.deepspeed:
            raise UserError("--fsdp and --deepspeed both shard the model; give one")
        if self.fsdp:
            sharding.read_fsdp(self)
        if self.deepspeed:
            sharding.read_deepspeed(self)
        super().__post_init__()
        if self.fsdp:
            sharding.spare_accuracy(self)


def parse_arguments(argv: Sequence[str] | None = None):
    """Reads the command line.

    Raises:
        UserError: a value doesn't fit its flag, or flags contradict each other.
    """
    parser = transformers.HfArgumentParser((ModelArguments, DataArguments, TrainingArguments), allow_abbrev=False)
    parser.error = arguments.fail
    try:
        model_args, data_args, args = parser.parse_args_into_dataclasses(argv)
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        raise UserError(" ".join(str(error).split())) from error
    arguments.check_values(model_args, data_args, args)
    asked = args.eval_strategy != "no" or args.eval_on_start
    if asked and not (data_args.eval_data_path or data_args.eval_fraction):
        announce(f"--eval_strategy {args.eval_strategy.value}: no --eval_data_path or --eval_fraction; not evaluating")
        args.eval_strategy, args.do_eval, args.eval_on_start = IntervalStrategy.NO, False, False
    return model_args, data_args, args


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
    return _as_tensors(training_data.tokenize_examples(sources, targets, tokenizer))


def _as_tensors(tokenized: training_data.TokenizedExamples) -> dict[str, list[torch.Tensor]]:
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
        data_path: where they come from.
        records: each example's number there, from 0.
        truncated: how many examples were cut.
    """

    def __init__(self, data_path: str, tokenizer, examples: Mapping[int, Mapping] | None = None):
        """Tokenizes the records of `data_path`, or those of them that `examples` gives by number."""
        super().__init__()
        examples = dict(enumerate(training_data.load_dataset_examples(data_path))) if examples is None else examples
        tokenized = training_data.tokenize_once(list(examples.values()), tokenizer, progress=is_main())
        tensors = _as_tensors(tokenized)
        self.data_path, self.records, self.truncated = data_path, list(examples), tokenized.truncated
        self.input_ids, self.labels = tensors["input_ids"], tensors["labels"]

    def __len__(self) -> int:
        """Counts the examples."""
        return len(self.input_ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        """Gets an example, with the number of its record."""
        return {"input_ids": self.input_ids[i], "labels": self.labels[i], "record": torch.tensor(self.records[i])}

    def unlearnable(self) -> list[int]:
        """Lists the records without a label: their prompt alone fills `model_max_length`."""
        return [n for n, labels in zip(self.records, self.labels, strict=True) if labels[-1] == IGNORE_INDEX]


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


def make_supervised_data_module(tokenizer, data_args: DataArguments, seed: int = 42) -> dict:
    """Makes the datasets and the collator that the Trainer takes.

    Raises:
        UserError: names the first record that is wrong and what was found there.
    """
    examples = dict(enumerate(training_data.load_dataset_examples(data_args.data_path)))
    held_out = {}
    if data_args.eval_fraction:
        if len(examples) < 2:
            raise UserError(f"--eval_fraction {data_args.eval_fraction}: {data_args.data_path} has but one record")
        count = min(len(examples) - 1, max(1, round(len(examples) * data_args.eval_fraction)))
        held_out = {i: examples.pop(i) for i in sorted(random.Random(seed).sample(range(len(examples)), count))}
    eval_dataset = None
    if held_out:
        eval_dataset = SupervisedDataset(data_args.data_path, tokenizer, held_out)
    elif data_args.eval_data_path:
        eval_dataset = SupervisedDataset(data_args.eval_data_path, tokenizer)
    return {
        "train_dataset": SupervisedDataset(data_args.data_path, tokenizer, examples),
        "eval_dataset": eval_dataset,
        "data_collator": DataCollatorForSupervisedDataset(tokenizer),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Training


def load_skeleton(model_args: ModelArguments, args: TrainingArguments):
    """Loads the tokenizer, and the model without its weights: with rows for the tokens that were added.

    Raises:
        UserError: there is no such model, or it doesn't take `model_max_length` tokens.
    """
    name = model_args.model_name_or_path
    try:
        tokenizer, notes = tokenizers.load_tokenizer(name, args.model_max_length, args.cache_dir)
        config = transformers.AutoConfig.from_pretrained(name, cache_dir=args.cache_dir)
        model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {name}: {' '.join(str(error).split())}") from error
    except KeyError:
        raise UserError(f"{name} is a {config.model_type}, no causal language model") from None
    if getattr(config, "alpaca_weight_diff", False):
        raise UserError(f"{name} is a weight diff, not a model; python weight_diff.py recover makes the model first")
    longest = getattr(config, "max_position_embeddings", None)
    if longest and args.model_max_length > longest:
        raise UserError(f"--model_max_length {args.model_max_length} exceeds the model's {longest} positions")
    for note in notes:
        announce(note)
    tokenizer.add_special_tokens(tokenizers.special_tokens_to_add(tokenizer, may_grow=not model_args.lora_r))
    tokenizer.chat_template = alpaca_chat_template(tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)
    config.vocab_size = max(config.vocab_size, len(tokenizer))
    with torch.device("meta"):
        return tokenizer, model_class(config)


def describe_data(data: Mapping, tokenizer) -> None:
    """Says what will be learned: counts, what was cut, and one example with its mask."""
    dataset, limit = data["train_dataset"], tokenizer.model_max_length
    tokens, learned = sum(map(len, dataset.input_ids)), sum(int((x != IGNORE_INDEX).sum()) for x in dataset.labels)
    held_out = f", {len(data['eval_dataset']):,} to evaluate on" if data["eval_dataset"] else ""
    announce(f"data: {len(dataset):,} examples{held_out}; {tokens:,} tokens, {learned:,} of them learned")
    if dataset.truncated:
        announce(f"{dataset.truncated} example(s) longer than {limit} tokens are cut: they don't teach it to stop")
    ids, is_prompt = dataset.input_ids[0], dataset.labels[0] == IGNORE_INDEX
    prompt, answer = tokenizer.decode(ids[is_prompt]), tokenizer.decode(ids[~is_prompt])
    announce(f"--- record {dataset.records[0]}, prompt (not learned):\n{prompt}\n--- answer (learned):\n{answer}\n---")


def load_model(model_args: ModelArguments, args: TrainingArguments, tokenizer, config):
    """Loads the weights and gives them rows for new tokens, or a LoRA adapter.

    Weights are float32 masters whatever the checkpoint's type is; those that LoRA freezes take the compute type.
    """
    dtype = torch.bfloat16 if (model_args.lora_r and args.bf16) or args.pure_bf16 else torch.float32
    if sharding.gets_weights_sent(args):
        model = sharding.empty_model(config, dtype)
    else:
        model = models.load_model(model_args.model_name_or_path, dtype, args.cache_dir)
    rows = smart_tokenizer_and_embedding_resize({}, tokenizer, model)
    announce(f"padding: {tokenizer.pad_token}" + (", a new token; its row is the mean of the others" if rows else ""))
    for config in (model.config, model.generation_config):
        config.pad_token_id = tokenizer.pad_token_id
    if model_args.lora_r:
        model = model_args.adapt(model)
        announce(f"LoRA on {', '.join(lora.target_names(model))}")
    return model


def train() -> None:
    """Trains as the command line says.

    Raises:
        UserError: a user's mistake, found before the weights load wherever it can be.
        SystemExit: status 143 after SIGTERM.
    """
    model_args, data_args, args = parse_arguments()
    resume = saving.find_resume_point(args.output_dir, args.resume_from_checkpoint, args.overwrite_output_dir)
    tokenizer, skeleton = load_skeleton(model_args, args)
    if args.fsdp:
        sharding.fit_fsdp(args, skeleton)
    dropout = model_args.lora_dropout if model_args.lora_r else 0.0
    packed, shared, why_not = passes.choose(skeleton.config, args.padding_free, args.shared_prefix, dropout, args.n_gpu)
    if why_not:
        announce(why_not)
    with args.main_process_first(local=True):
        data = make_supervised_data_module(tokenizer, data_args, args.seed)
    describe_data(data, tokenizer)
    check_labels(data["train_dataset"], args.per_device_train_batch_size)
    check_labels(data["eval_dataset"], args.per_device_eval_batch_size)
    if packed:
        passes.check_pass(args.max_tokens_per_pass, data["train_dataset"])
    shape = memory.check(args, skeleton, model_args.adapt if model_args.lora_r else None, len(data["train_dataset"]))
    if resume:
        steps = memory.total_steps(args, len(data["train_dataset"]))
        saving.check_same_run(resume, skeleton.config, model_args.lora_r, args, steps)
    if choice := memory.choose_resharding(shape, args, packed):
        announce(choice)
    tokens = memory.tokens_per_pass(shape, args)

    set_seed(args.seed)
    model = load_model(model_args, args, tokenizer, skeleton.config)
    shapes = lora.adapter_shapes(model) if model_args.lora_r else models.tensor_shapes(skeleton)
    trainer = AlpacaTrainer(model=model, args=args, processing_class=tokenizer, shape=shape, **data)
    if packed:
        announce(trainer.pack(args.max_tokens_per_pass or tokens, shared))
    if packed_model.choose_kernels(args, packed):
        packed_model.compile_layers(model)
    # SIGTERM waits also while the model is saved, which may be the first save of the run.
    claimed = saving.claimed(args.output_dir, args.overwrite_output_dir)
    with claimed, saving.disk_watched(args.output_dir), trainer.stop_signal:
        trainer.train(resume_from_checkpoint=resume)
        if trainer.stopped:
            last = saving.last_checkpoint(args.output_dir)
            announce(
                f"SIGTERM: stopped and saved {last}; the same command with --resume_from_checkpoint True continues"
            )
            raise SystemExit(143)
        trainer.save_state()
        tensors = trainer.save_verified(*shapes)
    announce(throughput.closing_table(trainer.state, trainer.throughput))
    announce(f"{args.output_dir}: {tensors} tensors saved and read back, all there, of their shapes, finite")
    if data["eval_dataset"] is not None:
        trainer.log_metrics("eval", trainer.evaluate())
        trainer.save_state()
    if model_args.lora_r:
        announce(f"merge the adapter: python train.py merge --adapter_dir {args.output_dir} --output_dir MERGED")


def main() -> None:
    """Runs `train`, or `merge`; turns a user's mistake into one line and exit status 2."""
    if sys.argv[1:2] == ["merge"]:
        return run_cli({"merge": lora.merge})
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
