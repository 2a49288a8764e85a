"""The pages, in a browser: answers stream and stop, verdicts go to the file of the terminal."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time

import judged_pairs
import pytest
from judged_pairs import compare
from taught_model import LESSONS


@pytest.fixture
def outputs(tmp_path):
    return judged_pairs.write_outputs(tmp_path)


CHROMIUM = "/usr/bin/chromium"


CHROMIUM_FLAGS = "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update"


# Runs a command as inference.py does, with a model that takes its time, and reports whoever looks up another machine.
SERVER = """
import socket, sys, time
look_up = socket.getaddrinfo
def local_only(host, *args, **kwargs):
    if host not in ("127.0.0.1", "localhost", "0.0.0.0", None, ""):
        print("LOOKED UP", host, file=sys.stderr)
        raise OSError("offline")
    return look_up(host, *args, **kwargs)
socket.getaddrinfo = local_only
if "demo" in sys.argv:
    from transformers import LlamaForCausalLM
    forward = LlamaForCausalLM.forward
    def slow(*args, **kwargs):
        time.sleep(0.03)
        return forward(*args, **kwargs)
    LlamaForCausalLM.forward = slow
import inference
inference.run_cli({"demo": inference.demo, "compare": inference.compare})
"""


@pytest.fixture(scope="module")
def browser():
    if not os.path.exists(CHROMIUM):
        pytest.skip(f"no browser at {CHROMIUM}: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    sync_api.expect.set_options(timeout=60_000)  # a busy machine is no failure
    with sync_api.sync_playwright() as playwright:
        flags = [*CHROMIUM_FLAGS.split(), "--disable-sync", "--no-first-run"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def served(root, tmp_path, *arguments):
    port = free_port()
    command = [sys.executable, "-c", SERVER, *arguments, "--port", str(port)]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, cwd=root, stdout=log, stderr=log)
    try:
        while "open http" not in (tmp_path / "log").read_text():
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)
    log = (tmp_path / "log").read_text()
    assert "LOOKED UP" not in log
    assert "Traceback" not in log


def open_page(browser, url):
    page = browser.new_page(viewport={"width": 1180, "height": 890})
    page.requests = []
    page.on("request", lambda request: page.requests.append(request.url))
    page.goto(url)
    return page


def test_browser_sees_the_answer_stream_and_stop_ends_it(root, model_path, tmp_path, browser):
    expect = pytest.importorskip("playwright.sync_api").expect
    with served(root, tmp_path, "demo", "--model_path", model_path, "--seed", "1") as url:
        page = open_page(browser, url)
        instruction, answer = page.locator("#instruction textarea"), page.locator("#answer textarea")
        expect(page.get_by_text("has not been made safe")).to_be_visible()
        expect(page.get_by_role("heading", name="tiny-alpaca")).to_be_visible()
        assert page.locator("input[type=number]").nth(0).input_value() == "0.7"
        assert page.locator("input[type=number]").nth(1).input_value() == "0.9"
        instruction.fill("Count to forty.")
        page.locator("#ask").click()
        whole = LESSONS[5]["output"]
        expect(answer).to_have_value(re.compile(r"^1 2 3 4 5"))
        early = answer.input_value()
        assert whole.startswith(early)
        assert len(early) < len(whole)
        page.locator("#stop").click()
        expect(page.locator("#status")).to_have_text("Stopped.")
        page.wait_for_timeout(500)
        stopped = answer.input_value()
        page.wait_for_timeout(500)
        assert answer.input_value() == stopped
        assert len(stopped) < len(whole)
        # The stopped model is free for the next question.
        instruction.fill("Translate to French.")
        page.locator("#input textarea").fill("Good morning")
        page.locator("#ask").click()
        expect(answer).to_have_value("Bonjour")
        expect(page.locator("#status")).to_contain_text("Done in")
        page.locator("#input textarea").fill("")
        instruction.fill("Name the three primary colors.")
        page.locator("#ask").click()
        expect(answer).to_have_value("Red, blue and yellow.")
        if folder := os.environ.get("SCREENSHOT_DIR"):  # SCREENSHOT_DIR=assets remakes the README's
            page.screenshot(path=os.path.join(folder, "demo.png"))
        from gradio_client import Client

        client = Client(url, verbose=False)
        for wrong in (["x" * 2001, ""], ["Hi", "x" * 8001], ["", ""]):
            with pytest.raises(Exception, match=r"this page takes|Write an instruction first"):
                client.predict(*wrong, 0.7, 0.9, 5, api_name="/ask")
        assert {requested.split("/")[2] for requested in page.requests if requested[:4] == "http"} == {
            url.split("/")[2]
        }
        page.close()


def test_browser_judges_pairs_into_the_journal_of_the_terminal(root, outputs, tmp_path, browser):
    expect = pytest.importorskip("playwright.sync_api").expect
    a, b, judged = outputs
    compare(root, outputs, ["t", "q"])
    with served(root, tmp_path, "compare", "--a", a, "--b", b, "--output", judged, "--page") as url:
        page = open_page(browser, url)
        for to_go in range(7, 0, -1):
            expect(page.locator("#progress")).to_have_text(f"Pairs to go: {to_go}")
            assert "model-" not in page.locator("body").inner_text()
            page.get_by_role("button", name="Answer 2 is better").click()
        expect(page.locator("#progress")).to_contain_text("1 ties")
        expect(page.get_by_role("button", name="Tie")).to_be_hidden()
        page.close()
    lines = judged_pairs.read_verdicts(outputs)
    assert len(lines) == 8
    assert all(line["better"] != line["shown_first"] for line in lines)
    assert "(to go: 0)" in (tmp_path / "log").read_text()
