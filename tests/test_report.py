"""report.html shows what the run logged."""

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import CPU_DIST, make_record, write_log
from processes import HANG_SECONDS

from engine import report
from engine.metrics import read_metrics, summarize_run
from engine.report import render_curves, start_record, write_report

NASTY = '</pre><script>document.title="taken"</script><img src="http://example.invalid/x.png">&amp;'
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
QUIET = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
QUIET += ["--headless", "--disable-component-update", "--disable-sync"]
FACTS = {"parameters": "7,000,000", "training data": "<b>5,000</b> examples"}
# Sets the width of the page, then writes to its title the width of the body and the texts that
# wrap. (A window of Chromium cannot be narrower than 500 pixels.)
FIND_BROKEN_LINES = """<script>onload = () => {
  document.documentElement.style.width = "WIDTHpx";
  const broken = [...document.querySelectorAll("h1, h2, dt, dd, th")].filter(element => {
    const range = document.createRange();
    range.selectNodeContents(element);
    return new Set([...range.getClientRects()].map(rect => Math.round(rect.top))).size > 1;
  });
  const texts = broken.map(element => element.textContent);
  document.title = `${document.body.scrollWidth}: ${texts.join()}`;
}</script>"""
BLUE = np.array([0x1F, 0x77, 0xB4]) / 255  # matplotlib's first color
CONFIG = "data_dir: none\nmax_steps: 20\nout_dir: <i>x</i>\ncompile: true\n"


def record(step: int) -> dict:
    """Make a record. Step 13 has the lowest validation loss, but no bits per byte."""
    changes = {"val_loss": 6.5} if step == 13 else {"val_bpb": 3.0 - step / 20}
    return make_record(step, NASTY) | changes


@pytest.fixture
def run(tmp_path):
    """A run folder with 21 records, whose name and samples contain HTML."""
    folder = tmp_path / "run <b> & co"
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG)
    write_log(folder, map(record, range(21)))
    save_facts(folder, FACTS)
    start_record(folder, CPU_DIST, first_step=1, data="ab", tokenizer="cd")
    return folder


def save_facts(run, facts, step=20):
    checkpoint = run / "checkpoints" / "step_000020"
    checkpoint.mkdir(parents=True, exist_ok=True)
    progress = {"step": step, "val_loss": 7.0, "facts": facts}
    (checkpoint / "progress.json").write_text(json.dumps(progress))


