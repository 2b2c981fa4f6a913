"""Test the report: the contents of the page, and how a browser shows it."""

import base64
import os
import re
import shutil
from html import escape
from html.parser import HTMLParser
from time import monotonic, sleep

import pytest

from analysis import gallery, report
from analysis.tables import read_groups
from tests.toys import write_run

LAYERS = ["hidden1", "hidden2", "hidden10"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return two seeds of a small network with inputs of rank 0, a run with a long flag, and a run with many layers."""
    folder = tmp_path_factory.mktemp("<b>&amp;")
    deep = write_run(folder / "deep", [f"block{i}" for i in range(1, 20)], model="ConvNeXt", data="CIFAR10")
    long = write_run(
        folder / "long",
        LAYERS,
        factors=(1, 2, 4),
        linear=("hidden10",),
        optimizer="Adam, described by a text that is too long for a label of a group",
    )
    seeds = [write_run(folder / f"s{seed}", LAYERS, seed) for seed in (0, 2)]
    for run in seeds:
        text = (run / "nc1.csv").read_text()
        (run / "nc1.csv").write_text(re.sub("(train,input,12),.*", r"\1,0,nan,nan,nan", text))
    return [*seeds, long, deep]


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    report.write_report(read_groups(runs), folder)
    return folder / "report.html"


def parse_elements(page) -> list[tuple[str, dict]]:
    """Return (tag, attributes) of every element of the page."""
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, dict(attributes)))
    parser.feed(page.read_text())
    return found


def test_the_page_needs_no_other_file(page):
    for tag, attributes in parse_elements(page):
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href"):
                assert value.startswith(("#", "data:")), (tag, value)
        assert tag not in ("link", "img", "iframe")
    assert not re.search(r"@import|url\((?!#)", page.read_text())


def test_the_page_has_every_figure_and_unique_ids(page, runs):
    names = gallery.list_figures(read_groups(runs))
    ids = [attributes["id"] for _, attributes in parse_elements(page) if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert [name for name in ids if name in gallery.KINDS] == names
    referred = set(re.findall(r'href="#([^"]+)|url\(#([^)]+)\)', page.read_text()))
    assert {a or b for a, b in referred} <= set(ids)
    text = page.read_text().replace("&#39;", "&#x27;")
    assert all(escape(gallery.write_caption(name, read_groups(runs))) in text for name in names)


def test_the_share_of_suboptimal_probes_is_below_the_table_of_each_group(page):
    note = r"</table>\s*</div>\s*<p>Of the probes of all epochs, [\d.]+% \(train set\) and [\d.]+% \(test set\)"
    assert len(re.findall(note, page.read_text())) == 3


def test_the_controls_are_below_the_table_of_each_group(page):
    note = r": controls</h3>.*?</table>\s*</div>\s*<p>shuffled: the information about the labels in a random order"
    assert len(re.findall(note, page.read_text(), re.DOTALL)) == 3
    assert page.read_text().count("noise: the minimality of linear probes") == 1
    assert page.read_text().count("of 24 are not proved to be within 1e-05 nats") == 1


def join_parts(run) -> str:
    """Return the prefix that the files of a run have among the downloads."""
    return "-".join(run.parts[1:])


def test_the_page_contains_the_csvs(page, runs):
    found = {
        attributes["download"]: base64.b64decode(attributes["href"].split(",")[1])
        for tag, attributes in parse_elements(page)
        if tag == "a"
    }
    expected = {
        f"{join_parts(run)}-{name}.csv": run / f"{name}.csv" for run in runs for name in ("epochs", "nc1", "dib")
    }
    expected |= {f"{join_parts(runs[2])}-{name}": runs[2] / name for name in ("convergence.csv", "noise.csv")}
    assert found == {name: path.read_bytes() for name, path in expected.items()}


def test_settings_are_shown_and_texts_are_escaped(page, runs):
    settings = report.tabulate_settings(read_groups(runs)).set_index("flag")["MLP on SZT"]
    assert settings["seed"] == "0, 2"
    assert settings["model"] == "MLP"
    assert settings["dib_samples"] == "train 60, test 60"
    assert settings["run_dir"] == f"{runs[0]}, {runs[1]}"
    assert report.tabulate_settings(read_groups(runs)).columns.str[:15].tolist() == [
        "flag",
        "MLP on SZT",
        "MLP on SZT: /tm",
        "ConvNeXt on CIF",
    ]
    assert "&lt;b&gt;&amp;amp;" in page.read_text()
    assert "<b>" not in page.read_text()


@pytest.fixture(scope="module")
def browser(page):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        assert "CI" not in os.environ, "CI has to install chromium and chromium-driver"
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", OFFLINE)
    yield browser
    browser.quit()


TOO_WIDE = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
OFFLINE = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}


def open_page(browser, page, width: int, height: int = 900):
    """Show the page on a screen of this size."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(page.as_uri())
    return browser


@pytest.mark.parametrize("width", [1280, 360])
def test_a_browser_shows_every_figure_in_the_width_of_a_screen(browser, page, runs, width):
    open_page(browser, page, width)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return innerWidth") == width
    assert browser.execute_script(TOO_WIDE) == 0
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('figure svg')].map(e => e.getBoundingClientRect().toJSON())"
    )
    assert len(boxes) == len(gallery.list_figures(read_groups(runs)))
    for box in boxes:
        assert box["left"] >= 0
        assert box["right"] <= width
        assert box["width"] > 0.85 * min(width, 960)
        assert box["height"] > 0.3 * box["width"]


