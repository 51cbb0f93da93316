"""The commands, code, files and links in the documentation, checked against the project itself.

Before each ```sh block, a comment like `<!-- test: run parse skip - why -->` says what to do with
each of its commands: run it as it stands, only parse its flags, or skip it.
"""

import contextlib
import dataclasses
import json
import re
import runpy
import shlex
import shutil
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from conftest import CONFIGS, HELLASWAG_ROWS, TINY_RUN
from processes import ROOT, run_here

import fineweb
import train_gpt2
from benchmarks.time_to_loss import BASELINE, FAST, FORMER, TUNED, steps_to
from engine import __version__
from engine.checkpoint import list_checkpoints, read_progress, read_state
from engine.config import parse_flags
from engine.shards import TokenShards, read_manifest
from engine.throughput import PEAK_TFLOPS, flops_per_token
from model import GPT, GPTConfig

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Flags in the text that belong to other commands, to every command, or to plot.py.
OTHER_FLAGS = {"model_args", "tasks", "standalone", "nproc_per_node", "nnodes", "max_restarts"}
OTHER_FLAGS |= {
    "rdzv_backend",
    "rdzv_id",
    "rdzv_endpoint",
    "config",
    "debug",
    "out",
    "outfile",
    "x",
    "mean",
}
ACTIONS = ("run", "parse", "skip")
BLOCK = re.compile(r"^(<!-- test: ([^>]*) -->\n)?```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)


class Command(NamedTuple):
    line: str
    action: str  # one of ACTIONS, or what is wrong with the comment


def collect_commands(pages: list[Path]) -> list[Command]:
    """Collect the commands in the sh blocks of the pages, in order and without comments."""
    found = []
    for page in pages:
        for _, comment, block in BLOCK.findall(page.read_text()):
            lines = re.sub(r"[ \t]+#.*$|^#.*$", "", block.replace("\\\n", " "), flags=re.MULTILINE)
            commands = [" ".join(line.split()) for line in lines.splitlines() if line.strip()]
            actions = comment.partition(" - ")[0].split()
            if len(actions) != len(commands):
                actions = [f"{len(actions)} actions for {len(commands)} commands"] * len(commands)
            found += [Command(*pair) for pair in zip(commands, actions, strict=True)]
    return found


COMMANDS = collect_commands(PAGES)


def test_every_command_has_an_action():
    """The comment before each block has an action for every command, and a reason for each skip."""
    assert len(COMMANDS) > 15
    assert not [command for command in COMMANDS if command.action not in ACTIONS]
    for page in PAGES:
        text = page.read_text()
        for _, comment, _ in BLOCK.findall(text):
            assert "skip" not in comment or " - " in comment, comment
        # BLOCK must find every shell block, also an indented one or one marked bash or console.
        fences = re.findall(r"^[ \t]*```[ \t]*(?:sh|bash|shell|console)\b", text, re.MULTILINE)
        assert len(fences) == len(BLOCK.findall(text)), page.name


def test_a_block_without_its_comment_is_found(tmp_path):
    """A block without a comment, or with too few actions, is noticed."""
    page = tmp_path / "page.md"
    page.write_text("```sh\nls\n```\n<!-- test: run -->\n```sh\nls  # here\npwd\n```\n")
    actions = [command.action for command in collect_commands([page])]
    assert actions == ["0 actions for 1 commands", *["1 actions for 2 commands"] * 2]


def test_every_flag_exists():
    """Every flag in the text belongs to some command."""
    known = {f.name for config in CONFIGS.values() for f in dataclasses.fields(config)}
    known |= {f"no-{name}" for name in known} | OTHER_FLAGS
    for page in PAGES:
        # Benchmarks have flags of their own: skip `python benchmarks/x.py --a`, `--b`.
        text = re.sub(r"python benchmarks/[^`]*`((;|,| or) `--\w+`?)?", "", page.read_text())
        unknown = set(re.findall(r"(?<![\w-])--(\w[\w-]*)", text)) - known
        assert not unknown, f"{page.name}: {unknown}"


def execute(line: str) -> None:
    """Run a command line in this process, because starting another one takes seconds."""
    run_here(*shlex.split(line)[1:])


@pytest.mark.parametrize("line", [c.line for c in COMMANDS if c.action == "parse"])
def test_every_command_parses(line, monkeypatch):
    """For commands marked parse, the script accepts the flags, values and config files."""
    monkeypatch.chdir(ROOT)
    _, script, *args = shlex.split(line)
    values, _ = parse_flags(CONFIGS[Path(script).stem], "", args)
    assert CONFIGS[Path(script).stem](**values)


@pytest.fixture(scope="module")
def docs_workdir(tmp_path_factory) -> Path:
    """A folder with the input files that the documentation names, a tiny model as runs/demo, and
    adapters for it as runs/mine_lora and runs/demo_lora.
    """
    folder = tmp_path_factory.mktemp("docs")
    text = Path(__file__).read_text()
    (folder / "notes.txt").write_text(text)
    (folder / "README.md").write_text(text)
    for name in ("data/others", "docs", "tests"):
        (folder / name).mkdir(parents=True)
    (folder / "docs" / "page.md").write_text(text)
    for name in ("code.py", "docs/code.py"):
        (folder / name).write_text(text)
    shutil.copy(HELLASWAG_ROWS, folder / "tests")
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(4)]
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    header = np.array([20240520, 1, 3] + [0] * 253, dtype="<i4")
    tokens = np.array([50256, 15496, 13], dtype="<u2")
    (folder / "data" / "others" / "tiny_val.bin").write_bytes(header.tobytes() + tokens.tobytes())
    settings = TINY_RUN | {"data_dir": "data/mine", "out_dir": "runs/demo"}
    settings |= {"block_size": 128, "batch_size": 1, "total_batch_size": 128}
    settings |= {"max_steps": 2, "warmup_steps": 1}
    with contextlib.chdir(folder):
        fineweb.main(fineweb.PrepareConfig(["notes.txt"], val_tokens=600, out_dir="data/mine"))
        train_gpt2.main(train_gpt2.PretrainConfig(**settings))
        # The README fine-tunes on 5,058 rows, which takes too long here.
        execute(
            "python finetune_lora.py --model_name_or_path runs/demo --data mine.jsonl "
            "--out_dir runs/mine_lora --merge_out merged"
        )
    shutil.copytree(folder / "runs" / "mine_lora", folder / "runs" / "demo_lora")
    trained = folder / "runs" / "demo" / "checkpoints"  # in the docs, the demo has 500 steps
    shutil.copytree(trained / "step_000002", trained / "step_000500")
    return folder