class Reader(html.parser.HTMLParser):
    """Collects the tags, the attributes and the samples of a report."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.samples, self.inside = set(), [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        self.inside = ("class", "sample") in attrs
        if self.inside:
            self.samples.append("")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.samples[-1] += data


def test_report_is_complete_and_escaped(run):
    """Every sample appears unchanged, with its HTML escaped. Nothing is loaded from elsewhere. The
    tiles are the lines of the run's summary.
    """
    write_report(run)
    text = (run / "report.html").read_text()
    reader = Reader(text)
    assert reader.samples == [f"{NASTY} at {step}" for step in (0, 10, 20)]
    assert not {"script", "img", "link", "iframe", "b", "i"} & reader.tags
    links = [v for k, v in reader.attributes if k in ("src", "href", "xlink:href")]
    assert all(link.startswith("#") for link in links)
    assert torch.__version__ in text
    assert "<svg" in text
    assert html.unescape(text).count("out_dir: <i>x</i>\ncompile: true\n") == 1
    tiles = re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", text)
    summary = summarize_run(run, run / "checkpoints" / "step_000020")
    assert summary["training data"] == "<b>5,000</b> examples"
    assert [(html.unescape(k), html.unescape(v)) for k, v in tiles] == list(summary.items())


def test_failure_to_write_keeps_the_earlier_report(run, monkeypatch, capsys):
    """If a report cannot be written, one line says why, and the earlier report stays."""
    (run / "report.html").write_text("earlier")

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(report, "write_atomically", full)
    write_report(run)
    assert "report.html: OSError: No space left" in capsys.readouterr().out
    assert (run / "report.html").read_text() == "earlier"


def open_in_browser(page: Path, *flags: str) -> subprocess.CompletedProcess:
    """Open the page in Chromium. Its stdout is the DOM after the scripts have run."""
    profile = f"--user-data-dir={page.with_name('profile')}"
    command = [CHROMIUM, *QUIET, profile, "--dump-dom", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS)


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_report_in_a_browser(run, tmp_path, dark):
    """Light or dark, a browser shows curves and samples, logs nothing and loads no other URL."""
    write_report(run)
    shutil.copy(run / "report.html", tmp_path / "report.html")
    flags = ["--window-size=900,1200", f"--screenshot={tmp_path / 'page.png'}"]
    flags += ["--enable-logging=stderr", f"--log-net-log={tmp_path / 'net.json'}"]
    flags += ["--blink-settings=preferredColorScheme=0"] * dark
    result = open_in_browser(tmp_path / "report.html", *flags)
    assert result.returncode == 0, result.stderr
    assert "CONSOLE" not in result.stderr
    assert "example.invalid" not in (tmp_path / "net.json").read_text()
    assert Reader(result.stdout).samples == [f"{NASTY} at {step}" for step in (0, 10, 20)]
    assert "<title>run &lt;b&gt; &amp; co</title>" in result.stdout
    pixels = matplotlib.image.imread(tmp_path / "page.png")[..., :3]
    assert (np.abs(pixels - BLUE).max(-1) < 0.02).sum() > 200
    assert (np.median(pixels) < 0.3) == dark


@needs_chromium
@pytest.mark.parametrize(("width", "body_width"), [(400, 400), (1200, 992)])
def test_no_heading_or_number_wraps(run, tmp_path, width, body_width):
    """On a phone and on a desktop, no heading, number, label or name of a setting wraps, even with
    the numbers of a large run. Nothing is wider than the page.
    """
    last = record(19_073) | {"val_loss": 2.9, "tokens": 9_999_974_400, "val_bpb": 0.9}
    write_log(run, [*read_metrics(run), last])
    (run / "config.yaml").write_text(f"{CONFIG}hellaswag_normalization_name: {'x' * 500}\n")
    facts = {"parameters": "1,557,611,200", "training data": "9,999,999,999 tokens"}
    save_facts(run, facts, step=19_073)
    write_report(run)
    text = (run / "report.html").read_text()
    policy = re.search('<meta http-equiv="Content-Security-Policy" content=".*?">', text)[0]
    page = tmp_path / "page.html"
    page.write_text(text.replace(policy, FIND_BROKEN_LINES.replace("WIDTH", str(width))))
    shown = open_in_browser(page).stdout
    assert re.search("<title>(.*?)</title>", shown)[1] == f"{body_width}: "


def test_points_have_titles(run):
    """Points of a curve show their step and value on hover. However long the run, a curve has at
    most a hundred of them, the last one included. They lie on the drawn curve.
    """
    records = [{"step": s, "tokens": 64 * s, "train_loss": s} for s in range(3001)]
    for record in records[::30]:
        record["val_loss"] = record["step"] / 1000
    write_log(run, records)
    svg = render_curves(run)
    circles = re.findall('cx="(.*?)" cy="(.*?)" r="5" ?/?><title>(.*?)</title>', svg)
    titles = [title for _, _, title in circles]
    assert "#000000" not in svg  # black is invisible in dark mode
    assert len(titles) == 200
    assert titles[99::100] == [
        "step 3,000: train_loss 2970.5000",  # the mean of 2,941 to 3,000
        "step 3,000: val_loss 3.0000",
    ]
    markers = re.search('<g id="val_loss">(.*?)</g>\\s*</g>', svg, re.DOTALL)[1]
    last = re.findall('<use .*?x="(.*?)" y="(.*?)"', markers)[-1]
    assert [float(v) for v in circles[-1][:2]] == pytest.approx([float(v) for v in last], abs=0.06)
