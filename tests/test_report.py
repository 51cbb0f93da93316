"""The page, the loggers and the pictures of a run."""

import html.parser
import json
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from test_commands import fails
from test_commands import run as run_command

import page
from checkpoint import read_metrics
from page import curves, write_page
from plot import draw_runs
from report import Report
from runtime import Distributed, peak_memory
from train_gpt2 import PretrainConfig

CPU = Distributed(rank=0, world_size=1, device=torch.device("cpu"))
NASTY = '</pre><script>document.title="taken"</script><img src="http://example.invalid/x.png">&amp;'
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
BLUE = np.array([0x1F, 0x77, 0xB4]) / 255  # of matplotlib's first curve


def record(step: int) -> dict:
    result = {"step": step, "tokens": step * 64, "val_loss": 9.0 - step / 10}
    if step:
        result |= {"train_loss": 9.5 - step / 10, "grad_norm": 1.5, "lr": step * 1e-3, "mfu": None}
        result |= {"tokens_per_s": 128.0, "step_ms": 500.0, "peak_memory_gb": 0.5 + step / 100}
    return result | ({"samples": [f"{NASTY} at {step}"]} if step % 10 == 0 else {})


@pytest.fixture
def run(tmp_path):
    """A run folder with 21 records, whose name and samples are HTML."""
    folder = tmp_path / "run <b> & co"
    folder.mkdir()
    (folder / "config.yaml").write_text("data_dir: none\nmax_steps: 20\nout_dir: <i>x</i>\n")
    lines = [json.dumps(record(step)) + "\n" for step in range(21)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


class Reader(html.parser.HTMLParser):
    """The tags, attributes and the text of samples that a page has."""

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


def test_page_is_whole_and_escaped(run):
    """Every sample reads as it was, none of its HTML is HTML, nothing is loaded from elsewhere, and
    the figures are those of the log.
    """
    write_page(run, CPU)
    text = (run / "report.html").read_text()
    reader = Reader(text)
    assert reader.samples == [f"{NASTY} at {step}" for step in (0, 10, 20)]
    assert not {"script", "img", "link", "iframe", "b", "i"} & reader.tags
    links = [v for k, v in reader.attributes if k in ("src", "href", "xlink:href")]
    assert all(link.startswith("#") for link in links)
    for expected in ("9.0000 to 7.0000", "1,280", "128 tokens/s", "0:00:10", "0.70 GB", "0.3114"):
        assert expected in text
    assert torch.__version__ in text


def test_a_page_that_fails_costs_nothing(run, monkeypatch, capsys):
    """An error in writing the page is one line, and the earlier page stays."""
    write_page(run, CPU)
    before = (run / "report.html").read_bytes()

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(page, "write_atomically", full)
    write_page(run, CPU)
    assert "is not written: OSError: No space left" in capsys.readouterr().out
    assert (run / "report.html").read_bytes() == before


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize("dark", [False, True])
def test_page_in_a_browser(run, tmp_path, dark):
    """A browser opens the page without a message on its console and without a request, and shows
    the curves and the samples, light and dark.
    """
    write_page(run, CPU)
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
    """The same losses are drawn over steps, tokens, or the sum of the steps' times."""
    for x, last in (("step", 20), ("tokens", 1280), ("seconds", 10.0)):
        line = draw_runs([run], x).axes[0].lines[0]  # the training loss
        assert line.get_xdata()[-1] == pytest.approx(last)
        assert list(line.get_ydata()) == [9.5 - s / 10 for s in range(1, 21)]
    labels = [axes.get_ylabel() for axes in draw_runs([run], more=page.CURVES).axes]
    assert labels == ["loss, nats per token", *page.CURVES.values()]
    assert "#000000" not in curves(run)  # black would not be seen on a dark page


def test_plot_command(run):
    """--out names the picture; an ending that is no picture's, or no run, is an error."""
    result = run_command("plot.py", run, "--x", "tokens", "--out", "a.svg", cwd=run)
    assert result.returncode == 0, result.stderr
    assert "<svg" in (run / "a.svg").read_text()
    assert "expected a name ending in .png" in fails("plot.py", run, "--out", "a.doc", cwd=run)
    fails("plot.py", cwd=run)


def log_steps(folder, log, steps, start=0):
    report = Report(folder, 20, CPU, start, log)
    for step in steps:
        report.step(record(step))
    for logger in report.loggers.values():
        logger.close()
    return report


@pytest.mark.parametrize("begin", ["tensorboard", ""])
def test_tensorboard_equals_the_log(tmp_path, begin):
    """TensorBoard's own reader finds each number of metrics.jsonl once, in a run that was stopped
    and goes on from an earlier step, also where the logger is only asked for then.
    """
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    (tmp_path / "config.yaml").write_text("max_steps: 20\n")
    log_steps(tmp_path, begin, range(13))
    log = tmp_path / "metrics.jsonl"  # killed between the logger and the log: step 12 comes again
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    log_steps(tmp_path, "tensorboard", range(11, 21), start=10)
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"), {"scalars": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    for key in ("train_loss", "val_loss", "grad_norm", "lr", "tokens", "tokens_per_s"):
        expected = [(r["step"], r[key]) for r in read_metrics(tmp_path) if r.get(key) is not None]
        if key in tags["scalars"]:
            found = [(e.step, e.value) for e in events.Scalars(key)]
        else:  # in double precision
            found = [
                (
                    e.step,
                    float(
                        e.tensor_proto.double_val[0]
                        if e.tensor_proto.double_val
                        else np.frombuffer(e.tensor_proto.tensor_content)[0]
                    ),
                )
                for e in events.Tensors(key)
            ]
        assert [step for step, _ in found] == [step for step, _ in expected], key
        assert [v for _, v in found] == pytest.approx([v for _, v in expected], rel=1e-6)
    texts = events.Tensors("sample_1/text_summary")
    assert [e.step for e in texts] == [0, 10, 20]
    assert NASTY in texts[0].tensor_proto.string_val[0].decode()


def test_wandb_goes_on_with_the_same_run(tmp_path, monkeypatch):
    """Offline, a run that goes on has the id of before."""
    pytest.importorskip("wandb", reason="needs wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "config.yaml").write_text("max_steps: 20\n")
    log_steps(tmp_path, "wandb", range(3))
    name = (tmp_path / "wandb_id").read_text()
    log_steps(tmp_path, "wandb", range(2, 5), start=1)
    assert (tmp_path / "wandb_id").read_text() == name
    assert {f.name for f in tmp_path.glob("wandb/offline-run-*/*.wandb")} == {f"run-{name}.wandb"}


def test_a_logger_that_fails_is_turned_off(tmp_path, monkeypatch, capsys):
    """What a logger raises is one line; the log goes on without it."""

    class Failing:
        def __init__(self, run):
            self.calls = 0

        def write(self, record):
            self.calls += 1
            raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules["report"].LOGGERS, "tensorboard", Failing)
    monkeypatch.setattr("report.logger_names", lambda log: [log] if log else [])
    assert log_steps(tmp_path, "tensorboard", range(4)).loggers == {}
    assert capsys.readouterr().out.count("logging to tensorboard is off from here on") == 1
    assert [r["step"] for r in read_metrics(tmp_path)] == [0, 1, 2, 3]


def test_unknown_or_missing_logger(tmp_path, monkeypatch):
    """A name that is none, and a package that is not there (a folder of its name is not it), are
    refused before anything is written, the latter with the line that installs it.
    """
    with pytest.raises(ValueError, match="log is tensorbord, expected tensorboard, wandb"):
        PretrainConfig(log="tensorbord")
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ValueError, match=r"pip install -r requirements-extra\.txt"):
        PretrainConfig(log="wandb")


def test_peak_memory_is_the_kernels():
    """The peak of this process is what the kernel says, in bytes."""
    try:
        text = Path("/proc/self/status").read_text()
    except FileNotFoundError:
        pytest.skip("no /proc on this system")
    kib = int(text.split("VmHWM:")[1].split()[0])
    assert peak_memory(CPU.device) == pytest.approx(kib * 1024, rel=0.05)