@pytest.fixture(scope="module")
def used_workdir(docs_workdir) -> Path:
    """The same folder, after all commands marked run."""
    with contextlib.chdir(docs_workdir):
        for line in (command.line for command in COMMANDS if command.action == "run"):
            print(line)  # pytest shows it if it fails
            execute(line)
    return docs_workdir


def test_commands_run_as_they_stand(used_workdir):
    """The commands marked run work as they stand, and write the files that the pages name."""
    files = ("data/own/manifest.json", "loss.png", "runs/demo/share/README.md")
    for file in (*files, "results/demo/results.json"):
        assert (used_workdir / file).is_file(), file


def test_python_blocks_run(used_workdir):
    """The Python in the pages runs as it stands, and reads .npy and .bin shards correctly."""
    block = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
    with contextlib.chdir(used_workdir):
        text = "".join(page.read_text() for page in PAGES)
        Path("blocks.py").write_text("\n".join(block.findall(text)))
        variables = runpy.run_path("blocks.py")
        # docs/formats.md reads our shards into `ours` and those of others into `theirs`.
        for name, folder, split in (("ours", "mine", "train"), ("theirs", "others", "val")):
            shards = TokenShards(f"data/{folder}", split)
            assert variables[name].tolist() == shards.read(0, len(shards)).tolist()


def test_every_key_and_file_is_documented(used_workdir):
    """docs/formats.md names each key and file of a run, checkpoint, manifest and evaluation."""
    text = (ROOT / "docs" / "formats.md").read_text()
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    named = {name.rstrip("/") for name in re.findall(r"`([^`\n]+)`", text)}

    def keys(file: str) -> set[str]:
        lines = (used_workdir / file).read_text().splitlines()
        return {key for line in lines for key in json.loads(line)}

    written = keys("runs/mine_lora/train_data.json") | keys("results/demo/rows.jsonl")
    for name in ("demo", "mine_lora"):
        run_folder = used_workdir / "runs" / name
        checkpoint = list_checkpoints(run_folder)[-1]
        written |= keys(f"runs/{name}/metrics.jsonl") | read_state(checkpoint).keys()
        written |= read_progress(checkpoint).keys()
        record = json.loads((run_folder / "run.json").read_text())
        written |= {*record, *record["processes"][-1]}
        written |= {file.name for file in checkpoint.iterdir()}
        folders = {"checkpoints", "best"}  # documented with the name of a checkpoint
        written |= {file.name for file in run_folder.iterdir()} - folders
    manifest = read_manifest(used_workdir / "data" / "mine")
    results = json.loads((used_workdir / "results" / "demo" / "results.json").read_text())
    written |= {*manifest, *manifest["shards"][0], *results["acc"], "config", "rows"}
    written |= {file.name for file in (used_workdir / "results" / "demo").iterdir()}
    assert written <= named, sorted(written - named)


