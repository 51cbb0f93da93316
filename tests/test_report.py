"""report.html: what it shows is what the run logged."""

import html.parser
import json
import re
import shutil
import subprocess

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import CPU

from engine import report
from engine.report import RunFacts, render_curves, write_report

NASTY = '</pre><script>document.title="taken"</script><img src="http://example.invalid/x.png">&amp;'
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
QUIET += ["--headless", "--disable-component-update", "--disable-sync"]
FACTS = RunFacts(7_000_000, 65_536, 42_000, "5,000 examples", 12.5)
# At a given width, puts into the title the width of the body and what breaks over two lines.
# Chromium's windows have at least 500 pixels.
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


CONFIG = """
data_dir: none
max_steps: 20
out_dir: <i>x</i>
compile: true
use_lora: false
lora_load_path: null
loggers: []
log: ""
"""


def record(step: int) -> dict:
    result = {"step": step, "tokens": step * 64, "val_loss": 9.0 - step / 10}
    result |= {"val_loss": 6.5} if step == 13 else {"val_bpb": 3.0 - step / 20}
    if step:
        result |= {"train_loss": 9.5 - step / 10, "grad_norm": 1.5, "lr": step * 1e-3, "mfu": None}
        result |= {"tokens_per_s": 128.0, "step_ms": 500.0, "peak_memory_gb": 0.5 + step / 100}
    return result | ({"samples": [f"{NASTY} at {step}"]} if step % 10 == 0 else {})


