"""Draw the loss curves of runs in one image: python plot.py RUN..."""

import argparse
import glob
from pathlib import Path

from engine.config import Parser
from engine.errors import run_and_report_errors
from engine.plots import X_AXES, plot_runs


def main(args: argparse.Namespace) -> None:
    path = Path(args.out)
    # Not every shell expands globs. What matches nothing is kept, so that the error names it.
    patterns = [f"{Path(run).expanduser()}/metrics.jsonl" for run in args.runs]
    logs = [log for p in patterns for log in sorted(glob.glob(p)) or [p]]  # noqa: PTH207 (Path.glob rejects absolute paths)
    plot_runs(list(dict.fromkeys(Path(log).parent for log in logs)), path, args.x, args.mean)
    print(f"wrote {path}")


if __name__ == "__main__":
    parser = Parser(__doc__ or "")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder or glob")
    out_help = "image: .png, .svg or .pdf (default: loss.png)"
    parser.add_argument("--out", metavar="FILE", default="loss.png", help=out_help)
    parser.add_argument("--x", choices=X_AXES, default="step", help="the x axis (default: step)")
    parser.add_argument("--mean", action="store_true", help="draw the mean over seeds")
    args = parser.parse_args()
    run_and_report_errors(lambda: main(args), args.debug)  # every Parser has --debug
