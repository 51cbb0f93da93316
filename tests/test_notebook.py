"""demo.ipynb: its commands, and what you see after running it."""

import re
import shlex
import shutil
from ast import literal_eval
from copy import deepcopy
from html import unescape

import pytest
from conftest import CONFIGS
from processes import HANG_SECONDS, ROOT

from engine.config import parse_flags

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
ipython_text = pytest.importorskip("IPython.utils.text")

NOTEBOOK = nbformat.read(ROOT / "demo.ipynb", as_version=4)
SETTING = re.compile(r'^(\w+) = ("\w+"|\d+)', re.MULTILINE)
TINY_SETTINGS = {"text": "README.md", "steps": 20, "finetune_steps": 20}


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def parse_commands(text: str, start: str, variables: dict | None = None) -> list:
    """Parse the commands in the text, which are the lines that begin with `start`. Return their
    configs. `variables` are filled in as IPython does it: {steps} is the value of `steps`.
    """
    lines = re.findall(rf"^\s*{re.escape(start)}(.+)", text.replace("\\\n", ""), re.MULTILINE)
    configs = []
    for line in lines:
        script, *args = shlex.split(
            ipython_text.DollarFormatter().vformat(line, [], variables or {})
        )
        config_class = CONFIGS[script.removesuffix(".py")]
        configs.append(config_class(**parse_flags(config_class, "", args)[0]))
    return configs


def test_form_and_flags(monkeypatch):
    """The notebook has ten code cells and no outputs. Its commands parse, and those of `make demo`
    are among them, with the same settings.
    """
    monkeypatch.chdir(ROOT)
    nbformat.validate(NOTEBOOK)
    cells = code_cells(NOTEBOOK)
    assert len(cells) == 10
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    text = "\n".join(cell.source for cell in cells[1:])  # the first one installs
    settings = {name: literal_eval(value) for name, value in SETTING.findall(cells[1].source)}
    commands = parse_commands(text, "!python ", settings)
    demo = (ROOT / "Makefile").read_text().split("\ndemo:")[1].split("\n\n")[0]
    demo_commands = parse_commands(demo, "$(BIN)/python ")
    assert len(demo_commands) == 4
    assert not [command for command in demo_commands if command not in commands]


@pytest.mark.slow
def test_running_the_notebook(tmp_path, monkeypatch):
    """In a copy of the project without a network, every cell runs and every command succeeds. The
    outputs hold the loss curve, the generated texts, the metrics and the report.
    """
    settings = {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    ignored = (ROOT / ".gitignore").read_text().replace("/", "").split()
    shutil.copytree(ROOT, tmp_path / "gpt2", ignore=shutil.ignore_patterns(".git", *ignored))
    notebook = deepcopy(NOTEBOOK)
    cells = code_cells(notebook)
    cells[0].source = f"get_ipython().system_raise_on_error = True\n{cells[0].source}"
    cells[1].source = SETTING.sub(lambda m: f"{m[1]} = {TINY_SETTINGS[m[1]]!r}", cells[1].source)
    resources = {"metadata": {"path": tmp_path / "gpt2"}}
    nbclient.NotebookClient(notebook, timeout=HANG_SECONDS, resources=resources).execute()

    outputs = {cell.id: cell.outputs for cell in cells}
    text = {name: "".join(o.get("text", "") for o in outputs[name]) for name in outputs}
    assert "image/png" in outputs["curve"][-1].data
    assert text["sample"].count("> Return the") == 3
    assert re.search(r"\d+ tokens, ", text["ask"])
    assert "bits_per_byte" in text["evaluate"]
    assert "acc_norm" in text["evaluate"]
    assert "Return the" in text["export"]
    assert "<!doctype html>" in unescape(outputs["report"][-1].data["text/html"])
