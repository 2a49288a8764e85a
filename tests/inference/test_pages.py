"""The pages, in a browser: answers stream and stop, verdicts go to the file of the terminal."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time

import httpx
import judged_pairs
import pytest
from engine_server import EngineServer
from judged_pairs import compare
from taught_model import LESSONS


@pytest.fixture
def outputs(tmp_path):
    return judged_pairs.write_outputs(tmp_path)


CHROMIUM = "/usr/bin/chromium"


CHROMIUM_FLAGS = "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update"


# Runs a command as inference.py does, with a model that takes its time, and reports whoever looks up another machine.
SERVER = """
import atexit, socket, sys, threading, time
atexit.register(lambda: print(*(f"STILL WRITING: {t.name}" for t in threading.enumerate() if t.name == "answer")))
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
        time.sleep(0.05)
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
        assert process.wait(60) == 0
    log = (tmp_path / "log").read_text()
    assert "LOOKED UP" not in log
    assert "Traceback" not in log


PHONE = {"width": 390, "height": 844}


def open_page(browser, url, viewport=None):
    page = browser.new_page(viewport=viewport or {"width": 1280, "height": 890})
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
        assert_ask_stands_under_the_question(page)
        expect(page.locator("#stop")).to_be_hidden()
        page.get_by_role("button", name="Sampling").click()
        assert page.locator("input[type=number]").nth(0).input_value() == "0.7"
        assert page.locator("input[type=number]").nth(1).input_value() == "0.9"
        page.get_by_role("button", name="Sampling").click()
        instruction.fill("Count to forty.")
        page.locator("#ask").click()
        whole = LESSONS[5]["output"]
        expect(answer).to_have_value(re.compile(r"^1 2 3 4 5"))
        early = answer.input_value()
        assert whole.startswith(early)
        assert len(early) < len(whole)
        expect(page.locator("#ask")).to_be_hidden()
        page.locator("#stop").click()
        expect(page.locator("#status")).to_have_text("Stopped.")
        expect(page.locator("#stop")).to_be_hidden()
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
        expect(page.locator("#ask")).to_have_text("Ask (Shift+Enter)")
        instruction.press("Shift+Enter")
        expect(answer).to_have_value("Red, blue and yellow.")
        expect(page.locator("#stop")).to_be_hidden()
        take_picture(page, "demo.png")
        from gradio_client import Client

        client = Client(url, verbose=False)
        for wrong in (["x" * 2001, ""], ["Hi", "x" * 8001], ["", ""]):
            with pytest.raises(Exception, match=r"this page takes|Write an instruction first"):
                client.predict(*wrong, 0.7, 0.9, 5, api_name="/ask")
        assert {requested.split("/")[2] for requested in page.requests if requested[:4] == "http"} == {
            url.split("/")[2]
        }
        upload = httpx.post(f"{url}/gradio_api/upload", files={"files": ("a.txt", b"x" * 4096)})
        assert upload.status_code == 413
        page.close()
        # On a phone everything stands in one column, in the same order.
        page = open_page(browser, url, PHONE)
        assert_ask_stands_under_the_question(page)
        assert page.locator("#answer").bounding_box()["y"] > page.locator("#sampling").bounding_box()["y"]
        page.locator("#instruction textarea").fill("Name the three primary colors.")
        page.locator("#ask").click()
        expect(page.locator("#answer textarea")).to_have_value("Red, blue and yellow.")
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        take_picture(page, "demo_phone.png")
        page.close()


def assert_ask_stands_under_the_question(page):
    tops = [page.locator(where).bounding_box()["y"] for where in ("#instruction", "#input", "#ask", "#sampling")]
    assert tops == sorted(tops)
    ask = page.locator("#ask").bounding_box()
    assert ask["y"] + ask["height"] < page.viewport_size["height"]
    assert not page.get_by_text("Top-p").is_visible()


def take_picture(page, name):
    if folder := os.environ.get("SCREENSHOT_DIR"):  # SCREENSHOT_DIR=assets remakes the README's
        page.screenshot(path=os.path.join(folder, name))


def test_ctrl_c_while_an_answer_is_written_ends_cleanly(root, model_path, tmp_path):
    with served(root, tmp_path, "demo", "--model_path", model_path, "--seed", "1") as url:
        from gradio_client import Client

        writing = Client(url, verbose=False).submit("Tell a story.", "", 0.7, 1.0, 600, api_name="/ask")
        while not writing.outputs():
            time.sleep(0.02)
    # A thread in torch at that moment makes the process end with "terminate called" and SIGABRT, but not every time.
    assert "STILL WRITING" not in (tmp_path / "log").read_text()


def test_the_page_asks_an_engine(root, alpaca, tmp_path):
    with EngineServer(alpaca) as server, served(root, tmp_path, "demo", "--base_url", server.base_url) as url:
        from gradio_client import Client

        client = Client(url, verbose=False)
        assert client.predict("Translate to French.", "Good morning", 0, 1.0, 60, api_name="/ask")[0] == "Bonjour"
        server.faults = [{"status": 400, "error": {"message": "not today"}}]
        with pytest.raises(Exception, match="not today"):
            client.predict("Sing.", "", 0, 1.0, 60, api_name="/ask")


def test_browser_judges_pairs_into_the_journal_of_the_terminal(root, outputs, tmp_path, browser):
    expect = pytest.importorskip("playwright.sync_api").expect
    a, b, judged = outputs
    compare(root, outputs, ["t", "q"])
    with served(root, tmp_path, "compare", "--a", a, "--b", b, "--output", judged, "--page") as url:
        page = open_page(browser, url)
        progress = page.locator("#progress")
        for to_go in range(7, 3, -1):
            expect(progress).to_have_text(f"Pairs to go: {to_go}")
            assert "model-" not in page.locator("body").inner_text()
            page.get_by_role("button", name="Answer 2 is better").click()
        take_picture(page, "judging.png")
        # The same by keys: one too many, taken back.
        for key, to_go in (("1", 2), ("u", 3), ("2", 2), ("3", 1), ("u", 2), ("2", 1)):
            page.keyboard.press(key)
            expect(progress).to_have_text(f"Pairs to go: {to_go}")
        page.close()
        page = open_page(browser, url, PHONE)
        expect(progress := page.locator("#progress")).to_have_text("Pairs to go: 1")
        first, second = (page.get_by_label(f"Answer {number}").bounding_box() for number in (1, 2))
        assert second["y"] >= first["y"] + first["height"]
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        take_picture(page, "judging_phone.png")
        page.keyboard.press("2")
        expect(progress).to_contain_text("1 ties")
        expect(page.get_by_role("button", name="Tie")).to_be_hidden()
        page.get_by_role("button", name="Undo").click()
        expect(progress).to_have_text("Pairs to go: 1")
        page.keyboard.press("2")
        expect(progress).to_contain_text("1 ties")
        page.close()
    lines = judged_pairs.read_verdicts(outputs)
    assert len(lines) == 8
    assert all(line["better"] != line["shown_first"] for line in lines)
    assert "(to go: 0)" in (tmp_path / "log").read_text()
