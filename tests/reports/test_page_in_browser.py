"""The page in a real Chromium: what a reader does with it, by mouse, keyboard and phone."""

import json

import pytest

from lora_one.reports.build import build_report
from lora_one.reports.records import find_runs

HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
)
ROWS = "return [...document.querySelectorAll('#all-runs tbody tr')]"


@pytest.fixture(scope="module")
def page(tmp_path_factory, write_run, headless):
    root = tmp_path_factory.mktemp("runs")
    layer = {"name": "q", "shape": [8, 8], "rank": 2, "singular_values": [2.0, 1.0]}
    for method, level in (("lora", 0.5), ("lora_one", 0.6)):
        for seed in range(3):
            log = [{"step": s, "loss": 5 / s + seed / 10, "epoch": s / 900} for s in range(1, 901)]
            log += [
                {"step": s, "epoch": s / 900, "validation_loss": 4 / s} for s in (300, 600, 900)
            ]
            log += [
                {
                    "step": s,
                    "principal_angle_B/q": 30.0 + s / 30,
                    "update_norm/q": s / 900,
                    "update_singular_values/q": [s / 900, s / 1800, 0.0],
                }
                for s in (300, 600, 900)
            ]
            write_run(
                root,
                f"arithmetic-{method}-s{seed}",
                method=method,
                seed=seed,
                score=level + seed / 100,
                seconds=10.0 * (seed + 1),
                log=log,
                init={"method": method, "equation": "B = 0", "layers": [layer]},
                predictions=[
                    {
                        "row_id": f"test/{index}",
                        "prompt": "Q: 1 + 1?",
                        "reply": HOSTILE,
                        "reference": "2",
                        "scores": {"strict": {"parsed": str(index), "correct": index == 2}},
                    }
                    for index in range(4)
                ],
            )
    error = {"type": "NonFiniteError", "message": f"step 3: {HOSTILE}", "phase": "train"}
    write_run(
        root,
        "arithmetic-failed",
        status="failed",
        score=0.99,
        record={"error": error},
        init={"method": "eva", "layers": [layer]},
    )
    (write_run(root, "arithmetic-torn", score=0.99) / "run.json").write_text("{")
    with pytest.MonkeyPatch.context() as patch:
        # matplotlib's files have tests of their own.
        patch.setattr("lora_one.reports.build.write_plots", lambda *_: [])
        build_report(find_runs(root), root / "report", title="Report")
    return root / "report" / "report.html"


@pytest.fixture(scope="module")
def session(page, headless):
    with headless.open_page(page) as browser:
        yield browser


@pytest.fixture
def browser(session):
    """The page as it was first opened; whatever a test did, nothing may have gone wrong."""
    session.emulate(dark=False)
    session.resize(1280, 900)
    session.run("localStorage.clear(); location.hash = ''; location.reload()")
    session.wait_for(
        "return document.readyState === 'complete' && !!document.querySelector('table')"
    )
    yield session
    assert session.complaints() == []
    addresses = session.requests()
    assert all(url.startswith("file:") and "report.html" in url for url in addresses), addresses
    assert session.run("return document.title").find("owned") < 0


def cells(browser, column):
    return browser.run(f"{ROWS}.map((row) => row.children[arguments[0]].textContent)", column)


def press(browser, key, selector=None):
    """Press a key as a keyboard does, on what has the focus or on an element."""
    from selenium.webdriver.common.by import By

    target = (
        browser.driver.switch_to.active_element
        if selector is None
        else browser.driver.find_element(By.CSS_SELECTOR, selector)
    )
    target.send_keys(key)


def column_of(browser, name):
    return browser.run(
        "return [...document.querySelectorAll('#all-runs thead th')]"
        ".findIndex((head) => head.textContent === arguments[0])",
        name,
    )


def test_the_verdict_is_seen_first(browser):
    words = browser.run("return document.querySelector('.comparison tbody').innerText")
    assert "lora_one · adamw" in words.splitlines()[0]
    assert "best" in words
    assert "worse" in words  # three differences of exactly 0.1


