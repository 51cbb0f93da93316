"""report.html of a run."""

import importlib.metadata
import io
import itertools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from datetime import datetime, timedelta
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from engine.checkpoint import read_run_config
from engine.curves import HELLASWAG, curve_points, draw_runs
from engine.distributed import Distributed
from engine.files import write_atomically
from engine.metrics import read_metrics
from engine.shards import read_manifest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What the report shows on hover, for at most MAX_TITLES points of a curve.
TITLES = {
    "train_loss": "running mean of the training loss",
    "val_loss": "validation loss",
    "hellaswag_acc_norm": "HellaSwag acc_norm",
}
MAX_TITLES = 100
SVG_DPI = 72  # of matplotlib's SVG
REPORT_PANELS = {"lr": "learning rate", "grad_norm": "gradient norm", "tokens_per_s": "tokens/s"}
PACKAGES = ("numpy", "transformers", "tiktoken")
STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --paper: #ffffff; --soft: #f2f4f6;
  --faint: #5d6670; --line: #d9dee3; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ea; --paper: #15181b; --soft: #1f2428; --faint: #9aa4ad; --line: #353c43; } }
body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
h1 { margin: 0; } h2 { margin: 2.5rem 0 .75rem; font-size: 1.25rem; }
p { margin: .25rem 0; } .faint, th, dt { color: var(--faint); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr));
  gap: .75rem; margin: 1.5rem 0 .75rem; }
dl div, pre { padding: .6rem .9rem; border-radius: .4rem; background: var(--soft); }
dt { font-size: .85rem; } dd { margin: 0; font-size: 1.1rem; font-weight: 600;
  overflow-wrap: anywhere; } h1 { overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; } tr { border-bottom: 1px solid var(--line); }
th, td { padding: .3rem 1.5rem .3rem 0; text-align: left; vertical-align: top; font-weight: 400; }
th { width: 1%; white-space: nowrap; } td { overflow-wrap: anywhere; }
pre { margin: .25rem 0 1rem; max-height: 20rem; overflow-y: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: .85rem; }
.wide { overflow-x: auto; } svg { width: 100%; min-width: 36rem; height: auto; }
svg text { fill: currentColor; }
circle { fill: transparent; } circle:hover { stroke: currentColor; }
"""
ROOT = Path(__file__).parents[1]
POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # the browser blocks scripts and requests


class RunFacts(NamedTuple):
    """What the report shows and a run folder does not have."""

    n_params: int
    n_trainable: int
    flops_per_token: int  # forward and backward
    epoch_size: str  # tokens or examples
    steps_per_epoch: float


def write_report(run: Path, dist: Distributed, facts: RunFacts) -> None:
    """Write RUN/report.html. A failure is printed; it never ends the run."""
    path = run / "report.html"
    try:
        write_atomically(path, render_report(run, collect_environment(dist), facts).encode())
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        print(f"{path} is not written: {type(error).__name__}: {error}", flush=True)


def collect_environment(dist: Distributed) -> dict[str, str]:
    """The command, hardware and versions of this process."""
    if dist.device.type == "cuda":
        device = torch.cuda.get_device_name(dist.device)
    else:
        device = f"{dist.device.type}, {platform.machine()}, {os.cpu_count()} cores"
    return {
        "command": shlex.join(["python", *sys.argv]),
        "written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "devices": f"{dist.world_size} x {device}",
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,  # with the version of CUDA
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "git commit": read_git_commit(),
    }


def read_git_commit() -> str:
    """This project's commit, with -dirty if tracked files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.check_output(
            command, cwd=ROOT, stderr=subprocess.DEVNULL, text=True
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return "none: not a git checkout"


def render_report(run: Path, environment: dict[str, str], facts: RunFacts) -> str:
    """The report as one self-contained HTML file. All text from the run is escaped."""
    log, config = read_metrics(run), read_run_config(run)
    name = escape(run.resolve().name)
    note = '<p class="faint">The environment of the process that wrote this report.</p>'
    body = ""
    for title, content in (
        ("Curves", render_curves(run)),
        ("HellaSwag", render_table(compare_hellaswag(log))),
        ("Samples", render_samples(log)),
        ("Config", render_table({name: show_as_yaml(value) for name, value in config.items()})),
        ("Environment", render_table(environment) + note),
    ):
        if content:
            body += f'<section id="{title.lower()}"><h2>{title}</h2>{content}</section>'
    progress = f"step {log[-1]['step']:,} of {config.get('max_steps'):,}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><h1>{name}</h1>"
        f'<p class="faint">{progress}</p>{render_facts(summarize(log, config, facts))}{body}'
        "</body></html>\n"
    )