def test_tables_sort_by_column(browser, page):
    open_page(browser, page, 1280)
    table = browser.find_elements("css selector", "table.sortable")[1]
    titles = {title.text: title for title in table.find_elements("css selector", "th")}

    def read_names():
        return [cell.text for cell in table.find_elements("css selector", "tbody td:first-child")]

    assert read_names() == ["input", "hidden1", "hidden2", "hidden10"]
    for name, order, expected in (
        (
            "NC1, train",
            "ascending",
            ["hidden10", "hidden2", "hidden1", "input"],
        ),  # 8, 17, 33, and the cell without a number
        ("NC1, train", "descending", ["hidden1", "hidden2", "hidden10", "input"]),
        ("layer", "ascending", ["hidden1", "hidden2", "hidden10", "input"]),
        ("layer", "descending", ["input", "hidden10", "hidden2", "hidden1"]),
    ):
        titles[name].find_element("css selector", "button").click()
        assert read_names() == expected
        sorted_by = [other for other, title in titles.items() if title.get_attribute("aria-sort") == order]
        assert sorted_by == [name]
    assert browser.get_log("browser") == []


def test_without_scripts_the_tables_have_no_buttons(browser, page):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        open_page(browser, page, 1280)
        assert browser.find_elements("css selector", "th button") == []
        assert len(browser.find_elements("css selector", "table.sortable tbody tr")) == (3 + 1 + 1) + 2 * (4 + 4 + 20)
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_the_page_prints_within_the_paper(browser, page):
    """A4 without margins is 718 pixels wide."""
    open_page(browser, page, 718, 1000)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert browser.execute_script(TOO_WIDE) == 0
        tables = "return [...document.querySelectorAll('table')].map(e => e.getBoundingClientRect().right)"
        assert max(browser.execute_script(tables)) <= 718
        heights = "return [...document.querySelectorAll('figure')].map(e => e.getBoundingClientRect().height)"
        assert max(browser.execute_script(heights)) < 1000
        assert not browser.find_element("id", "downloads").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert base64.b64decode(browser.print_page()).startswith(b"%PDF")


def test_a_csv_is_saved(browser, page, runs, tmp_path):
    open_page(browser, page, 1280)
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    browser.find_element("partial link text", "s2-nc1.csv").click()
    end = monotonic() + 20
    while not list(tmp_path.glob("*s2-nc1.csv")) and monotonic() < end:
        sleep(0.05)
    (saved,) = tmp_path.glob("*s2-nc1.csv")  # the browser replaces characters that are not allowed in file names
    assert saved.read_bytes() == (runs[1] / "nc1.csv").read_bytes()