def test_headers_sort_and_sort_back_and_say_so(browser):
    at = column_of(browser, "accuracy")
    button = f"#all-runs thead th:nth-child({at + 1}) button"
    browser.run(f"document.querySelector('{button}').click()")
    down = cells(browser, at)
    assert down[:6] == ["0.6200", "0.6100", "0.6000", "0.5200", "0.5100", "0.5000"]
    # What has no value comes last, whichever way.
    assert down[6:] == ["–", "–"]
    browser.run(f"document.querySelector('{button}').click()")
    assert cells(browser, at) == [*reversed(down[:6]), "–", "–"]
    state = f"return document.querySelector('{button}').parentNode.ariaSort"
    assert browser.run(state) == "ascending"


def test_the_filter_takes_words_and_choices(browser):
    press(browser, "lora_one s1", "#query")
    assert cells(browser, 0) == ["lora_one-s1"]
    assert browser.run("return document.querySelector('output').textContent") == "1 of 8 runs"
    browser.run(
        "const s = document.querySelector('select[aria-label=status]');"
        "s.value = 'failed'; s.dispatchEvent(new Event('change'))"
    )
    assert cells(browser, 0) == []
    browser.run(
        "const q = document.querySelector('#query');"
        "q.value = ''; q.dispatchEvent(new Event('input'))"
    )
    assert cells(browser, 1) == ["failed"]


def test_a_click_on_a_count_shows_those_runs(browser):
    browser.run(
        "[...document.querySelectorAll('.counts button')]"
        ".find((b) => b.textContent.includes('malformed')).click()"
    )
    assert cells(browser, 1) == ["malformed"]


def open_run(browser, name):
    browser.run("location.hash = 'run/' + arguments[0]", name)
    browser.wait_for("return !!document.querySelector('article.run')")
    return browser.run("return document.querySelector('article.run').innerText")


def test_a_run_shows_its_configuration_start_curves_and_replies(browser):
    text = open_run(browser, "arithmetic-lora_one-s1")
    for words in ("init.direction", "LoRA-One", "B = 0", "Training loss", "Sample predictions"):
        assert words in text
    # Text of a reply is text: shown as it is, and nothing of it is done.
    assert HOSTILE in text
    assert "gold\n2" in text
    assert "900 logged values as 600 means" in text
    assert browser.run("return document.querySelectorAll('.reply.right').length") == 1
    browser.run(
        "const s = document.querySelector('select[aria-label=\"Which predictions\"]');"
        "s.value = 'right'; s.dispatchEvent(new Event('change'))"
    )
    assert browser.run("return document.querySelectorAll('.reply:not([hidden])').length") == 1


def test_a_start_says_what_was_decomposed(browser):
    text = open_run(browser, "arithmetic-lora_one-s1")
    assert "Singular values of the one-step gradient, per layer" in text
    text = open_run(browser, "arithmetic-failed")
    assert "Singular values of the centred inputs, per layer" in text


def test_a_failed_and_a_torn_run_say_why(browser):
    assert f"step 3: {HOSTILE}" in open_run(browser, "arithmetic-failed")
    browser.run("location.hash = 'run/arithmetic-torn'")
    browser.wait_for("return document.title.startsWith('arithmetic-torn')")
    assert "run.json cannot be read" in browser.run("return document.body.innerText")


def test_a_run_that_is_not_there_is_no_error(browser):
    browser.run("location.hash = 'run/nothing'")
    browser.wait_for("return document.body.innerText.includes('There is no run nothing')")


def test_everything_can_be_done_from_the_keyboard(browser):
    from selenium.webdriver.common.keys import Keys

    press(browser, "/", "body")
    assert browser.run("return document.activeElement.id") == "query"
    press(browser, "lora-s")
    assert len(cells(browser, 0)) == 3
    # From the field over three choices, the table itself and its headers to the first run.
    for _ in range(60):
        press(browser, Keys.TAB)
        if browser.run("return document.activeElement.matches('#all-runs tbody a')"):
            break
    press(browser, Keys.ENTER)
    browser.wait_for("return document.title.startsWith('arithmetic-lora-s0')")
    assert browser.run("return document.activeElement.tagName") == "H2"
    press(browser, "j", "body")
    browser.wait_for("return document.title.startsWith('arithmetic-lora-s1')")
    press(browser, "k", "body")
    browser.wait_for("return document.title.startsWith('arithmetic-lora-s0')")
    press(browser, Keys.ESCAPE, "body")
    browser.wait_for("return document.title === 'Report'")
    # The filter is as it was left.
    assert len(cells(browser, 0)) == 3


