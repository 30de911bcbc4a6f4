"""The page: whole by itself, every number with its address, and drawn by a real browser."""

import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from listed import curve, lines, written

from results import report

HEADLESS = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def page(tmp_path):
    runs = [lines(f"cifar10_small_{cell}", [60.0 + k, 61.5 + k]) for k, cell in enumerate(("sgp", "slowmo_sgp", "ar_sgd"))]
    runs += [lines("cifar10_small_osgp", [1.0]), lines("cifar10_small_osgp", [2.0], commit="f" * 40)]
    curves = [curve(f"cifar10_small_{cell}", seed) for cell in ("sgp", "slowmo_sgp", "ar_sgd") for seed in (1, 2)]
    path = written(tmp_path, *runs, curves=curves)
    report.main(path)
    return tmp_path / "report.html"


def test_it_is_whole(page):
    text = page.read_text()
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//|@import|url\(""", text)
    assert "counted nowhere; delete all but one" in text  # what was left out is on the page
    row = re.search(r"<tr><td>AR-SGD</td><td>420</td>(.*?)</tr>", text)[1]  # Table 2 beside the model
    assert row.count("<td>") == 4 and "Not measured on links yet" in text

    class Tags(HTMLParser):
        def __init__(self):
            super().__init__()
            self.cells, self.title = [], None

        def handle_starttag(self, tag, attributes):
            self.title = dict(attributes).get("title") if tag == "td" else self.title

        def handle_data(self, data):
            if re.fullmatch(r"\d+\.\d+ ± .*", data):
                self.cells.append((data, self.title))

    tags = Tags()
    tags.feed(text)
    assert len(tags.cells) > 5
    for number, title in tags.cells:
        assert "commit 0123456789" in title and "seed 1, 2" in title, number


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine (Debian: apt install chromium)")
def test_a_browser_draws_it(page, tmp_path):
    def chromium(*words):
        command = [CHROMIUM, *HEADLESS, f"--user-data-dir={tmp_path}/profile", "--enable-logging=stderr", *words, page.as_uri()]
        environment = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG")}
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)

    done = chromium("--dump-dom")
    assert 'data-drawn="3"' in done.stdout and done.stdout.count('class="curve"') == 3
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]  # a script's error
    for width in (390, 1280):
        picture = tmp_path / f"{width}.png"
        chromium(f"--screenshot={picture}", f"--window-size={width},2000", "--hide-scrollbars")
        assert picture.stat().st_size > 20_000
    chromium(f"--print-to-pdf={tmp_path}/page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine (Debian: apt install chromium)")
def test_on_a_phone_nothing_sticks_out(page, tmp_path):
    """The page is never wider than the window: wide tables scroll by themselves."""
    # headless windows are at least 500 wide: a frame of a phone's width stands for it
    frame = tmp_path / "phone.html"
    frame.write_text(f'<iframe width=390 height=800 src="{page.name}"></iframe><script>onload = () => document.title = '
                     "frames[0].document.documentElement.scrollWidth</script>")  # fmt: skip
    words = [f"--user-data-dir={tmp_path}/profile", "--allow-file-access-from-files", "--dump-dom", frame.as_uri()]
    command = [CHROMIUM, *HEADLESS, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    (width,) = re.findall(r"<title>(\d+)</title>", done.stdout)
    assert int(width) <= 390
