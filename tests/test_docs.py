"""What the documentation tells a user to type, open and read, held against the project itself."""

import contextlib
import dataclasses
import importlib
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_commands import ROOT, TINY, run

import cli
import finetune_lora
import fineweb
import hellaswag
import sample
import share
import train_gpt2
from checkpoint import checkpoints, load_progress, load_state
from data import TokenShards, read_manifest

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ROW = {"ctx_a": "A man", "ctx_b": "he", "endings": ["sits.", "runs.", "is.", "eats."], "label": 0}

# Run as they stand, in this order, on tiny files and a tiny model in the place of what they name.
RUN = [
    "python fineweb.py --dataset notes.txt corpus/ 'more/*.jsonl.gz' --out_dir data/mine",
    "python finetune_lora.py --model_name_or_path runs/demo --data mine.jsonl --out_dir "
    "runs/mine_lora --epochs 3 --max_lr 1e-3 --merge_out merged",
    "python hellaswag.py --model runs/demo --data hellaswag_val.jsonl --out_dir results/demo",
    "python hellaswag.py --model runs/demo --task text --data notes.txt --stride 64",
    'python sample.py --model runs/demo --prompt "Return the" --num_return_sequences 5 --seed 42',
    "python plot.py runs/a runs/b",
    "python share.py --run runs/demo --repo_id me/my-gpt2 --dry_run true",
    "python -c \"from transformers import pipeline; print(pipeline('text-generation', "
    "'runs/demo/checkpoints/step_000400')('Return the', max_new_tokens=50))\"",
]
HUB = "reads from the hub"
HOURS = "hours, or a GPU"
TERMINAL = "waits for prompts on a terminal: test_sample.py has one"
NODES = "8 devices or 2 nodes: test_distributed.py starts ranks"
MAKE = "makes an environment of its own; what it calls is tested here"
# Only parsed, by the parser of their script and with their config.
NOT_RUN = {
    "make demo": MAKE,
    "make test": MAKE,
    "python fineweb.py": HUB,
    "python fineweb.py --dataset stdlib": "test_fineweb.py has it",
    "python train_gpt2.py": HOURS,
    "python train_gpt2.py --config configs/gpt2_124m_fast.yaml": HOURS,
    "torchrun --standalone --nproc_per_node=8 train_gpt2.py": NODES,
    "python train_gpt2.py --init_from gpt2 --data_dir data/mine --out_dir runs/mine "
    "--max_steps 200 --warmup_steps 20 --batch_size 4 --total_batch_size 32768 "
    "--max_lr 1e-4 --min_lr 1e-5": HUB,
    "torchrun --nnodes=2 --nproc_per_node=8 --max_restarts=3 --rdzv_backend=c10d "
    "--rdzv_id=gpt2 --rdzv_endpoint=FIRST_NODE:29500 train_gpt2.py": NODES,
    "python finetune_lora.py --lora_dim 8": HUB,
    "python sample.py --model runs/demo": TERMINAL,
    "python hellaswag.py --model gpt2": HUB,
    "for m in gpt2 gpt2-medium gpt2-large gpt2-xl; do for t in lm-eval raw; do "
    "python hellaswag.py --model $m --text $t --precision fp32 --out_dir results/$m-$t; "
    "done; done": HUB,
    "lm_eval --model hf --model_args pretrained=runs/demo/checkpoints/step_000400 "
    "--tasks hellaswag": "reads from the hub; test_interop.py has it on local rows",
}
# Flags in the text that belong to others than the commands here.
FOREIGN_FLAGS = {
    "lm_eval": {"model", "model_args", "tasks"},
    "torchrun": {"standalone", "nproc_per_node", "nnodes", "max_restarts"}
    | {"rdzv_backend", "rdzv_id", "rdzv_endpoint"},
    "plot.py": {"out", "x"},
    "cli.py": {"config", "debug", "print_config"},
}