@pytest.fixture
def run(tmp_path):
    """A run folder with 21 records, whose name and samples contain HTML."""
    folder = tmp_path / "run <b> & co"
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG)
    lines = [json.dumps(record(step)) + "\n" for step in range(21)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


class Reader(html.parser.HTMLParser):
    """Collects the tags, the attributes and the samples of a report."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.samples, self.inside = set(), [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        self.inside = tag == "pre"
        if self.inside:
            self.samples.append("")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.samples[-1] += data


def test_report_is_complete_and_escaped(run):
    """Every sample appears unchanged and escaped, nothing is loaded from elsewhere, and the
    figures are those of the log.
    """
    write_report(run, CPU, FACTS)
    text = (run / "report.html").read_text()
    reader = Reader(text)
    assert reader.samples == [f"{NASTY} at {step}" for step in (0, 10, 20)]
    assert not {"script", "img", "link", "iframe", "b", "i"} & reader.tags
    links = [v for k, v in reader.attributes if k in ("src", "href", "xlink:href")]
    assert all(link.startswith("#") for link in links)
    assert torch.__version__ in text
    assert 'id="curves"' in text
    assert 'id="hellaswag"' not in text  # it was not measured


def read_tiles(run) -> dict[str, str]:
    return dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", (run / "report.html").read_text()))


def test_figures_of_a_report(run):
    """The figures are those of the log, of the config, and of the facts."""
    write_report(run, CPU, FACTS)
    assert read_tiles(run) == {
        "validation loss": "9.0000 to 7.0000",
        "best validation loss": "6.5000 at step 13",
        "validation bits per byte": "3.0000 to 2.0000",
        "parameters": "7,000,000",
        "trainable parameters": "65,536",
        "data": "none",
        "training data": "5,000 examples",
        "epochs": "1.60",  # 20 steps / 12.5
        "tokens trained on": "1,280",
        "training FLOPs": "5.38e7",  # 42,000 x 1,280
        "throughput, median": "128 tokens/s",
        "wall-clock time of training steps": "0:00:10",
        "peak memory": "0.70 GB",
    }
    write_report(run, CPU, FACTS._replace(n_trainable=7_000_000))
    assert "trainable parameters" not in read_tiles(run)


@pytest.mark.parametrize(
    ("config", "expected"),
    [("data_dir: {folder}", "stdlib"), ("data_dir: mine", "mine"), ("data: a.jsonl", "a.jsonl")],
)
def test_the_data_set_has_its_name(run, config, expected):
    """The data set is called as in the manifest, else as in the config."""
    (run / "manifest.json").write_text(json.dumps({"dataset": "stdlib", "shards": []}))
    (run / "config.yaml").write_text(f"max_steps: 20\n{config.format(folder=run)}\n")
    write_report(run, CPU, FACTS)
    assert read_tiles(run)["data"] == expected


def test_settings_are_shown_as_in_yaml(run):
    """The table of settings has YAML's null, true, false and ''."""
    write_report(run, CPU, FACTS)
    rows = dict(re.findall("<th>(.*?)</th><td>(.*?)</td>", (run / "report.html").read_text()))
    values = ["none", "20", "&lt;i&gt;x&lt;/i&gt;", "true", "false", "null", "[]", "&#x27;&#x27;"]
    assert list(rows.values())[:8] == values


def test_hellaswag_has_a_table(run):
    """The last accuracy that was measured stands beside the quoted ones."""
    with (run / "metrics.jsonl").open("a") as file:
        for step, accuracy in ((21, 0.25), (22, 0.27)):
            measured = {"hellaswag_acc": 0.26, "hellaswag_acc_norm": accuracy}
            file.write(json.dumps(record(step) | measured) + "\n")
    write_report(run, CPU, FACTS)
    text = (run / "report.html").read_text()
    assert "acc_norm 0.2700, acc 0.2600 (measured at step 22)" in text
    assert "0.3114" in text


def test_failure_to_write_keeps_the_earlier_report(run, monkeypatch, capsys):
    """An error is printed in one line, and the earlier report stays."""
    write_report(run, CPU, FACTS)
    before = (run / "report.html").read_bytes()

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(report, "write_atomically", full)
    write_report(run, CPU, FACTS)
    assert "is not written: OSError: No space left" in capsys.readouterr().out
    assert (run / "report.html").read_bytes() == before


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("dark", [False, True])
def test_report_in_a_browser(run, tmp_path, dark):
    """A browser opens the report without console messages and without requests, and shows the
    curves and the samples, in light and dark mode.
    """
    write_report(run, CPU, FACTS)
    shutil.copy(run / "report.html", tmp_path / "report.html")
    result = subprocess.run(
        [CHROMIUM, *QUIET, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=900,1200"]
        + ["--enable-logging=stderr", f"--log-net-log={tmp_path / 'net.json'}", "--dump-dom"]
        + [f"--screenshot={tmp_path / 'page.png'}"]
        + ["--blink-settings=preferredColorScheme=0"] * dark
        + [(tmp_path / "report.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert "CONSOLE" not in result.stderr
    assert "example.invalid" not in (tmp_path / "net.json").read_text()
    assert Reader(result.stdout).samples == [f"{NASTY} at {step}" for step in (0, 10, 20)]
    assert "<title>run &lt;b&gt; &amp; co</title>" in result.stdout
    pixels = matplotlib.image.imread(tmp_path / "page.png")[..., :3]
    assert (np.abs(pixels - BLUE).max(-1) < 0.02).sum() > 200
    assert (np.median(pixels) < 0.3) == dark


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize(("width", "body_width"), [(400, 400), (1200, 992)])
def test_nothing_breaks_over_two_lines(run, tmp_path, width, body_width):
    """On a phone and on a screen, headings, figures, their labels and names of settings are on one
    line each, with the figures of a large run as well, and nothing is wider than the page.
    """
    last = record(19_073) | {"val_loss": 2.9, "tokens": 9_999_974_400, "val_bpb": 0.9}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(last) + "\n")
    (run / "config.yaml").write_text(f"{CONFIG}hellaswag_normalization_name: {'x' * 500}\n")
    write_report(
        run, CPU, FACTS._replace(n_params=1_557_611_200, epoch_size="9,999,999,999 tokens")
    )
    text = (run / "report.html").read_text()
    policy = f'<meta http-equiv="Content-Security-Policy" content="{report.POLICY}">'
    assert policy in text
    (tmp_path / "page.html").write_text(
        text.replace(policy, FIND_BROKEN_LINES.replace("WIDTH", str(width)))
    )
    page, profile = (tmp_path / "page.html").as_uri(), tmp_path / "profile"
    result = subprocess.run(
        [CHROMIUM, *QUIET, f"--user-data-dir={profile}", "--dump-dom", page],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert re.search("<title>(.*?)</title>", result.stdout)[1] == f"{body_width}: "


def test_points_have_titles(run):
    """A browser shows steps and values at points of the curves, the last ones included. However
    long the run, there are at most a hundred for each curve, at the places of the drawn points.
    """
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(3001):
            logged = {"step": step, "tokens": 64 * step, "train_loss": step}
            logged |= {"val_loss": step / 1000} if step % 30 == 0 else {}
            file.write(json.dumps(logged) + "\n")
    html = render_curves(run)
    circles = re.findall('cx="(.*?)" cy="(.*?)" r="5" ?/?><title>(.*?)</title>', html)
    titles = [title for _, _, title in circles]
    assert "#000000" not in html  # black is invisible in dark mode
    assert len(titles) == 200
    assert titles[99::100] == [
        "step 3,000: running mean of the training loss 2970.5000",  # of 2,941 to 3,000
        "step 3,000: validation loss 3.0000",
    ]
    markers = re.search('<g id="val_loss">(.*?)</g>\\s*</g>', html, re.DOTALL)[1]
    last = re.findall('<use .*?x="(.*?)" y="(.*?)"', markers)[-1]
    assert [float(v) for v in circles[-1][:2]] == pytest.approx([float(v) for v in last], abs=0.06)
