"""The commands, code, files and links in the documentation, checked against the project itself.

Directly before each ```sh block stands a comment like `<!-- test: run parse skip - why -->`, with
one word per command: run it as it stands, only parse its flags, or skip it.
"""

import contextlib
import dataclasses
import gzip
import json
import re
import runpy
import shlex
import shutil
import statistics
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest import CONFIGS, TINY_RUN
from processes import ROOT, run_here

import fineweb
import train_gpt2
from benchmarks.time_to_loss import BASELINE, FAST, FORMER, TUNED, steps_to
from engine.checkpoint import list_checkpoints, read_progress, read_state
from engine.config import parse_flags
from engine.shards import TokenShards, read_manifest

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ROW = {"ctx_a": "A man", "ctx_b": "he", "endings": ["sits.", "runs.", "is.", "eats."], "label": 0}
# Flags in the text that belong to other commands, to every command, or to plot.py.
OTHER_FLAGS = {"model_args", "tasks", "standalone", "nproc_per_node", "nnodes", "max_restarts"}
OTHER_FLAGS |= {"rdzv_backend", "rdzv_id", "rdzv_endpoint", "config", "debug", "out", "x"}
WORDS = ("run", "parse", "skip")
BLOCK = re.compile(r"^(<!-- test: ([^>]*) -->\n)?```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)


class Command(NamedTuple):
    line: str
    word: str  # one of WORDS, or what is wrong with the comment


def collect_commands(pages: list[Path]) -> list[Command]:
    """The commands in the sh blocks of the pages, in order, without comments."""
    found = []
    for page in pages:
        for _, comment, block in BLOCK.findall(page.read_text()):
            lines = re.sub(r"[ \t]+#.*$|^#.*$", "", block.replace("\\\n", " "), flags=re.MULTILINE)
            commands = [" ".join(line.split()) for line in lines.splitlines() if line.strip()]
            words = comment.partition(" - ")[0].split()
            if len(words) != len(commands):
                words = [f"{len(words)} words for {len(commands)} commands"] * len(commands)
            found += [Command(*pair) for pair in zip(commands, words, strict=True)]
    return found


COMMANDS = collect_commands(PAGES)


def test_every_command_has_a_word():
    """Each block of commands says what the test does with each of them, and skips have a reason."""
    assert len(COMMANDS) > 15
    assert not [command for command in COMMANDS if command.word not in WORDS]
    for page in PAGES:
        text = page.read_text()
        for _, comment, _ in BLOCK.findall(text):
            assert "skip" not in comment or " - " in comment, comment
        # No block escapes the search by its indentation or by another name of its language.
        fences = re.findall(r"^[ \t]*```[ \t]*(?:sh|bash|shell|console)\b", text, re.MULTILINE)
        assert len(fences) == len(BLOCK.findall(text)), page.name


def test_a_block_without_its_comment_is_found(tmp_path):
    """A block without a comment, or with too few words, is noticed."""
    page = tmp_path / "page.md"
    page.write_text("```sh\nls\n```\n<!-- test: run -->\n```sh\nls  # here\npwd\n```\n")
    words = [command.word for command in collect_commands([page])]
    assert words == ["0 words for 1 commands", *["1 words for 2 commands"] * 2]


def test_every_flag_exists():
    """Every flag in the text belongs to some command."""
    known = {f.name for config in CONFIGS.values() for f in dataclasses.fields(config)}
    known |= {f"no-{name}" for name in known} | OTHER_FLAGS
    for page in PAGES:
        # Benchmarks have flags of their own.
        text = re.sub(r"python benchmarks/[^`]*`((;|,| or) `--\w+`?)?", "", page.read_text())
        unknown = set(re.findall(r"(?<![\w-])--(\w[\w-]*)", text)) - known
        assert not unknown, f"{page.name}: {unknown}"


def execute(line: str) -> None:
    """Do what a command line does, without the seconds that a process takes."""
    words = shlex.split(line)
    if words[1] == "-c":
        Path("command.py").write_text(words[2])
        words[1:] = [str(Path("command.py").absolute())]
    run_here(*words[1:])


@pytest.mark.parametrize("line", [c.line for c in COMMANDS if c.word == "parse"])
def test_every_command_parses(line, monkeypatch):
    """The flags, values and config files of what is not run are accepted by their own script."""
    monkeypatch.chdir(ROOT)
    _, script, *args = shlex.split(line)
    values, _ = parse_flags(CONFIGS[Path(script).stem], "", args)
    assert CONFIGS[Path(script).stem](**values)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with the files that the documentation names, and a tiny model as runs/demo."""
    folder = tmp_path_factory.mktemp("docs")
    text = Path(__file__).read_text()
    (folder / "notes.txt").write_text(text)
    for name in ("corpus", "more", "data/others"):
        (folder / name).mkdir(parents=True)
    (folder / "corpus" / "a.txt").write_text(text)
    (folder / "more" / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": text}).encode()))
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(4)]
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    header = np.array([20240520, 1, 3] + [0] * 253, dtype="<i4")
    tokens = np.array([50256, 15496, 13], dtype="<u2")
    (folder / "data" / "others" / "tiny_val.bin").write_bytes(header.tobytes() + tokens.tobytes())
    (folder / "hellaswag_val.jsonl").write_text(json.dumps({**ROW, "activity_label": "x"}) + "\n")
    settings = TINY_RUN | {"data_dir": "data/notes", "out_dir": "runs/demo"}
    settings |= {"block_size": 128, "batch_size": 1, "total_batch_size": 128}
    settings |= {"max_steps": 2, "warmup_steps": 1}
    with contextlib.chdir(folder):
        fineweb.main(fineweb.PrepareConfig(["notes.txt"], val_tokens=600))
        train_gpt2.main(train_gpt2.PretrainConfig(**settings))
    for name in ("a", "b"):
        shutil.copytree(folder / "runs" / "demo", folder / "runs" / name)
    trained = folder / "runs" / "demo" / "checkpoints"  # the demo has 500 steps
    shutil.copytree(trained / "step_000002", trained / "step_000500")
    return folder


@pytest.fixture(scope="module")
def used(workplace) -> Path:
    """The same folder after all commands marked run."""
    with contextlib.chdir(workplace):
        for line in (command.line for command in COMMANDS if command.word == "run"):
            print(line)  # which pytest shows if it fails
            execute(line)
    return workplace


def test_commands_run_as_they_stand(used):
    """The commands marked run, as they stand, leave the files that the documentation names."""
    files = ("data/mine/manifest.json", "runs/mine_lora/report.html", "merged/model.safetensors")
    for file in (*files, "results/demo/results.json", "loss.png", "runs/demo/share/README.md"):
        assert (used / file).is_file(), file


def test_python_blocks_run(used):
    """The Python in the pages runs as it stands, and reads both kinds of shards as we do."""
    block = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
    with contextlib.chdir(used):
        Path("blocks.py").write_text(
            "\n".join(block.findall("".join(p.read_text() for p in PAGES)))
        )
        names = runpy.run_path("blocks.py")
        for split, folder, name in (("train", "mine", "ours"), ("val", "others", "theirs")):
            shards = TokenShards(f"data/{folder}", split)
            assert names[name].tolist() == shards.read(0, len(shards)).tolist()


def test_formats_are_what_is_written(used):
    """docs/formats.md names each key and file of a run, checkpoint, manifest and evaluation."""
    text = (ROOT / "docs" / "formats.md").read_text()
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    named = {name.rstrip("/") for name in re.findall(r"`([^`\n]+)`", text)}

    def keys(file: str) -> set[str]:
        return {key for line in (used / file).read_text().splitlines() for key in json.loads(line)}

    there = keys("runs/mine_lora/train_data.json") | keys("results/demo/rows.jsonl")
    for name in ("demo", "mine_lora"):
        run_folder = used / "runs" / name
        checkpoint = list_checkpoints(run_folder)[-1]
        there |= keys(f"runs/{name}/metrics.jsonl") | read_state(checkpoint).keys()
        there |= read_progress(checkpoint).keys()
        there |= {file.name for file in checkpoint.iterdir()}
        there |= {file.name for file in run_folder.iterdir()} - {"checkpoints"}
    manifest = read_manifest(used / "data" / "mine")
    results = json.loads((used / "results" / "demo" / "results.json").read_text())
    there |= {*manifest, *manifest["shards"][0], *results["acc"], "config", "rows"}
    there |= {file.name for file in (used / "results" / "demo").iterdir()}
    assert there <= named, sorted(there - named)


def test_the_tree_is_the_project():
    """The tree in the README lists every script, module and folder, and nothing else."""
    section = (ROOT / "README.md").read_text().split("\n## The code\n")[1].split("\n## ")[0]
    lines = section.split("```")[1].splitlines()[1:]
    named = [line.split()[0] for line in lines]
    made = {"data", "runs", "results", "__pycache__"}  # by the commands
    folders = {f"{f.name}/" for f in ROOT.iterdir() if f.is_dir() and f.name[0] != "."}
    there = {f.name for f in ROOT.glob("*.py")} | folders - {f"{name}/" for name in made}
    there |= {f.name for f in (ROOT / "engine").glob("*.py")} - {"__init__.py"}
    assert sorted(named) == sorted(there)


def test_links_resolve():
    """Every relative link in the documentation leads to a file of the project."""
    for page in (*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"):
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            assert "://" in link or (page.parent / link).exists(), f"{page.name}: {link}"


def test_readme_is_short():
    """The README has at most 150 lines."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def read_table(page: str, start: str) -> list[dict[str, str]]:
    """The rows of the table whose header starts with `start`, by the names of its columns."""
    lines = page[page.index(f"\n| {start}") :].split("\n\n", maxsplit=1)[0].strip().splitlines()
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_tables_of_time_to_loss_are_the_runs():
    """The losses and shares of tokens in docs/results.md and recipe.md follow from the runs in
    docs/time_to_loss.jsonl, and the README quotes the largest shares.
    """
    texts = {"7e1d0be1": "technical", "5ea0e1d3": "docstrings", "b7397e7f": "source code"}
    losses: dict[tuple[str, str, int], dict[int, float]] = {}  # by column, recipe, steps; seed
    for line in (ROOT / "docs" / "time_to_loss.jsonl").read_text().splitlines():
        run = json.loads(line)
        column = f"{texts[run['data'][:8]]}, {run['size'].split(':')[0].replace('x', ' x ')}"
        losses.setdefault((column, run["recipe"], run["steps"]), {})[run["seed"]] = run["loss"]

    def mean(key: tuple[str, str, int], seeds: Collection[int]) -> float:
        return statistics.mean(losses[key][seed] for seed in seeds)

    def share_of_tokens(column: str, recipe: str, steps: int) -> float:
        seeds = losses[column, recipe, steps].keys()
        of_fast = {
            key[2]: mean(key, seeds)
            for key in losses
            if key[:2] == (column, FAST) and seeds <= losses[key].keys()
        }
        return steps_to(mean((column, recipe, steps), seeds), of_fast) / steps

    page = (ROOT / "docs" / "results.md").read_text()
    shown = {
        (column, row["recipe"], int(row["steps"])): cell
        for row in read_table(page, "recipe | steps")
        for column, cell in row.items()
        if cell and column not in ("recipe", "steps")
    }
    assert shown == {key: f"{mean(key, seeds):.3f}" for key, seeds in losses.items()}

    shares: dict[str, float] = {}
    quoted: defaultdict[tuple[str, str, str], set[str]] = defaultdict(set)
    for row in read_table(page, "to the loss of"):
        column, recipe = f"{row['text']}, {row['model']}", row["to the loss of"]
        steps = int(row["at steps"].replace(",", ""))
        share = share_of_tokens(column, recipe, steps)
        assert row["tokens"] == (f"{share:.2f}" if share > 0 else "below 0.25"), row
        assert int(row["seeds"]) == len(losses[column, recipe, steps]), row
        name = recipe.split(",")[0]
        shares[name] = max(share, shares.get(name, share))
        quoted[column, row["at steps"], name].add(row["tokens"])

    recipe_page = (ROOT / "docs" / "recipe.md").read_text()
    for row in read_table(recipe_page, "text | model | steps"):
        for name in (BASELINE, TUNED, FORMER):
            where = f"{row['text']}, {row['model']}", row["steps"], name
            assert row[name] in quoted[where] | {""}, where
    for row in read_table(recipe_page, "without | text"):
        column = f"{row['text']}, {row['model']}"
        setting = {"NorMuon": "muon_beta2 0.0", "sinusoids": "sinusoidal_wpe 0.0"}[row["without"]]
        without = (column, f"{FAST}, {setting}", 510)
        seeds = losses[without]
        assert int(row["seeds"]) == len(seeds), row
        higher = mean(without, seeds) - mean((column, FAST, 510), seeds)
        assert row["loss higher by"] == f"{higher:.3f}", row
        assert row["fewer tokens"] == f"{1 - share_of_tokens(*without):.1%}", row

    readme = (ROOT / "README.md").read_text()
    worst = f"at most {shares[BASELINE]:.2f} of the tokens", f"at most {shares[TUNED]:.2f} to"
    assert all(words in readme.replace("\n", " ") for words in worst)
    assert f"| tuned AdamW | {shares[TUNED]:.2f} |" in readme