def documented() -> list[str]:
    """The commands in the sh blocks of the pages: comments away, lines that belong together one."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            lines = re.sub(r"[ \t]+#.*$|^#.*$", "", block.replace("\\\n", " "), flags=re.MULTILINE)
            lines = re.sub(r"\bdo\n", "do ", lines)  # a loop goes on in the next line
            found += [" ".join(line.split()) for line in lines.splitlines() if line.strip()]
    return found


COMMANDS = documented()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_run_or_has_a_reason(command):
    """No command is documented that nobody looks at."""
    assert command in RUN or command in NOT_RUN, f"in neither table of test_docs.py: {command}"


def test_the_tables_hold_nothing_else():
    """Every command of the two tables is documented, so that none is tested for nobody."""
    assert {*RUN, *NOT_RUN} <= set(COMMANDS)


def test_every_flag_exists():
    """A flag that the text speaks of is one of some command."""
    configs = (
        fineweb.PrepareConfig,
        train_gpt2.PretrainConfig,
        finetune_lora.FinetuneConfig,
        hellaswag.EvalConfig,
        sample.SampleConfig,
        share.ShareConfig,
    )
    known = {f.name for config in configs for f in dataclasses.fields(config)}
    known |= set().union(*FOREIGN_FLAGS.values())
    for page in PAGES:
        # Benchmarks have flags of their own.
        text = re.sub(r"python benchmarks/[^`]*`(; `--\w+)?", "", page.read_text())
        unknown = set(re.findall(r"(?<![\w-])--(\w+)", text)) - known
        assert not unknown, f"{page.name}: {unknown}"


def type_in(command: str, patch: pytest.MonkeyPatch) -> None:
    """Do what a command line does, without the seconds that a process takes."""
    words = shlex.split(command)
    if words[1] == "-c":
        exec(words[2], {})
        return
    start = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script = ROOT / words[start]
    patch.setattr(sys, "argv", words[start:])
    if script.name == "plot.py":  # alone without a config
        runpy.run_path(str(script), run_name="__main__")
        return
    config_class = re.search(r"cli\.run\(main, (\w+)", script.read_text())[1]
    module = importlib.import_module(script.stem)
    cli.run(module.main, getattr(module, config_class), "")


@pytest.mark.parametrize("command", [c for c in NOT_RUN if ".py" in c])
def test_every_command_parses(command, monkeypatch, capsys):
    """Flags, values and config files of what is not run are accepted by their own script."""
    for name, value in re.findall(r"for (\w) in (\S+)", command):
        command = command.replace(f"${name}", value)
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as exit_:
        type_in(re.split(r"; done", command)[0] + " --print_config", monkeypatch)
    assert exit_.value.code == 0, capsys.readouterr().err


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with the files that the documentation speaks of, and a tiny model as runs/demo."""
    folder = tmp_path_factory.mktemp("docs")
    text = Path(__file__).read_text()
    (folder / "notes.txt").write_text(text)
    for name in ("corpus", "more"):
        (folder / name).mkdir()
    (folder / "corpus" / "a.txt").write_text(text)
    (folder / "more" / "b.jsonl").write_text(json.dumps({"text": text}) + "\n")
    subprocess.run(["gzip", folder / "more" / "b.jsonl"], check=True)
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(20)]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "data" / "others").mkdir(parents=True)
    header = np.array([20240520, 1, 3] + [0] * 253, dtype="<i4")
    tokens = np.array([50256, 15496, 13], dtype="<u2")
    (folder / "data" / "others" / "tiny_val.bin").write_bytes(header.tobytes() + tokens.tobytes())
    (folder / "hellaswag_val.jsonl").write_text(json.dumps({**ROW, "activity_label": "x"}) + "\n")
    prepared = run("fineweb.py", "--dataset", "notes.txt", "--val_tokens", "600", cwd=folder)
    assert prepared.returncode == 0, prepared.stderr
    sizes = {"block_size": 512, "batch_size": 1, "total_batch_size": 512, "max_steps": 2}
    settings = yaml.safe_load(TINY) | sizes | {"warmup_steps": 1}
    with contextlib.chdir(folder):
        train_gpt2.main(
            train_gpt2.PretrainConfig(data_dir="data/notes", out_dir="runs/demo", **settings)
        )
    for name in ("a", "b"):
        shutil.copytree(folder / "runs" / "demo", folder / "runs" / name)
    trained = folder / "runs" / "demo" / "checkpoints"  # the demo has 400 steps
    shutil.copytree(trained / "step_000002", trained / "step_000400")
    return folder


