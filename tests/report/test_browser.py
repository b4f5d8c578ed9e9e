"""The page in a browser: its table works, it complains of nothing and fetches nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest

from editkit.report.page import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-default-apps", "--disable-extensions", "--hide-scrollbars",
    "--disable-features=NetworkTimeServiceQuerying",
    "--enable-logging=stderr", "--virtual-time-budget=4000",
)  # fmt: skip
BROWSERS_OWN = r"^https?://[\w.-]*\.(google|googleapis|gvt1)\.com/"  # clocks and updates
# what a reader does, as events; what is then seen is written behind the page
DEEDS = """
<script>
const seen = {}, id = (name) => document.getElementById(name);
const cells = (name) => [...document.querySelectorAll(`#failed-table td[data-label=${name}]`)]
  .map((cell) => cell.textContent);
const say = (name) => { seen[name] = { count: id("failed-count").textContent,
  page: id("failed-page").textContent, edit: cells("edit"), kind: cells("kind"),
  prompt: cells("prompt"), hash: location.hash }; };
const set = (control, value, event) => {
  control.value = value; control.dispatchEvent(new Event(event, { bubbles: true })); };
say("first");
id("failed-next").click(); say("next");
set(document.querySelector("[data-column=kind]"), "locality", "change"); say("kind");
set(id("failed-text"), "capital of 7 ", "input"); say("text");
id("failed-clear").click(); say("clear");
const head = document.querySelector("th[data-column=edit]");
head.firstElementChild.click(); head.firstElementChild.click(); say("sorted");
seen.order = head.getAttribute("aria-sort");
id("failed-elsewhere").click(); say("elsewhere");
seen.fetched = performance.getEntriesByType("resource").map((entry) => entry.name);
document.body.append(Object.assign(document.createElement("pre"),
  { id: "seen", textContent: JSON.stringify(seen) }));
</script>
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Open a file and return its document and what the browser logged; one run takes seconds."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")

    def run(url, *flags):
        profile = tmp_path_factory.mktemp("profile")
        command = [found, *FLAGS, f"--user-data-dir={profile}", *flags, url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout, done.stderr

    return run


@pytest.fixture(scope="module")
def folders(tmp_path_factory, run_maker):
    make_run = run_maker(tmp_path_factory.mktemp("runs"))
    return [make_run("first", right=0.5), make_run("second", right=0.4, seed=1)]


@pytest.fixture(scope="module")
def path(folders):
    return write_report(folders)


@pytest.fixture(scope="module")
def failed(folders, run_maker):
    """Rows of both runs that fail, in the order of the page."""
    return [
        {**row, "run": folder.name}
        for folder in folders
        for row in run_maker.read(folder)
        if row["moment"] == "final" and row["scores"]["generation"] < 1
    ]


@pytest.fixture(scope="module")
def opened(browser, path, tmp_path_factory):
    """What is seen of the page while a reader uses it, what is logged, and what is asked for."""
    copy, log = path.with_name("used.html"), tmp_path_factory.mktemp("log") / "net.json"
    copy.write_text(path.read_text().replace("</body>", DEEDS + "</body>"))
    document, logged = browser(copy.as_uri(), f"--log-net-log={log}", "--dump-dom")
    seen = re.search(r'<pre id="seen">(.*?)</pre>', document, re.DOTALL)
    assert seen, "the page's script did not run to its end"
    text = seen[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    return json.loads(text), logged, log.read_text()


def test_the_first_page_of_failed_probes_is_there(opened, failed):
    first = opened[0]["first"]
    assert first["count"] == f"{len(failed)} of {len(failed)} failed probes"
    assert first["prompt"] == [row["prompt"] for row in failed[:25]]
    assert opened[0]["next"]["prompt"] == [row["prompt"] for row in failed[25:50]]


def test_filters_leave_what_they_name(opened, failed):
    local = [row for row in failed if row["kind"] == "locality"]
    shown = opened[0]["kind"]
    assert shown["count"] == f"{len(local)} of {len(failed)} failed probes"
    assert set(shown["kind"]) == {"locality"}
    assert shown["page"].startswith("page 1 ")  # a filter goes back to the first page
    words = [row for row in local if {"capital", "of", "7"} <= set(row["prompt"].split())]
    both = opened[0]["text"]
    assert all("7" in prompt for prompt in both["prompt"])
    assert len(both["prompt"]) >= len(words)
    assert opened[0]["clear"]["count"] == opened[0]["first"]["count"]


def test_a_column_sorts_by_number_both_ways(opened, failed):
    edits = sorted((row["edit_id"] for row in failed), reverse=True)
    assert [int(edit) for edit in opened[0]["sorted"]["edit"]] == edits[:25]
    assert opened[0]["order"] == "descending"


def test_probes_that_only_one_run_fails_can_be_singled_out(opened, failed):
    names = [(row["probe_id"], row["kind"]) for row in failed]
    alone = [name for name in names if names.count(name) == 1]
    assert opened[0]["elsewhere"]["count"].startswith(f"{len(alone)} of ")


def test_the_console_stays_silent_and_nothing_is_fetched(opened):
    seen, logged, requests = opened
    assert not [line for line in logged.splitlines() if "CONSOLE" in line]
    assert seen["fetched"] == []
    asked = set(re.findall(r'"url":\s*"((?:https?|wss?|ftp):[^"]*)"', requests))
    assert not {url for url in asked if not re.search(BROWSERS_OWN, url)}


def test_an_address_keeps_what_was_chosen(browser, opened, path, failed):
    assert "sort=-edit" in opened[0]["sorted"]["hash"]
    chosen = [row for row in failed if (row["kind"], row["run"]) == ("reliability", "second")]
    address = path.as_uri() + "#failed?kind=reliability&run=second&sort=prompt"
    document, _ = browser(address, "--dump-dom")
    count = re.search(r'id="failed-count"[^>]*>([^<]*)<', document)[1]
    assert count == f"{len(chosen)} of {len(failed)} failed probes"
    prompts = re.findall(r'<td data-label="prompt">([^<]*)</td>', document)
    assert prompts == sorted(row["prompt"] for row in chosen)[:25]


def test_the_page_is_as_wide_as_the_screen_on_a_phone_and_on_a_desk(browser, path, tmp_path):
    tell = "<script>parent.postMessage([innerWidth, document.documentElement.scrollWidth], '*')"
    inner = path.with_name("inner.html")
    inner.write_text(path.read_text().replace("</body>", f"{tell}</script></body>"))
    frames = "".join(
        f'<iframe src="{inner.as_uri()}" style="width:{width}px;height:800px;border:0"></iframe>'
        for width in (360, 1280)  # a window has a least width, a frame has none
    )
    frame = tmp_path / "frame.html"
    listen = "onmessage = (event) => document.body.append(`${event.data};`)"
    frame.write_text(f"<body><script>{listen}</script>{frames}</body>")
    document, _ = browser(frame.as_uri(), "--dump-dom", "--window-size=1400,900")
    widths = {tuple(map(int, pair)) for pair in re.findall(r"(\d+),(\d+);", document)}
    assert widths == {(360, 360), (1280, 1280)}
