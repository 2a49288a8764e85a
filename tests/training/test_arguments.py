"""The flags of train.py: wrong ones are refused in one line, before anything runs."""

import shutil
import subprocess
import sys

import pytest
from training_runs import BUNDLED, arguments, run

import train
from alpaca.cli import UserError
from alpaca.training.arguments import parse_arguments

pytest_plugins = ["training_runs"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--eval_fraction", "1.5"], "--eval_fraction must be at least 0 and below 1, found 1.5"),
        (["--eval_fraction", "0.5", "--eval_data_path", "x.json"], "both name data to evaluate on"),
        (["--loss_reduction", "sum"], "invalid choice: 'sum' (choose from"),
        (["--model_max_length", "4096"], "--model_max_length 4096 exceeds the model's 512 positions"),
        (["--fsdp", "full_shard", "--deepspeed", "x.json"], "--fsdp and --deepspeed both shard the model"),
        (["--bf16", "maybe"], "--bf16"),
        (["--eval_strategy", "sometimes"], "sometimes"),
        (["--lora_r", "-1"], "--lora_r must be 0"),
        (["--resume_from_checkpoint", "True"], "holds no complete checkpoint; drop the flag"),
        (["--model_name_or_path", "no/such-model"], "cannot load no/such-model"),
        (["--model_name_or_path", "../no/such"], "--model_name_or_path ../no/such: no such folder"),
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size must be above 0, found 0"),
        (["--learning_rate", "-1"], "--learning_rate must be at least 0, found -1.0"),
        (["--learning_rate", "nan"], "--learning_rate must be at least 0, found nan"),
        (["--num_train_epochs", "inf"], "--num_train_epochs must be above 0, found inf"),
        (["--lora_r", "4", "--lora_alpha", "nan"], "--lora_alpha must be above 0, found nan"),
        (["--seed", "4294967296"], "--seed must be below 4294967296, found 4294967296"),
        (["--warmup_ratio", "2"], "--warmup_ratio must be at least 0 and below 1, found 2.0"),
        (["--lora_r", "4", "--lora_dropout", "1.5"], "--lora_dropout must be at least 0 and below 1, found 1.5"),
        (["--bf16", "True", "--fp16", "True"], "--bf16 and --fp16 are two types to compute in; give one"),
        (["--label_smoothing_factor", "0.1"], "--label_smoothing_factor needs --padding_free false"),
        (["--neftune_noise_alpha", "5"], "--neftune_noise_alpha needs --padding_free false"),
        (["--lora_target_modules", "q_proj"], "--lora_target_modules needs --lora_r, the adapter's rank"),
        (["--remove_unused_columns", "True"], "--remove_unused_columns True would drop the records' numbers"),
        (["--save_strategy", "best"], "--save_strategy best needs --eval_data_path or --eval_fraction"),
        (["--report_to", "paper"], "--report_to paper is not supported"),
        (["--output_dir", __file__ + "/out"], "test_arguments.py is a file; name a folder"),
        (["--deepspeed", "no/such.json"], "cannot read no/such.json"),
        (["--deepspeed", BUNDLED], "alpaca_data.json holds a list; expected a JSON object of settings"),
        (["--fsdp", "fullshard"], "--fsdp fullshard: FSDP2 knows full_shard, shard_grad_op"),
        (["--fsdp", "full_shard", "--fsdp_config", "no/such.json"], "cannot read no/such.json"),
        (["--max_tokens_per_pass", "-1"], "--max_tokens_per_pass must be at least 0, found -1"),
        (["--max_tokens_per_pass", "20"], "--max_tokens_per_pass 20 is too few for the longest example"),
        (["--lora_r", "4", "--lora_target_modules", "q_prj"], "--lora_target_modules q_prj: the model has no 'q_prj'"),
        (["--max_steps", "0"], "--max_steps must be above 0, found 0; -1 trains --num_train_epochs"),
        (["--neftune_noise_alpha", "-1", "--padding_free", "false"], "--neftune_noise_alpha must be at least 0"),
        (["--prompt_boundary", "seperate"], "invalid choice: 'seperate' (choose from"),
    ],
)
def test_wrong_flag_is_refused_in_one_line(models, data, tmp_path, monkeypatch, flags, words):
    monkeypatch.setattr(train, "load_for_training", None)
    with pytest.raises(UserError) as refusal:
        run(monkeypatch, models["llama"], data, tmp_path / "out", *flags)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--adam_beta1 2", "ValueError: Invalid beta parameter"),
        ("--adam_epsilon nan", "ValueError: Invalid epsilon value: nan"),
        ("--dataloader_num_workers -1", "num_workers option should be non-negative"),
        ("--dataloader_persistent_workers True", "persistent_workers option needs num_workers > 0"),
        ("--warmup_steps nan", "cannot convert float NaN to integer"),
        ("--optim galore_adamw", "ImportError: You need to install `galore_torch`"),
        ("--optim_args foo", "ValueError"),
        ("--lr_scheduler_kwargs foo", "TypeError"),
        ('--lr_scheduler_kwargs {"bogus":1}', "unexpected keyword argument 'bogus'"),
        ("--lr_scheduler_type warmup_stable_decay", "num_decay_steps"),
        ('--accelerator_config {"bogus":1}', "unexpected keyword argument 'bogus'"),
        ("--push_to_hub True", "offline"),
        ("--use_liger_kernel True", "liger-kernel"),
        ("--lora_r 4 --gradient_checkpointing True --gradient_checkpointing_kwargs foo", "ValueError"),
    ],
)
def test_what_the_trainer_cannot_be_built_from_is_one_line(models, data, tmp_path, monkeypatch, flags, words):
    """One net around the Trainer's construction, on a stand-in without weights; no list of flags."""
    monkeypatch.setattr(train, "load_for_training", None)
    with pytest.raises(UserError, match=r"^the Trainer can't be built from these flags \(\w+: ") as refusal:
        run(monkeypatch, models["llama"], data, tmp_path / "out", *flags.split())
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_best_model_is_found_by_what_an_evaluation_gives(models, data, tmp_path):
    best = ("--load_best_model_at_end", "True", "--eval_fraction", "0.2", "--eval_strategy", "epoch")
    more = (*best, "--save_strategy", "epoch", "--metric_for_best_model")
    with pytest.raises(UserError, match="--metric_for_best_model rouge: an evaluation gives one metric here, eval_lo"):
        parse_arguments(arguments(models["llama"], data, tmp_path, *more, "rouge"))
    parse_arguments(arguments(models["llama"], data, tmp_path, *more, "eval_loss"))


