"""The page in a real browser, against the real server and model: no errors, and nothing against its policy."""

import time
from collections.abc import Callable, Iterator

import httpx
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from tests.e2e.serving import START_TIMEOUT_S, free_port, serve

STORY = "Write a long story about a lighthouse keeper and the sea."


class Page:
    """What a visitor sees and does."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        self.driver.get(f"{url}/")

    def find(self, element_id: str) -> WebElement:
        return self.driver.find_element(By.ID, element_id)

    def number(self, element_id: str) -> int:
        return int(self.find(element_id).get_attribute("textContent").replace(",", "").replace("–", "-1"))

    def type(self, text: str) -> None:
        self.driver.switch_to.active_element.send_keys(text)

    def answers(self) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, ".assistant .text")

    def until(self, condition: Callable[[], object], timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, self.driver.find_element(By.TAG_NAME, "body").text
            time.sleep(0.1)

    def complaints(self) -> list[str]:
        """Errors, warnings and violations since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] != "INFO"]


@pytest.fixture
def page(driver: webdriver.Chrome) -> Iterator[Page]:
    set_size(driver, 1280, 800)
    page = Page(driver)
    yield page
    driver.get("about:blank")


def set_size(driver: webdriver.Chrome, width: int, height: int) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def test_an_answer_streams_stops_and_frees_its_pages(page: Page, url: str) -> None:
    page.open(url)
    page.until(lambda: page.number("pages-free") > 0)
    total = sum(page.number(f"pages-{state}") for state in ("free", "open", "sealed", "cached"))
    page.type(STORY + Keys.ENTER)
    page.until(lambda: page.answers() and page.answers()[0].text)
    early = page.answers()[0].text
    page.until(lambda: len(page.answers()[0].text) > len(early))  # it grows: it streams
    page.until(lambda: page.number("pages-open") > 0)
    page.until(lambda: page.number("running") == 1)
    assert page.number("pages-free") < total
    page.type(Keys.ESCAPE)
    page.until(lambda: "stopped" in page.driver.find_element(By.CSS_SELECTOR, ".assistant .note").text)
    page.until(lambda: page.number("pages-open") == page.number("pages-sealed") == page.number("running") == 0, 10)
    assert page.number("pages-free") + page.number("pages-cached") == total
    assert page.driver.switch_to.active_element == page.find("prompt")
    assert page.complaints() == []


def test_the_headline_says_what_fits(page: Page, url: str) -> None:
    page.open(url)
    page.until(lambda: page.number("tokens-gear") > 0)
    assert 3.2 < page.number("tokens-gear") / page.number("tokens-bf16") < 3.5
    assert "near-lossless" in page.find("fit-note").text
    assert "SmolLM2-135M-Instruct" in page.find("model").text


def test_the_conversation_goes_on_until_a_new_chat(page: Page, url: str) -> None:
    page.open(url)
    page.driver.execute_script("document.getElementById('temperature').value = 0")
    for number, question in enumerate(("What is the capital of France?", "Say that again."), start=1):
        page.type(question + Keys.ENTER)
        page.until(lambda n=number: len(page.answers()) == n and page.find("send").is_displayed())
    assert ["Paris" in answer.text for answer in page.answers()] == [True, True]  # the second question alone names none
    assert page.find("spoken").get_attribute("textContent") == page.answers()[1].get_attribute("textContent")
    page.find("new-chat").click()
    assert page.answers() == []
    assert page.find("welcome").is_displayed()
    assert page.complaints() == []


def test_a_refusal_is_one_sentence_and_gives_the_words_back(page: Page, url: str) -> None:
    page.open(url)
    page.driver.execute_script("document.getElementById('max-tokens').value = 100000")
    page.type("Hello" + Keys.ENTER)
    page.until(lambda: page.find("error").is_displayed())
    assert "--max-model-len" in page.find("error").text
    assert page.find("prompt").get_attribute("value") == "Hello"
    assert page.answers() == []
    assert [text for text in page.complaints() if "400 (Bad Request)" not in text] == []