@pytest.fixture(scope="module")
def used(workplace) -> Path:
    """The same folder after all commands that are run."""
    with contextlib.chdir(workplace), pytest.MonkeyPatch.context() as patch:
        for command in RUN:
            type_in(command, patch)
    return workplace


def test_commands_run_as_they_stand(used):
    """What can be run here, typed as the documentation has it, leaves what that speaks of."""
    for file in (
        "data/mine/manifest.json",
        "runs/mine_lora/report.html",
        "merged/model.safetensors",
        "results/demo/results.json",
        "loss.png",
        "runs/demo/share/README.md",
    ):
        assert (used / file).is_file(), file


def test_python_blocks_run(used):
    """The Python in the pages runs as it stands, and shards of either kind come out as data.py
    reads them.
    """
    block = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
    names: dict = {}
    with contextlib.chdir(used):
        for page in PAGES:
            for code in block.findall(page.read_text()):
                exec(code, names)
        for split, folder, name in (("train", "mine", "ours"), ("val", "others", "theirs")):
            shards = TokenShards(f"data/{folder}", split)
            assert names[name].tolist() == shards.read(0, len(shards)).tolist()


def test_formats_are_what_is_written(used):
    """docs/formats.md names every key and every file of a run, of its checkpoints, of a manifest
    and of an evaluation.
    """
    text = (ROOT / "docs" / "formats.md").read_text()
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    named = {name.rstrip("/") for name in re.findall(r"`([^`\n]+)`", text)}

    def keys(file: str) -> set[str]:
        return {key for line in (used / file).read_text().splitlines() for key in json.loads(line)}

    there = keys("runs/mine_lora/train_data.json") | keys("results/demo/rows.jsonl")
    for name in ("demo", "mine_lora"):
        run_folder = used / "runs" / name
        checkpoint = checkpoints(run_folder)[-1]
        there |= keys(f"runs/{name}/metrics.jsonl") | load_state(checkpoint).keys()
        there |= load_progress(checkpoint).keys()
        there |= {file.name for file in checkpoint.iterdir()}
        there |= {file.name for file in run_folder.iterdir()} - {"checkpoints"}
    manifest = read_manifest(used / "data" / "mine")
    results = json.loads((used / "results" / "demo" / "results.json").read_text())
    there |= {*manifest, *manifest["shards"][0], *results["acc"], "config", "rows"}
    there |= {file.name for file in (used / "results" / "demo").iterdir()}
    assert there <= named, sorted(there - named)


def test_the_file_table_is_the_project():
    """Every script and folder at the top has its row in README's table, and no row has gone."""
    section = (ROOT / "README.md").read_text().split("\n## Files\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\|([^|]*`[^|]*)\|", section, re.MULTILINE)
    named = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    made = {"data", "runs", "results", "__pycache__"}  # by the commands
    folders = {f"{f.name}/" for f in ROOT.iterdir() if f.is_dir() and f.name[0] != "."}
    there = {f.name for f in ROOT.glob("*.py")} | folders - {f"{name}/" for name in made}
    assert sorted(named) == sorted(there)


def test_links_resolve():
    """Every relative link of the documentation leads to a file of the project."""
    for page in (*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"):
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            assert "://" in link or (page.parent / link).exists(), f"{page.name}: {link}"


def test_readme_is_short():
    """The README stays under 250 lines."""
    assert len((ROOT / "README.md").read_text().splitlines()) < 250