def test_tilde_is_the_home_folder_in_every_flag(models, data, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(models["llama"], tmp_path / "base")
    shutil.copy(data, tmp_path / "data.json")
    flags = arguments("~/base", "~/data.json", "~/out", "--eval_data_path=~/data.json", "--cache_dir", "~/cache")
    model_args, data_args, args = parse_arguments([*flags, "--resume_from_checkpoint", "~/out/checkpoint-2"])
    found = (model_args.model_name_or_path, data_args.data_path, data_args.eval_data_path, args.output_dir)
    found += (args.cache_dir, args.resume_from_checkpoint)
    names = ("base", "data.json", "data.json", "out", "cache", "out/checkpoint-2")
    assert found == tuple(str(tmp_path / name) for name in names)


def test_output_dir_that_is_a_file_is_refused(models, data, tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("keep me")
    with pytest.raises(UserError, match=r"notes\.txt is a file; name a folder"):
        run(monkeypatch, models["llama"], data, tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "keep me"


@pytest.mark.parametrize(
    ("flags", "package"),
    [
        (("--report_to", "wandb"), "wandb"),
        (("--report_to", "tensorboard"), "tensorboard"),
        (("--optim", "adamw_bnb_8bit"), "bitsandbytes"),
        (("--optim", "adamw_torch_8bit"), "torchao"),
        (("--lora_r", "4"), "peft"),
    ],
)
def test_what_is_not_installed_is_refused_before_anything_loads(models, data, tmp_path, monkeypatch, flags, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"^{' '.join(flags)}: {package} is not installed here; pip install {package}$"):
        run(monkeypatch, models["llama"], data, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--padding_free", "yes"], "--padding_free.*invalid choice: 'yes'"),
        (["--compile_layers", "maybe"], "--compile_layers.*invalid choice: 'maybe'"),
        (["--pure_bf16", "True", "--lora_r", "4"], "--pure_bf16 is for full fine-tuning"),
    ],
)
def test_a_flag_that_makes_no_sense_is_refused_in_one_line(trainee, tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr(sys, "argv", ["train.py", *trainee, "--output_dir", str(tmp_path / "out"), *flags])
    with pytest.raises(UserError, match=message):
        train.train()


def test_flag_that_takes_a_list_takes_one(models, data, tmp_path):
    flags = arguments(models["llama"], data, tmp_path, "--label_names", "labels", "records")
    *_, args = parse_arguments(flags)
    assert args.label_names == ["labels", "records"]


@pytest.mark.parametrize(("given", "expected"), [((), True), (("True",), True), (("False",), False)])
def test_boolean_flag_stands_alone_or_has_a_value(models, data, tmp_path, given, expected):
    *_, args = parse_arguments(arguments(models["llama"], data, tmp_path, "--overwrite_output_dir", *given))
    assert args.overwrite_output_dir is expected


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--warmup_ration", "0.1"], "unknown flag --warmup_ration; did you mean --warmup_ratio?"),
        (["--Learning-Rate=1"], "unknown flag --Learning-Rate; did you mean --learning_rate?"),
        (["--zzz"], "unknown flag --zzz; see --help"),
        (["3"], "unexpected argument '3'; every value follows its flag (--help lists them)"),
    ],
)
def test_unknown_flag_is_refused_with_the_nearest_name(monkeypatch, flags, words):
    monkeypatch.setattr(train.TrainingArguments, "__post_init__", None)  # before the machine is looked at
    with pytest.raises(UserError) as refusal:
        parse_arguments(["--output_dir", "x", *flags])
    assert str(refusal.value).replace("Learning_Rate", "Learning-Rate") == words


def test_saved_arguments_load_without_train(models, data, tmp_path, root):
    """Run as a script, train.py is __main__; its argument classes must not be pickled as that module's."""
    command = [sys.executable, "train.py", *arguments(models["llama"], data, tmp_path / "out", "--max_steps", "1")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code = "import sys, torch; args = torch.load(sys.argv[1], weights_only=False); print(args.model_max_length); "
    code += "print(type(args).__module__); print('train' in sys.modules)"
    loading = [sys.executable, "-c", code, str(tmp_path / "out" / "training_args.bin")]
    done = subprocess.run(loading, cwd=root, capture_output=True, text=True)
    assert done.stdout.split() == ["512", "alpaca.training.arguments", "False"], done.stderr