def summarize(log: list[dict], config: dict, facts: RunFacts) -> dict[str, str]:
    """The main figures of the run; those that were not logged are left out."""
    keys = ("val_loss", "val_bpb", "tokens_per_s", "mfu", "step_ms", "peak_memory_gb")
    steps, losses = curve_points(log, "val_loss", "step")
    bpb, speeds, mfu, step_ms, peak_gb = (curve_points(log, key, "step")[1] for key in keys[1:])
    rows = {}
    if losses:
        best, step = min(zip(losses, steps, strict=True))
        rows["validation loss"] = f"{losses[0]:.4f} to {losses[-1]:.4f}"
        rows["best validation loss"] = f"{best:.4f} at step {step:,}"
    if bpb:
        rows["validation bits per byte"] = f"{bpb[0]:.4f} to {bpb[-1]:.4f}"
    rows["parameters"] = f"{facts.n_params:,}"
    if facts.n_trainable != facts.n_params:
        rows["trainable parameters"] = f"{facts.n_trainable:,}"
    rows["data"] = find_dataset(config)
    rows["training data"] = facts.epoch_size
    rows["epochs"] = f"{log[-1]['step'] / facts.steps_per_epoch:.2f}"
    rows["tokens trained on"] = f"{log[-1]['tokens']:,}"
    mantissa, exponent = f"{facts.flops_per_token * log[-1]['tokens']:.2e}".split("e")
    rows["training FLOPs"] = f"{mantissa}e{int(exponent)}"
    if speeds:
        rows["throughput, median"] = f"{statistics.median(speeds):,.0f} tokens/s"
    if mfu:
        rows["model FLOPs utilization, median"] = f"{statistics.median(mfu):.1%}"
    rows["wall-clock time of training steps"] = str(timedelta(seconds=round(sum(step_ms) / 1e3)))
    if peak_gb:
        rows["peak memory"] = f"{max(peak_gb):.2f} GB"
    return rows


def find_dataset(config: dict) -> str:
    """The name of the run's data set; of one's own files, that of their folder."""
    if "data_dir" not in config:
        return config.get("data", "")
    name = read_manifest(Path(config["data_dir"])).get("dataset", "files")
    return config["data_dir"] if name == "files" else name


def render_facts(rows: dict[str, str]) -> str:
    pairs = (f"<div><dt>{k}</dt><dd>{escape(v)}</dd></div>" for k, v in rows.items())
    note = (
        "The wall-clock time is the sum over the steps in the log, without evaluations, saves and "
        "restarts. FLOPs are computed from parameters and tokens, as in the PaLM paper."
    )
    return f'<dl>{"".join(pairs)}</dl><p class="faint">{note}</p>'


def compare_hellaswag(log: list[dict]) -> dict[str, str]:
    """The run's last HellaSwag accuracy beside the quoted ones of other models, if it has one."""
    measured = [r for r in log if "hellaswag_acc_norm" in r]
    if not measured:
        return {}
    last = measured[-1]
    accuracies = f"acc_norm {last['hellaswag_acc_norm']:.4f}, acc {last['hellaswag_acc']:.4f}"
    rows = {"this run": f"lm-eval {accuracies} (measured at step {last['step']:,})"}
    for label, _, _ in HELLASWAG:
        model, figure = label.split(", ")
        rows[model] = f"{rows[model]}; {figure} (quoted)" if model in rows else f"{figure} (quoted)"
    return rows


def render_samples(log: list[dict]) -> str:
    """All samples, below the steps they come from."""
    html = ""
    for record in log:
        if samples := record.get("samples"):
            html += f'<p class="faint">step {record["step"]:,}</p>'
            html += "".join(f"<pre>{escape(sample)}</pre>" for sample in samples)
    return html or '<p class="faint">none: --sample_every is 0</p>'


def show_as_yaml(value: object) -> str:
    """A setting as config.yaml has it: null, true, false and '', lists in one line."""
    return value or "''" if isinstance(value, str) else json.dumps(value, default=str)


def render_table(rows: dict) -> str:
    """The rows as a table; nothing if there are none."""
    if not rows:
        return ""
    cells = (f"<th>{escape(str(k))}</th><td>{escape(str(v))}</td>" for k, v in rows.items())
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def render_curves(run: Path) -> str:
    """The curves as an SVG element with real text, in the light or dark colors of the report."""
    import matplotlib as mpl

    stream = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context({"svg.fonttype": "none"}):
        figure = draw_runs([run], more=REPORT_PANELS)
        figure.savefig(stream, format="svg", transparent=True, metadata=metadata)
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :].replace("</svg>", f"{render_titles(figure)}</svg>")
    svg = svg.replace("#000000", "currentColor").replace("#ffffff", "var(--paper)")
    return f'<div class="wide">{svg}</div>'


def render_titles(figure: "Figure") -> str:
    """Transparent circles on points of the curves, whose titles a browser shows on hover."""
    scale = SVG_DPI / figure.dpi
    circles = ""
    for line in itertools.chain.from_iterable(axes.lines for axes in figure.axes):
        if (title := TITLES.get(line.get_gid() or "")) is None:
            continue
        points = np.asarray(line.get_xydata())
        some = np.unique(np.linspace(0, len(points) - 1, MAX_TITLES).round().astype(int))
        places = line.get_transform().transform(points[some]) * scale
        for (step, value), (x, y) in zip(points[some], places, strict=True):
            place = f'cx="{x:.1f}" cy="{figure.bbox.height * scale - y:.1f}" r="5"'
            circles += (
                f"<circle {place}><title>step {step:,.0f}: {title} {value:.4f}</title></circle>"
            )
    return circles
