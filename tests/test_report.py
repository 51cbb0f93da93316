"""loss.png and report.html: what they show is what the run logged."""

import html.parser
import json
import shutil
import subprocess

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import CPU, expect_error, run_script

from engine import report
from engine.report import draw_runs, find_gpt2_loss, plot_runs, render_curves, write_report

NASTY = '</pre><script>document.title="taken"</script><img src="http://example.invalid/x.png">&amp;'
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
BLUE = np.array([0x1F, 0x77, 0xB4]) / 255  # matplotlib's first color


def record(step: int) -> dict:
    result = {"step": step, "tokens": step * 64, "val_loss": 9.0 - step / 10}
    if step:
        result |= {"train_loss": 9.5 - step / 10, "grad_norm": 1.5, "lr": step * 1e-3, "mfu": None}
        result |= {"tokens_per_s": 128.0, "step_ms": 500.0, "peak_memory_gb": 0.5 + step / 100}
    return result | ({"samples": [f"{NASTY} at {step}"]} if step % 10 == 0 else {})


@pytest.fixture
def run(tmp_path):
    """A run folder with 21 records, whose name and samples contain HTML."""
    folder = tmp_path / "run <b> & co"
    folder.mkdir()
    (folder / "config.yaml").write_text("data_dir: none\nmax_steps: 20\nout_dir: <i>x</i>\n")
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
    write_report(run, CPU)
    text = (run / "report.html").read_text()
    reader = Reader(text)
    assert reader.samples == [f"{NASTY} at {step}" for step in (0, 10, 20)]
    assert not {"script", "img", "link", "iframe", "b", "i"} & reader.tags
    links = [v for k, v in reader.attributes if k in ("src", "href", "xlink:href")]
    assert all(link.startswith("#") for link in links)
    for expected in ("9.0000 to 7.0000", "1,280", "128 tokens/s", "0:00:10", "0.70 GB", "0.3114"):
        assert expected in text
    assert torch.__version__ in text


def test_failure_to_write_keeps_the_earlier_report(run, monkeypatch, capsys):
    """An error is printed in one line, and the earlier report stays."""
    write_report(run, CPU)
    before = (run / "report.html").read_bytes()

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(report, "write_atomically", full)
    write_report(run, CPU)
    assert "is not written: OSError: No space left" in capsys.readouterr().out
    assert (run / "report.html").read_bytes() == before


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("dark", [False, True])
def test_report_in_a_browser(run, tmp_path, dark):
    """A browser opens the report without console messages and without requests, and shows the
    curves and the samples, in light and dark mode.
    """
    write_report(run, CPU)
    shutil.copy(run / "report.html", tmp_path / "report.html")
    quiet = "--no-first-run --disable-background-networking --disable-component-update"
    result = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", *quiet.split()]
        + ["--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=900,1200"]
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


def test_curves_over_tokens_and_seconds(run):
    """The same losses are drawn over steps, tokens, or the sum of the step times."""
    for x, last in (("step", 20), ("tokens", 1280), ("seconds", 10.0)):
        line = draw_runs([run], x).axes[0].lines[0]  # the training loss
        assert line.get_xdata()[-1] == pytest.approx(last)
        assert list(line.get_ydata()) == [9.5 - s / 10 for s in range(1, 21)]
    labels = [axes.get_ylabel() for axes in draw_runs([run], more=report.REPORT_PANELS).axes]
    assert labels == ["loss, nats per token", *report.REPORT_PANELS.values()]
    assert "#000000" not in render_curves(run)  # black is invisible in dark mode


def test_plot_command(run):
    """--out names the image. Another suffix, or no run, is an error."""
    result = run_script("plot.py", run, "--x", "tokens", "--out", "a.svg", cwd=run)
    assert result.returncode == 0, result.stderr
    assert "<svg" in (run / "a.svg").read_text()
    assert "expected a name ending in .png" in expect_error(
        "plot.py", run, "--out", "a.doc", cwd=run
    )
    expect_error("plot.py", cwd=run)


def test_gpt2_loss_depends_on_the_data(tmp_path):
    """GPT-2's validation loss is drawn for runs on FineWeb and on FineWeb-Edu, each with its own,
    and for no other data.
    """
    for dataset, loss in (("fineweb", 3.4250), ("fineweb-edu", 3.2924), ("stdlib", None)):
        (tmp_path / "manifest.json").write_text(json.dumps({"dataset": dataset, "shards": []}))
        (tmp_path / "config.yaml").write_text(f"data_dir: {tmp_path}\n")
        assert find_gpt2_loss(tmp_path) == loss


def test_hellaswag_has_its_own_panel(tmp_path, monkeypatch):
    """A run that measured HellaSwag gets a second panel with the quoted accuracies and their
    metrics; another run does not.
    """
    figures = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure)
    )
    (tmp_path / "config.yaml").write_text("data_dir: none\n")
    logged = {"step": 1, "tokens": 10, "train_loss": 3.0, "val_loss": 3.0}
    for extra in ({}, {"hellaswag_acc_norm": 0.25, "hellaswag_acc": 0.25}):
        (tmp_path / "metrics.jsonl").write_text(json.dumps(logged | extra) + "\n")
        plot_runs([tmp_path], tmp_path / "loss.png")
    assert [len(figure.axes) for figure in figures] == [1, 2]
    labels = " ".join(text.get_text() for text in figures[1].axes[1].get_legend().get_texts())
    for expected in (
        "acc_norm 0.2500",
        "acc_norm 0.3114",
        "0.2955",
        "GPT-3 Small, token-normalised",
    ):
        assert expected in labels


def test_each_run_has_its_color_in_all_panels(run, tmp_path):
    """Several runs are drawn in the order given, each in one color, with its name in the legend."""
    other = tmp_path / "{other}"
    shutil.copytree(run, other)
    panels = draw_runs([run, other], more=report.REPORT_PANELS).axes
    labels = [text.get_text() for text in panels[0].get_legend().get_texts()]
    splits = ("train 7.500", "val 7.000")
    assert labels == [f"{folder.name} {split}" for folder in (run, other) for split in splits]
    assert [line.get_color() for line in panels[0].lines] == ["C0", "C0", "C1", "C1"]
    for panel in panels[1:]:
        assert [line.get_color() for line in panel.lines] == ["C0", "C1"]