HOSTILE = """
<img src=x onerror=alert(1)><script>alert(2)</script> [click](javascript:alert(3)) <b onclick=alert(4)>bold</b>
<style>body { display: none }</style> <form action=/x><input></form>

![leak](https://example.com/secret)

[link](https://example.com/)

**strong** and `code`
"""


def test_hostile_markdown_is_harmless(page: Page, url: str) -> None:
    page.open(url)
    html = page.driver.execute_async_script(
        """const [markdown, done] = arguments;
        import(new URL("page/markdown.js", document.baseURI)).then(({ render }) => {
          const box = document.createElement("div");
          box.append(render(markdown));
          document.body.append(box);
          done(box.innerHTML);
        });""",
        HOSTILE,
    )
    for part in ("<img", "<script", "<style", "<form", "<input", "<b ", 'href="javascript:'):
        assert part not in html
    assert "&lt;script&gt;alert(2)" in html  # shown, not run
    assert "<strong>strong</strong> and <code>code</code>" in html
    link = page.driver.find_element(By.LINK_TEXT, "link")
    assert link.get_attribute("rel") == "noopener noreferrer"
    assert link.get_attribute("target") == "_blank"
    assert page.complaints() == []


def test_every_control_has_a_name_and_a_phone_needs_no_sideways_scroll(page: Page, url: str) -> None:
    set_size(page.driver, 390, 844)
    page.open(url)
    page.until(lambda: page.number("tokens-gear") > 0)
    page.driver.find_element(By.TAG_NAME, "summary").click()
    controls = page.driver.find_elements(By.CSS_SELECTOR, "button, input, textarea, a, canvas, [role=img]")
    assert all(control.accessible_name for control in controls if control.is_displayed())
    assert page.driver.execute_script("return document.documentElement.scrollWidth <= 390")
    assert not page.find("pool").is_displayed()
    page.find("toggle-panel").click()
    assert page.find("pool").is_displayed()
    assert not page.find("prompt").is_displayed()
    assert page.driver.execute_script("return document.documentElement.scrollWidth <= 390")


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ("Promise.reject(new TypeError())", "The server does not answer."),
        ("Promise.resolve(new Response('', {status: 404}))", "The server answered 404."),
        ("Promise.resolve(new Response('up 1'))", "The server's /metrics has no figures of GearServe."),
    ],
)
def test_a_page_without_metrics_says_so_until_they_are_back(page: Page, url: str, answer: str, sentence: str) -> None:
    page.open(url)
    page.until(lambda: page.number("tokens-gear") > 0)
    page.driver.execute_script(
        f"window.real = fetch; window.fetch = (path, options) => path === 'metrics' ? {answer} : real(path, options)"
    )
    page.until(lambda: page.find("no-metrics").is_displayed())
    assert page.find("no-metrics").text == f"No live figures. {sentence}"
    page.driver.execute_script("window.fetch = real")
    page.until(lambda: not page.find("no-metrics").is_displayed())


def test_a_locked_server_asks_for_the_key_and_keeps_it_in_the_tab(page: Page) -> None:
    port = free_port()
    process = serve("--port", str(port), "--api-key", "sesame", "--max-model-len", "512", "--num-pages", "40")
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(url)
        page.open(url)
        page.until(lambda: page.find("key-form").is_displayed())
        page.type("wrong" + Keys.ENTER)
        page.until(lambda: "not one of this server's" in page.find("error").text)
        page.type("sesame" + Keys.ENTER)
        page.until(lambda: page.find("model").text and page.number("pages-free") == 40)
        assert not page.find("key-form").is_displayed()
        assert not page.find("error").is_displayed()
        page.type("Hello" + Keys.ENTER)
        page.until(lambda: page.answers() and page.answers()[0].text)
        stored = page.driver.execute_script("return [{...sessionStorage}, {...localStorage}, document.cookie]")
        assert stored == [{"gear-api-key": "sesame"}, {}, ""]
        assert all("401 (Unauthorized)" in text for text in page.complaints())
    finally:
        process.terminate()
        process.communicate(timeout=60)


def wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise AssertionError("the server did not start")