def test_the_tree_is_the_project():
    """The tree in the README lists every script, notebook and folder of the project, the one in
    CONTRIBUTING every module of engine/, and neither lists anything else.
    """

    def read_tree(page: str) -> list[str]:
        lines = (ROOT / page).read_text().split("```text\n")[1].split("```")[0].splitlines()
        return sorted(line.split()[0] for line in lines)

    made = {"data", "runs", "results", "merged", "__pycache__"}  # by the commands
    folders = {f.name for f in ROOT.iterdir() if f.is_dir() and f.name[0] != "."} - made
    existing = {f.name for f in (*ROOT.glob("*.py"), *ROOT.glob("*.ipynb"))}
    assert read_tree("README.md") == sorted(existing | {f"{name}/" for name in folders})
    modules = {f.name for f in (ROOT / "engine").glob("*.py")} - {"__init__.py"}
    assert read_tree("CONTRIBUTING.md") == sorted(modules)


def test_links_resolve():
    """Every relative link in the documentation leads to a file and a heading of the project."""
    for page in (
        *PAGES,
        *(ROOT / f"{name}.md" for name in ("AGENTS", "CONTRIBUTING", "CHANGELOG")),
    ):
        for link, _, heading in re.findall(r"\]\(([^)#\s]*)(#([^)\s]+))?\)", page.read_text()):
            target = page.parent / link if link else page
            assert "://" in link or target.exists(), f"{page.name}: {link}"
            if heading and "://" not in link:
                titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
                anchors = [re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles]
                assert heading in anchors, f"{page.name}: {link}#{heading}"


def test_front_pages_are_short():
    """The README has at most 130 lines, and AGENTS.md at most 50."""
    for page, limit in (("README.md", 130), ("AGENTS.md", 50)):
        assert len((ROOT / page).read_text().splitlines()) <= limit, page


def test_costs_in_the_readme():
    """The hours and dollars in the README follow from the tokens of the configs, the prices, and
    the speeds: those in the table, or else 40% of the peak FLOP/s.
    """
    with torch.device("meta"):
        flops = flops_per_token(GPT(GPTConfig()), 1024)
    peaks = {card: 1e12 * peak for peak, cards in PEAK_TFLOPS.items() for card in cards}
    table = (ROOT / "README.md").read_text().split("\n| hardware |")[1].split("\n\n")[0]
    for line in table.splitlines()[2:]:
        hardware, price, *costs, basis = [cell.strip() for cell in line.split("|")[1:-1]]
        n, card = hardware.split(maxsplit=1)
        speeds = [1000 * int(k) for k in re.findall(r"(\d+)k", basis)]
        speeds = speeds or [int(n) * 0.4 * peaks[card] / flops] * 2
        for name, speed, cost in zip(("gpt2_124m", "gpt2_124m_fast"), speeds, costs, strict=True):
            config = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
            hours = config["max_steps"] * config["total_batch_size"] / speed / 3600
            dollars = hours * int(n) * float(price.removeprefix("$"))
            assert cost == f"{hours:.2g} h, ${dollars:.0f}", line


