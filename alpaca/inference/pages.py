"""The Gradio pages of `inference.py`: `demo`, to ask the model, and `compare --page`, to judge pairs of answers."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from alpaca.cli import UserError, say
from alpaca.inference.answering import Alpaca
from alpaca.inference.engine import Engine
from alpaca.inference.judging import Verdicts

# Limits that the server enforces, whatever a browser or a script sends.
MAX_INSTRUCTION_CHARACTERS = 2_000
MAX_INPUT_CHARACTERS = 8_000
MAX_NEW_TOKENS = 1_024
MAX_QUEUE = 16

NOTICE = (
    "For research only. This model has not been made safe: its answers can be false, biased or offensive. "
    "Don't rely on them, and don't enter anything private."
)
EXAMPLES = [
    ["Tell me about alpacas.", ""],
    ["Write a short letter that thanks a colleague for help with a difficult project.", ""],
    ["Sort these animals from the smallest to the largest.", "horse, mouse, cat, elephant"],
    ["What is the capital of France, and what is it known for?", ""],
]

# A press of a key clicks its button. Held down, it counts once.
KEY_PRESSES = """() => document.addEventListener("keydown", event => {
    const choice = {"1": "1", "2": "2", "3": "t", "t": "t", "u": "u"}[event.key];
    if (choice && !event.repeat && !event.ctrlKey && !event.metaKey && !event.altKey)
        document.getElementById("choice-" + choice)?.click();
})"""


def import_gradio() -> Any:
    """Imports Gradio with its analytics and run history switched off, so that nothing is sent anywhere.

    Raises:
        UserError: Gradio is not installed.
    """
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_RUN_HISTORY="False")
    try:
        import gradio
    except ImportError as error:
        raise UserError("the page needs gradio: pip install -r requirements-demo.txt") from error
    return gradio


# ---------------------------------------------------------------------------------------------------------------------
# Asking


def build_demo(alpaca: Alpaca | Engine, seed: int | None) -> Any:
    """Lays out the page on which a person asks the model.

    Args:
        alpaca: The loaded model.
        seed: Makes every answer repeatable; None samples a new answer each time.

    Returns:
        A `gradio.Blocks`, not yet launched.
    """
    gr = import_gradio()

    def ask(instruction: str, input: str, temperature: float, top_p: float, max_new_tokens: float) -> Iterator[tuple]:
        yield from _answer(alpaca, seed, instruction or "", input or "", temperature, top_p, int(max_new_tokens))

    longest = min(MAX_NEW_TOKENS, alpaca.answer_length(MAX_NEW_TOKENS))
    with gr.Blocks(title=f"Alpaca: {alpaca.name}", analytics_enabled=False) as page:
        gr.Markdown(f"# {alpaca.name}\n{NOTICE}")
        with gr.Row():
            with gr.Column():
                instruction = gr.Textbox(
                    label="Instruction", lines=3, max_length=MAX_INSTRUCTION_CHARACTERS, elem_id="instruction"
                )
                input = gr.Textbox(label="Input (optional)", lines=2, max_length=MAX_INPUT_CHARACTERS, elem_id="input")
                go = gr.Button("Ask (Shift+Enter)", variant="primary", elem_id="ask")
                stop = gr.Button("Stop", variant="stop", visible=False, elem_id="stop")
                with gr.Accordion("Sampling", open=False, elem_id="sampling"):
                    # The values of Stanford's demo: https://github.com/tatsu-lab/stanford_alpaca/issues/35
                    temperature = gr.Slider(
                        0, 2, value=0.7, step=0.05, label="Temperature (0: always the likeliest token)"
                    )
                    top_p = gr.Slider(0.05, 1, value=0.9, step=0.05, label="Top-p")
                    max_new_tokens = gr.Slider(1, longest, value=min(600, longest), step=1, label="Max tokens")
            with gr.Column():
                answer = gr.Textbox(label="Answer", lines=10, interactive=False, buttons=["copy"], elem_id="answer")
                status = gr.Markdown(elem_id="status")
        gr.Examples(EXAMPLES, [instruction, input])
        fields = [instruction, input, temperature, top_p, max_new_tokens]
        # While something runs, Stop stands where Ask stood.
        idle = [gr.update(visible=True), gr.update(visible=False)]
        asked = gr.on(
            [go.click, instruction.submit, input.submit],
            lambda: idle[::-1],
            None,
            [go, stop],
            queue=False,
            api_name=False,
        )
        running = asked.then(ask, fields, [answer, status], concurrency_limit=1, api_name="ask")
        running.then(lambda: idle, None, [go, stop], queue=False, api_name=False)
        stop.click(
            lambda: ["Stopped.", *idle], None, [status, go, stop], cancels=[running], queue=False, api_name=False
        )
    return page.queue(max_size=MAX_QUEUE)


def _answer(
    alpaca: Alpaca | Engine,
    seed: int | None,
    instruction: str,
    input: str,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
) -> Iterator[tuple]:
    """Yields the contents of the answer and status fields while the model writes."""
    gr = import_gradio()
    limits = (("instruction", instruction, MAX_INSTRUCTION_CHARACTERS), ("input", input, MAX_INPUT_CHARACTERS))
    for name, text, limit in limits:
        if len(text) > limit:
            message = f"The {name} has {len(text):,} characters; this page takes {limit:,}."
            raise gr.Error(message, print_exception=False)
    if not instruction.strip():
        raise gr.Error("Write an instruction first.", print_exception=False)
    try:
        settings = alpaca.settings(max_new_tokens, temperature, top_p)
        ids, notice = alpaca.encode({"instruction": instruction, "input": input}, settings.max_new_tokens)
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from error
    yield "", f"Note: {notice}." if notice else "Writing …"
    answer, start = "", time.perf_counter()
    try:
        with contextlib.closing(alpaca.stream(ids, settings, seed)) as pieces:
            for piece in pieces:
                answer += piece
                yield answer, gr.skip()
    except UserError as error:  # a server that can't be reached any more
        raise gr.Error(str(error), print_exception=False) from error
    seconds = time.perf_counter() - start
    yield answer, f"Done in {seconds:.1f} s." + (f" Note: {notice}." if notice else "")


# ---------------------------------------------------------------------------------------------------------------------
# Judging


def build_judging(verdicts: Verdicts) -> Any:
    """Lays out the page on which a person judges pairs of answers.

    The verdicts go to the same file as in the terminal, so a person may switch between the two.

    Returns:
        A `gradio.Blocks`, not yet launched.
    """
    gr = import_gradio()

    labels = {"1": "Answer 1 is better (1)", "2": "Answer 2 is better (2)", "t": "Tie (3)", "u": "Undo (u)"}

    def show() -> list[Any]:
        undo = gr.update(visible=bool(verdicts.records))
        if not verdicts.waiting:
            return [verdicts.summary().replace("\n", "\n\n"), "", *[gr.update(visible=False)] * 7, undo]
        pair = verdicts.waiting[0]
        texts = [gr.update(value=text, visible=True) for text in (pair.instruction, pair.input, *pair.shown)]
        texts[1]["visible"] = bool(pair.input)
        return [f"Pairs to go: {len(verdicts.waiting)}", pair.key, *texts, *[gr.update(visible=True)] * 3, undo]

    def choose(choice: str, key: str) -> list[Any]:
        # A double click, or a click in another tab, must not judge a pair that this tab has not shown.
        shown = verdicts.waiting[0].key if verdicts.waiting else ""
        if shown == key and choice == "u":
            verdicts.undo()
        elif shown == key and shown:
            verdicts.record(choice)
        return show()

    with gr.Blocks(title="Which answer is better?", analytics_enabled=False) as page:
        gr.Markdown("# Which answer is better?")
        progress = gr.Markdown(elem_id="progress")
        instruction = gr.Textbox(label="Instruction", interactive=False)
        input = gr.Textbox(label="Input", interactive=False)
        with gr.Row():
            # Two answers side by side need 2 x 320 pixels; on a phone they stand one under the other.
            answers = [gr.Textbox(label=f"Answer {n}", lines=5, interactive=False, min_width=320) for n in (1, 2)]
        with gr.Row():
            buttons = {choice: gr.Button(label, elem_id=f"choice-{choice}") for choice, label in labels.items()}
        key = gr.State("")
        outputs = [progress, key, instruction, input, *answers, *buttons.values()]
        page.load(show, None, outputs, api_name=False)
        page.load(None, js=KEY_PRESSES)
        for choice, button in buttons.items():
            judge = partial(choose, choice)
            button.click(judge, key, outputs, concurrency_limit=1, concurrency_id="judge", show_progress="hidden")
    return page.queue(max_size=MAX_QUEUE)


# ---------------------------------------------------------------------------------------------------------------------
# Serving


def check_port(host: str, port: int) -> None:
    """Checks that a page can be served, before a model is loaded for it.

    Raises:
        UserError: Gradio is not installed, or the port is taken.
    """
    import_gradio()
    try:
        with socket.create_server((host, port)):
            pass
    except (OSError, OverflowError) as error:
        raise UserError(f"port {port} on {host} cannot be used ({error}); choose another with --port") from error


def serve(page: Any, host: str, port: int, share: bool) -> None:
    """Serves a page until Ctrl-C."""
    _, _, public = page.launch(
        server_name=host,
        server_port=port,
        share=share,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        max_file_size=1,  # byte: Gradio takes uploads on every page, and these pages want none
    )
    say(f"open http://{host}:{port} in a browser; Ctrl-C stops the server")
    if public:
        say(f"anyone may open {public}")
    page.block_thread()
