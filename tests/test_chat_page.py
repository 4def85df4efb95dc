"""The chat page: its requests are valid, it loads nothing from elsewhere, and in a browser it shows answers and kept shares."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests import browser
from tests.chat_engines import chat_engine
from tests.http_server import Served, served

pytestmark = pytest.mark.usefixtures("one_thread")

QUESTION = "Hello <b>there</b>"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(chat_engine(tmp_path_factory), log_prompts=True) as server:
        yield server


def test_what_the_page_sends_is_valid(tiny: Served) -> None:
    """The template of its requests is JSON in the page, to which the script adds a conversation and settings."""
    answer = httpx.get(tiny.url)
    assert answer.headers["content-type"].startswith("text/html")
    found = re.search(r'id="request">(.*?)</script>', answer.text, re.DOTALL)
    assert found is not None
    body = json.loads(found[1]) | {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0.5, "max_tokens": 4}
    streamed = httpx.post(f"{tiny.url}/v1/chat/completions", json=body)
    assert streamed.status_code == 200
    events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    assert all(event["usage"]["kv"]["kept_share_per_layer"] for event in events if event.get("usage"))
    assert sum("usage" in event for event in events) >= 2  # with an answer's parts, which a busy machine sends together


def test_the_page_may_load_nothing_from_elsewhere(tiny: Served) -> None:
    answer = httpx.get(tiny.url)
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.search(r"https?://|src=|<link", answer.text)


@pytest.mark.skipif(browser.PATH is None, reason="no Chromium (apt-get install chromium-headless-shell)")
def test_a_conversation_in_a_browser(tiny: Served, tmp_path: Path) -> None:
    """Text arrives piece by piece with a bar for each layer; what is written is text, not markup; answers can be stopped."""
    with browser.browser_page(tmp_path) as page:
        page.open(tiny.url)
        page.run("document.getElementById('max_tokens').value = 12")
        page.run(f"document.getElementById('text').value = {json.dumps(QUESTION)}")
        with tiny.slow(0.02):
            page.run("document.getElementById('form').requestSubmit()")
            page.run(
                _until("document.querySelectorAll('.layer').length === 2 && document.querySelector('.assistant').textContent")
            )
            assert page.run("document.getElementById('stop').hidden") is False
            page.run(_until("document.getElementById('stop').hidden"))
        assert page.run("document.querySelector('.user').textContent") == QUESTION
        assert page.run("document.querySelectorAll('.error').length") == 0
        expected = tiny.engine.chat([{"role": "user", "content": QUESTION}], max_new_tokens=12)
        assert page.run("document.querySelector('.assistant').textContent") == expected.text
        shares = [n / expected.num_computed_tokens for n in expected.kv_tokens]
        widths = page.run("[...document.querySelectorAll('.layer b')].map(bar => parseFloat(bar.style.width))")
        assert widths == pytest.approx([100 * share for share in shares], abs=0.01)
        with tiny.slow(0.05):
            page.run("document.getElementById('max_tokens').value = 900")
            page.run("document.getElementById('text').value = 'again'; document.getElementById('form').requestSubmit()")
            page.run(_until("document.querySelectorAll('.assistant')[1].textContent"))
            page.run("document.getElementById('stop').click()")
            page.run(_until("document.getElementById('stop').hidden"))


def _until(condition: str) -> str:
    """A script that ends when ``condition`` is true, or throws after 20 seconds."""
    return f"""new Promise((done, fail) => {{
        const look = setInterval(() => {{ if ({condition}) {{ clearInterval(look); done(); }} }}, 10);
        setTimeout(() => fail(new Error("timeout")), 20000);
    }})"""