def test_the_version_is_the_same_everywhere():
    """CITATION.cff and the latest release in the changelog have the version of the code."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    changes = (ROOT / "CHANGELOG.md").read_text()
    version, date = re.findall(r"^## \[(.*)\] - (.*)$", changes, re.MULTILINE)[0]
    assert citation["version"] == version == __version__
    assert str(citation["date-released"]) == date


def read_table(page: str, start: str) -> list[dict[str, str]]:
    """Read the table in docs/ whose header starts with `start`. Return its rows as dicts."""
    text = (ROOT / "docs" / page).read_text().replace("| build-nanogpt |", f"| {BASELINE} |")
    lines = text[text.index(f"\n| {start}") :].split("\n\n", maxsplit=1)[0].strip().splitlines()
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return [dict(zip(header, row, strict=True)) for row in rows]


# The texts in docs/time_to_loss.jsonl, by the first digits of their fingerprints.
TEXTS = {"7e1d0be1": "technical", "5ea0e1d3": "docstrings", "b7397e7f": "source code"}


class Series(NamedTuple):
    """Training runs that differ only in their seeds."""

    column: str  # text and model, such as "technical, 4 x 256"
    recipe: str
    steps: int


def read_losses() -> dict[Series, dict[int, float]]:
    """Return the final losses in docs/time_to_loss.jsonl, by series and seed."""
    losses: dict[Series, dict[int, float]] = {}
    for line in (ROOT / "docs" / "time_to_loss.jsonl").read_text().splitlines():
        run = json.loads(line)
        model = run["size"].split(":")[0].replace("x", " x ")
        series = Series(f"{TEXTS[run['data'][:8]]}, {model}", run["recipe"], run["steps"])
        losses.setdefault(series, {})[run["seed"]] = run["loss"]
    return losses


LOSSES = read_losses()


def mean_loss(series: Series, seeds: Iterable[int]) -> float:
    return statistics.mean(LOSSES[series][seed] for seed in seeds)


def share_of_tokens(series: Series) -> float:
    """Return the share of a series' tokens that the fast recipe needs to reach its mean loss."""
    seeds = LOSSES[series].keys()
    fast_losses = {
        other.steps: mean_loss(other, seeds)
        for other in LOSSES
        if (other.column, other.recipe) == (series.column, FAST) and seeds <= LOSSES[other].keys()
    }
    return steps_to(mean_loss(series, seeds), fast_losses) / series.steps


def test_losses_in_the_results():
    """docs/results.md shows the mean loss of each series in docs/time_to_loss.jsonl."""
    shown = {
        Series(column, row["recipe"], int(row["steps"])): cell
        for row in read_table("results.md", "recipe | steps")
        for column, cell in row.items()
        if cell and column not in ("recipe", "steps")
    }
    assert shown == {series: f"{mean_loss(series, seeds):.3f}" for series, seeds in LOSSES.items()}


def test_shares_of_tokens():
    """Shares of tokens in docs/results.md follow from the runs. recipe.md quotes them."""
    shares: dict[str, float] = {}  # the largest, by recipe
    cells = defaultdict(set)  # of results.md, by text, model, steps and recipe
    for row in read_table("results.md", "baseline | steps"):
        steps = int(row["steps"].replace(",", ""))
        series = Series(f"{row['text']}, {row['model']}", row["baseline"], steps)
        share = share_of_tokens(series)
        assert row["token ratio"] == (f"{share:.2f}" if share > 0 else "below 0.25"), row
        assert int(row["seeds"]) == len(LOSSES[series]), row
        recipe = series.recipe.split(",")[0]  # without its changes
        shares[recipe] = max(share, shares.get(recipe, share))
        cells[row["text"], row["model"], row["steps"], recipe].add(row["token ratio"])
    for row in read_table("recipe.md", "text | model | steps"):
        for recipe in (BASELINE, TUNED, FORMER):
            expected = cells[row["text"], row["model"], row["steps"], recipe]
            assert row[recipe] in expected | {""}, row
    summary = (ROOT / "docs" / "results.md").read_text().split("\n## ")[0]
    assert f"[at most {shares[TUNED]:.0%} as many tokens](" in summary
    assert f"{shares[BASELINE]:.0%} as many as build-nanogpt" in summary


def test_changes_of_the_recipe():
    """What NorMuon and sinusoids gain according to docs/recipe.md follows from the runs."""
    for row in read_table("recipe.md", "without | text"):
        setting = {"NorMuon": "muon_beta2 0.0", "sinusoids": "sinusoidal_wpe 0.0"}[row["without"]]
        fast = Series(f"{row['text']}, {row['model']}", FAST, 510)
        without = fast._replace(recipe=f"{FAST}, {setting}")
        seeds = LOSSES[without]
        assert int(row["seeds"]) == len(seeds), row
        higher = mean_loss(without, seeds) - mean_loss(fast, seeds)
        assert row["loss higher by"] == f"{higher:.3f}", row
        assert row["fewer tokens"] == f"{1 - share_of_tokens(without):.1%}", row
