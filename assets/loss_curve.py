r"""Draws the loss of a run of train.py from its trainer_state.json.

The picture in this folder was made with:

    python -m demo.tiny_model make --config configs/tiny_llama.json --data_path alpaca_data.json \
        --output_dir tiny_llama
    python train.py --model_name_or_path tiny_llama --data_path alpaca_data.json --output_dir tiny_alpaca \
        --num_train_epochs 1 --per_device_train_batch_size 8 --gradient_accumulation_steps 2 \
        --learning_rate 2e-3 --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 --save_strategy no
    python -m assets.loss_curve --run_dir tiny_alpaca
"""

import os
import sys

from alpaca.cli import UserError, run_cli
from alpaca.files import jload


def draw(run_dir: str, output: str = os.path.join(os.path.dirname(__file__), "loss_curve.png")) -> None:
    """Draws the training loss, and the evaluation loss if there is one.

    Args:
        run_dir: Output folder of a run.
        output: Picture to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    history = jload(os.path.join(run_dir, "trainer_state.json"))["log_history"]
    points = {key: [(e["step"], e[key]) for e in history if key in e] for key in ("loss", "eval_loss")}
    if not points["loss"]:
        raise UserError(f"{run_dir}/trainer_state.json has no losses; train with --logging_steps 1")
    figure, axes = pyplot.subplots(figsize=(6, 3.2), dpi=150)
    for key, label in (("loss", "training"), ("eval_loss", "evaluation")):
        if points[key]:
            axes.plot(*zip(*points[key], strict=True), label=label, linewidth=1.2)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(output)
    print(f"{output}: {len(points['loss'])} steps, loss {points['loss'][0][1]:.3f} to {points['loss'][-1][1]:.3f}")


if __name__ == "__main__":
    run_cli({"draw": draw}, ["draw", *sys.argv[1:]])