def test_arrow_keys_read_a_plot(browser):
    from selenium.webdriver.common.keys import Keys

    browser.wait_for(
        "return !!document.querySelector('#plot-0-learning-rate .line, .drawing .line')"
    )
    selector = "#plot-0-validation-loss .drawing"
    press(browser, Keys.ARROW_RIGHT, selector)
    press(browser, Keys.ARROW_RIGHT, selector)
    said = browser.run(
        "return document.querySelector('#plot-0-validation-loss [aria-live]').textContent"
    )
    assert "epoch 0.6667" in said
    assert "validation loss 0.006667" in said  # 4 / 600


def test_the_pointer_reads_a_plot(browser):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    plot = browser.driver.find_element(By.CSS_SELECTOR, "#plot-0-training-loss .drawing")
    browser.run("arguments[0].scrollIntoView({block: 'center'})", plot)
    ActionChains(browser.driver).move_to_element(plot).perform()
    tip = browser.wait_for(
        "return document.querySelector('#plot-0-training-loss .tip:not([hidden])')"
    )
    assert "training loss" in tip.text
    assert " to " in tip.text  # the band's ends


def test_a_line_can_be_hidden(browser):
    legend = "document.querySelectorAll('#plot-0-training-loss .legend button')"
    lines = "return document.querySelectorAll('#plot-0-training-loss .line').length"
    assert browser.wait_for(lines) == 2
    browser.run(f"{legend}[0].click()")
    assert browser.run(lines) == 1
    assert browser.run(f"return {legend}[0].ariaPressed") == "false"


def background(browser):
    return browser.run("return getComputedStyle(document.body).backgroundColor")


def test_dark_follows_the_system_until_the_reader_chooses(browser):
    assert background(browser) == "rgb(255, 255, 255)"
    browser.emulate(dark=True)
    assert background(browser) == "rgb(20, 24, 28)"
    browser.run("document.querySelector('.theme').click()")  # auto -> light
    assert background(browser) == "rgb(255, 255, 255)"
    browser.emulate(dark=False)
    browser.run("document.querySelector('.theme').click()")  # light -> dark
    assert background(browser) == "rgb(20, 24, 28)"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_can_be_read(browser, dark):
    """WCAG AA: a contrast of at least 4.5 : 1 for text of this size."""
    browser.emulate(dark=dark)
    ratios = browser.run(
        """
        const light = (css) => {
          const [r, g, b] = css.match(/[\\d.]+/g).map(Number).map((v) => v / 255)
            .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
          return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const back = (node) => {
          for (let at = node; at; at = at.parentElement) {
            const colour = getComputedStyle(at).backgroundColor;
            if (!colour.endsWith(', 0)')) return colour;
          }
        };
        return ['p', 'td', 'th', 'small', '.quiet', '.chip.best', '.chip.failed', '.chip.finished',
          '.chip.real', 'a', 'figcaption', 'summary', '.arm'].flatMap((selector) =>
          [...document.querySelectorAll(selector)].slice(0, 20).map((node) => {
            const [a, b] = [light(getComputedStyle(node).color), light(back(node))];
            return [selector, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
          }));
        """
    )
    assert [pair for pair in ratios if pair[1] < 4.5] == []
    assert len(ratios) > 50


@pytest.mark.parametrize("hash_", ["", "run/arithmetic-lora-s0"], ids=["overview", "run"])
def test_a_phone_scrolls_down_and_not_sideways(browser, hash_):
    browser.resize(360, 740, phone=True)
    browser.run("location.hash = arguments[0]", hash_)
    browser.wait_for(f"return location.hash.slice(1) === {json.dumps(hash_)}")
    if hash_:
        browser.wait_for("return !!document.querySelector('article.run')")
    assert browser.run("return document.documentElement.scrollWidth") <= 360
    assert (
        browser.run("return document.querySelector('.theme').getBoundingClientRect().right") <= 360
    )


def test_injected_script_would_not_run(browser):
    """The policy of the page knows its script by a hash and lets no other run."""
    blocked = browser.driver.execute_async_script(
        """
        const done = arguments[0];
        document.addEventListener('securitypolicyviolation',
          (event) => done(event.violatedDirective));
        const script = document.createElement('script');
        script.textContent = "document.title = 'owned'";
        document.body.append(script);
        """
    )
    assert blocked.startswith("script-src")
    assert browser.run("return document.title") == "Report"
    # The browser tells the console that it refused.
    assert all("Content Security Policy" in line for line in browser.complaints())
