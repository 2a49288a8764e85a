"""What a run loads: the tokenizer and the model's skeleton first, the weights once the plan is made."""

import copy

import torch
import transformers

from alpaca import models, tokenizers
from alpaca.cli import UserError
from alpaca.prompts import alpaca_chat_template
from alpaca.ranks import announce, is_main
from alpaca.training import lora
from alpaca.training.plan import Plan


def load_skeleton(model_args, args):
    """Loads the tokenizer, and the model on the meta device, with rows for the tokens that are added.

    Args:
        model_args: A ModelArguments of alpaca/training/arguments.py.
        args: A TrainingArguments.

    Raises:
        UserError: There is no such model, or it doesn't take `model_max_length` tokens.
    """
    name = model_args.model_name_or_path
    with models.one_line_load_errors(name):
        config = transformers.AutoConfig.from_pretrained(name, cache_dir=args.cache_dir, trust_remote_code=False)
        tokenizer, notes = tokenizers.load_tokenizer(name, args.model_max_length, args.cache_dir)
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{name} is a {config.model_type}, not a causal language model")
    model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
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


def stand_in(model_args, skeleton, device, tokenizer):
    """Makes a model of the run's shapes whose parameters are views of a single number, so that they take no memory.

    The Trainer, its optimizer and its schedule can be built on it before the weights load.

    Args:
        model_args: A ModelArguments.
        skeleton: The model on the meta device.
        device: Where the parameters pretend to be.
        tokenizer: The tokenizer, with its new tokens.
    """
    model = copy.deepcopy(skeleton)
    _set_pad(model, tokenizer)
    if model_args.lora_r:
        with torch.device("meta"):
            model = model_args.adapt(model)
    made: dict[int, torch.nn.Parameter] = {}  # tied parameters stay tied
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None and id(old) not in made:
                view = torch.zeros((), device=device, dtype=old.dtype).expand(old.shape)
                made[id(old)] = torch.nn.Parameter(view, requires_grad=old.requires_grad)
            module._parameters[name] = made.get(id(old))
        for name, old in module._buffers.items():
            module._buffers[name] = None if old is None else torch.zeros(old.shape, device=device, dtype=old.dtype)
    return model


def load_for_training(model_args, args, plan: Plan, tokenizer, config):
    """Loads the weights and adds rows for new tokens, or a LoRA adapter.

    Trained weights are float32 whatever the checkpoint's type is, unless --pure_bf16 is given. Weights that LoRA
    freezes take the compute type.

    Args:
        model_args: A ModelArguments.
        args: A TrainingArguments.
        plan: The plan.
        tokenizer: The tokenizer, with its new tokens.
        config: The skeleton's configuration.
    """
    if plan.sends_weights and not is_main():
        model = empty_model(config, plan.dtype)
    else:
        model = models.load_model(model_args.model_name_or_path, plan.dtype, args.cache_dir)
    rows = tokenizers.smart_tokenizer_and_embedding_resize({}, tokenizer, model)
    announce(f"padding: {tokenizer.pad_token}" + (", a new token; its row is the mean of the others" if rows else ""))
    _set_pad(model, tokenizer)
    if model_args.lora_r:
        model = model_args.adapt(model)
        announce(f"LoRA on {', '.join(lora.target_names(model))}")
    return model


def _set_pad(model, tokenizer) -> None:
    """Names the padding in the model's configurations; otherwise the Trainer does, with a warning."""
    for config in (model.config, model.generation_config):
        config.pad_token_id = tokenizer.pad_token_id


def empty_model(config, dtype: torch.dtype):
    """Makes a causal language model whose weights are allocated and never written, so that they take no memory.

    Buffers outside the checkpoint, such as rotary frequencies, are right. (`cpu_ram_efficient_loading` of transformers
    5.17 to 5.23 would load the weights on all ranks and leave out only the values of missing ones.)
    """
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    return model
