"""A file of its own because it is read in a browser: report.html, a run on one page that needs
nothing but itself.
"""

import importlib.metadata
import io
import os
import platform
import shlex
import statistics
import subprocess
import sys
from datetime import datetime, timedelta
from html import escape
from pathlib import Path

import matplotlib
import torch

from checkpoint import read_metrics, read_run_config
from data import write_atomically
from plot import HELLASWAG, draw_runs
from runtime import Distributed

CURVES = {"lr": "learning rate", "grad_norm": "gradient norm", "tokens_per_s": "tokens/s"}
PACKAGES = ("torch", "numpy", "transformers", "tiktoken")
STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --paper: #ffffff; --soft: #f2f4f6;
  --faint: #5d6670; --line: #d9dee3; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ea; --paper: #15181b; --soft: #1f2428; --faint: #9aa4ad; --line: #353c43; } }
body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
h1 { margin: 0; } h2 { margin: 2.5rem 0 .75rem; font-size: 1.25rem; }
p { margin: .25rem 0; } .faint, th, dt { color: var(--faint); }
dl { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.5rem 0; }
dl div { flex: 1 1 9rem; padding: .6rem .9rem; border-radius: .4rem; background: var(--soft); }
dt { font-size: .85rem; } dd { margin: 0; font-size: 1.1rem; font-weight: 600; }
table { border-collapse: collapse; width: 100%; } tr { border-bottom: 1px solid var(--line); }
th, td { padding: .3rem .75rem .3rem 0; text-align: left; vertical-align: top; font-weight: 400;
  overflow-wrap: anywhere; } th { width: 14rem; }
pre { margin: .25rem 0 1rem; padding: .6rem .9rem; border-radius: .4rem; background: var(--soft);
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; }
svg { width: 100%; height: auto; } svg text { fill: currentColor; }
"""
# The browser itself refuses whatever a page like this never needs, scripts and requests.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_page(run: Path, dist: Distributed) -> None:
    """Write RUN/report.html from the run's log; it never costs the run, what fails is told."""
    try:
        text = page(run, environment(dist))
        write_atomically(run / "report.html", text.encode())
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        print(f"{run / 'report.html'} is not written: {type(error).__name__}: {error}", flush=True)


def environment(dist: Distributed) -> dict[str, str]:
    """On what, and by which command, this process runs."""
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
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "git commit": git_commit(),
    }


def git_commit() -> str:
    """Of this project, with -dirty where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none: not a git checkout"


def page(run: Path, environment: dict[str, str]) -> str:
    """The whole page as HTML; all text that comes from elsewhere is escaped."""
    records, config = read_metrics(run), read_run_config(run)
    name = escape(run.resolve().name)
    facts = "".join(
        f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>"
        for key, value in summary(records).items()
    )
    sections = {
        "Curves": curves(run),
        "HellaSwag": table(hellaswag(records)),
        "Samples": samples(records),
        "Config": table(config),
        "Environment": table(environment)
        + '<p class="faint">Of the process that wrote this page.</p>',
    }
    body = "".join(
        f'<section id="{title.lower()}"><h2>{title}</h2>{content}</section>'
        for title, content in sections.items()
    )
    last, wanted = records[-1]["step"], config.get("max_steps")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<style>{STYLE}</style></head><body><h1>{name}</h1><p class="faint">step {last:,} of '
        f"{wanted:,}</p><dl>{facts}</dl>{body}</body></html>\n"
    )


def summary(records: list[dict]) -> dict[str, str]:
    """The figures that sum the run up, from its log."""

    def logged(key: str) -> list[float]:
        return [r[key] for r in records if r.get(key) is not None]

    losses, speeds, mfu = logged("val_loss"), logged("tokens_per_s"), logged("mfu")
    seconds, peak = sum(logged("step_ms")) / 1e3, logged("peak_memory_gb")
    facts = {"validation loss": f"{losses[0]:.4f} to {losses[-1]:.4f}" if losses else "-"}
    facts["tokens"] = f"{records[-1]['tokens']:,}"
    facts["throughput, median"] = f"{statistics.median(speeds):,.0f} tokens/s" if speeds else "-"
    if mfu:
        facts["model FLOPs utilization, median"] = f"{statistics.median(mfu):.1%}"
    facts["time in training steps"] = str(timedelta(seconds=round(seconds)))
    facts["peak memory"] = f"{max(peak):.2f} GB" if peak else "not logged"
    return facts


def hellaswag(records: list[dict]) -> dict[str, str]:
    """What the run has last measured of HellaSwag, and what is quoted of others."""
    measured = [r for r in records if "hellaswag_acc_norm" in r]
    rows = {"this run": "not measured (--hellaswag_every)"}
    if measured:
        last = measured[-1]
        rows["this run"] = (
            f"lm-eval acc_norm {last['hellaswag_acc_norm']:.4f}, acc {last['hellaswag_acc']:.4f} "
            f"(measured at step {last['step']:,})"
        )
    for label, _, _ in HELLASWAG:
        model, figure = label.split(", ")
        rows[model] = f"{rows[model]}; {figure} (quoted)" if model in rows else f"{figure} (quoted)"
    return rows


def samples(records: list[dict]) -> str:
    """Every sample under its step."""
    return (
        "".join(
            f'<p class="faint">step {r["step"]:,}</p>'
            + "".join(f"<pre>{escape(text)}</pre>" for text in r["samples"])
            for r in records
            if r.get("samples")
        )
        or '<p class="faint">none: --sample_every is 0</p>'
    )


def table(rows: dict) -> str:
    cells = (f"<th>{escape(str(k))}</th><td>{escape(str(v))}</td>" for k, v in rows.items())
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def curves(run: Path) -> str:
    """The curves as an SVG element whose text is text and whose black and white are the page's."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw_runs([run], more=CURVES).savefig(
            stream,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
        )
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    return svg.replace("#000000", "currentColor").replace("#ffffff", "var(--paper)")
