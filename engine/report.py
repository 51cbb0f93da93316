"""Write report.html and run.json for a run, and fill in the templates of the report and the model
card.
"""

import importlib.metadata
import io
import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine import __version__
from engine.checkpoint import checkpoint_step, list_checkpoints
from engine.distributed import Distributed
from engine.files import read_json, write_atomically, write_json
from engine.metrics import read_metrics, summarize_run
from engine.plots import CURVES, draw_runs
from engine.throughput import describe_device

MAX_TOOLTIPS = 100  # points per curve that show their value on hover
SVG_DPI = 72  # matplotlib writes SVG at this resolution
PACKAGES = ("numpy", "transformers", "tokenizers", "tiktoken")
ENGINE = Path(__file__).parent
RUN_RECORD = "run.json"


def read_record(run: Path) -> dict[str, Any]:
    """Read RUN/run.json. Return {} if there is none: runs of earlier versions lack it."""
    file = run / RUN_RECORD
    return read_json(file, remedy="delete it") if file.exists() else {}


def start_record(
    run: Path, dist: Distributed, *, first_step: int, data: str, tokenizer: str
) -> None:
    """Add this process to RUN/run.json, which says how a run was made: hashes of the data and the
    tokenizer, and the command, hardware and versions of each process that trained it.
    """
    process = collect_environment(dist) | {"first_step": first_step}
    processes = [*read_record(run).get("processes", []), process]
    write_json(run / RUN_RECORD, {"data": data, "tokenizer": tokenizer, "processes": processes})


def write_report(run: Path) -> None:
    """Write RUN/report.html, a self-contained page, and update RUN/run.json. A failure is printed;
    it never ends the run.
    """
    path = run / "report.html"
    try:
        latest = list_checkpoints(run)[-1]
        record = read_record(run)
        process = record["processes"][-1]
        elapsed = datetime.now().astimezone() - datetime.fromisoformat(process["started"])
        seconds = round(elapsed.total_seconds(), 1)
        process |= {"last_step": checkpoint_step(latest), "seconds": seconds}
        write_json(run / RUN_RECORD, record)
        page = render_template(
            "report.html",
            name=run.resolve().name,
            summary=summarize_run(run, latest),
            curves=render_curves(run),
            log=read_metrics(run),
            config=(run / "config.yaml").read_text(),
            environment=process,
        )
        write_atomically(path, page.encode())
    except Exception as error:
        print(f"could not write {path}: {type(error).__name__}: {error}", flush=True)


def collect_environment(dist: Distributed) -> dict[str, Any]:
    """Return the command, hardware and versions of this process, and the current time."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "devices": f"{dist.world_size} x {describe_device(dist.device)}",
        "system": f"{platform.platform()}, {os.cpu_count()} cores",
        "version": __version__,
        "commit": read_git_commit().strip(),
        "python": platform.python_version(),
        "torch": torch.__version__,  # includes the CUDA version
        **{name: read_version(name) for name in PACKAGES},
    }


def read_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # training can do without


def read_git_commit() -> str:
    """Return this project's commit, with -dirty if tracked files differ from it."""
    # --exclude=* ignores tags.
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.check_output(command, cwd=ENGINE, stderr=subprocess.DEVNULL, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "none: not a git checkout"


def render_template(file: str, **values: object) -> str:
    """Fill in a file of engine/templates. In HTML files, values are escaped."""
    from jinja2 import Environment, FileSystemLoader, select_autoescape

    loader = FileSystemLoader(ENGINE / "templates")
    environment = Environment(loader=loader, autoescape=select_autoescape(), trim_blocks=True)
    return environment.get_template(file).render(values)


def render_curves(run: Path) -> str:
    """Return the curves as an SVG element. Its text stays text, and its colors follow the light or
    dark theme of the page.
    """
    import matplotlib as mpl

    stream = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # None leaves them out
    with mpl.rc_context({"svg.fonttype": "none", "figure.dpi": SVG_DPI}):
        figure = draw_runs([run], all_panels=True)
        figure.savefig(stream, format="svg", transparent=True, metadata=metadata)
    lines = [line for axes in figure.axes for line in axes.lines if line.get_gid() in CURVES]
    circles = "".join(draw_tooltips(line, figure.bbox.height) for line in lines)
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :].replace("</svg>", f"{circles}</svg>")
    return svg.replace("#000000", "currentColor").replace("#ffffff", "var(--paper)")


def draw_tooltips(line: Any, height: float) -> str:
    """Return SVG circles for points of a curve: `line` is a matplotlib Line2D. The circles are
    transparent, and browsers show their titles on hover. `height` is that of the image in pixels.
    """
    points = np.asarray(line.get_xydata())
    shown = np.linspace(0, len(points) - 1, MAX_TOOLTIPS).round().astype(int)
    points = points[np.unique(shown)]
    pixels = line.get_transform().transform(points)
    circles = ""
    for (step, value), (x, y) in zip(points, pixels, strict=True):
        title = f"step {step:,.0f}: {line.get_gid()} {value:.4f}"
        center = f'cx="{x:.1f}" cy="{height - y:.1f}"'  # matplotlib's y points up, SVG's down
        circles += f'<circle {center} r="5"><title>{title}</title></circle>'
    return circles
