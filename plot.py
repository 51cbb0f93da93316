"""Draw the loss curves of runs in one image: python plot.py RUN..."""

import argparse
from pathlib import Path

from engine.config import Parser
from engine.errors import run_and_report_errors
from engine.plots import X_AXES, plot_runs


def main(args: argparse.Namespace) -> None:
    path = Path(args.out)
    plot_runs([Path(run) for run in args.runs], path, args.x)
    print(f"wrote {path}")


if __name__ == "__main__":
    parser = Parser(__doc__ or "")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    out_help = "image: .png, .svg or .pdf (default: loss.png)"
    parser.add_argument("--out", metavar="FILE", default="loss.png", help=out_help)
    parser.add_argument("--x", choices=X_AXES, default="step", help="the x axis (default: step)")
    args = parser.parse_args()
    run_and_report_errors(lambda: main(args), args.debug)  # every Parser has --debug
