"""report.html of a run, and the templates that it and the model card are made from."""

import importlib.metadata
import io
import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
import torch

from engine.checkpoint import list_checkpoints
from engine.distributed import Distributed
from engine.files import write_atomically
from engine.metrics import read_metrics, summarize_run
from engine.plots import CURVES, draw_runs
from engine.throughput import describe_device

MAX_TITLES = 100  # points of a curve whose values the report shows on hover
SVG_DPI = 72  # of matplotlib's SVG
PACKAGES = ("numpy", "transformers", "tokenizers", "tiktoken")
ENGINE = Path(__file__).parent


def write_report(run: Path, dist: Distributed) -> None:
    """Write RUN/report.html, a self-contained page. A failure is printed; it never ends the run."""
    path = run / "report.html"
    try:
        page = render_template(
            "report.html",
            name=run.resolve().name,
            summary=summarize_run(run, list_checkpoints(run)[-1]),
            curves=render_curves(run),
            log=read_metrics(run),
            config=(run / "config.yaml").read_text(),
            environment=collect_environment(dist),
        )
        write_atomically(path, page.encode())
    except Exception as error:
        print(f"{path} is not written: {type(error).__name__}: {error}", flush=True)


def collect_environment(dist: Distributed) -> dict[str, str]:
    """The command, hardware and versions of this process."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "devices": f"{dist.world_size} x {describe_device(dist.device)}",
        "system": f"{platform.platform()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,  # with the version of CUDA
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "git commit": read_git_commit().strip(),
    }


def read_git_commit() -> str:
    """This project's commit, with -dirty if tracked files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.check_output(command, cwd=ENGINE, stderr=subprocess.DEVNULL, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "none: not a git checkout"


def render_template(file: str, **values: object) -> str:
    """Fill in a file of engine/templates. In HTML all values are escaped."""
    from jinja2 import Environment, FileSystemLoader, select_autoescape

    loader = FileSystemLoader(ENGINE / "templates")
    environment = Environment(loader=loader, autoescape=select_autoescape(), trim_blocks=True)
    return environment.get_template(file).render(values)


def render_curves(run: Path) -> str:
    """The curves as an SVG element with real text, in the light or dark colors of the report.
    Transparent circles on points of the curves have titles, which a browser shows on hover.
    """
    import matplotlib as mpl

    stream = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context({"svg.fonttype": "none", "figure.dpi": SVG_DPI}):
        figure = draw_runs([run], has_all_panels=True)
        figure.savefig(stream, format="svg", transparent=True, metadata=metadata)
    circles = ""
    for line in (line for axes in figure.axes for line in axes.lines if line.get_gid() in CURVES):
        points = np.asarray(line.get_xydata())
        points = points[np.unique(np.linspace(0, len(points) - 1, MAX_TITLES).round().astype(int))]
        places = line.get_transform().transform(points)  # from the bottom left
        for (step, value), (x, y) in zip(points, places, strict=True):
            place = f'cx="{x:.1f}" cy="{figure.bbox.height - y:.1f}" r="5"'
            title = f"step {step:,.0f}: {line.get_gid()} {value:.4f}"
            circles += f"<circle {place}><title>{title}</title></circle>"
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :].replace("</svg>", f"{circles}</svg>")
    return svg.replace("#000000", "currentColor").replace("#ffffff", "var(--paper)")
