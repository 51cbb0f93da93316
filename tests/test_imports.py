"""Imports point one way: commands -> engine -> model. Slow packages are imported where used."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter

from conftest import WORKERS
from processes import ROOT

COMMANDS = {"train_gpt2", "finetune_lora", "hellaswag", "fineweb", "sample", "plot", "share"}
# Slow to import. `import torch` loads none of them.
HEAVY = {
    "datasets",
    "pyarrow",
    "matplotlib",
    "transformers",
    "huggingface_hub",
    "wandb",
    "tensorboard",
    "jinja2",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint",
}
# Not needed for training, so a machine that only runs the GPU tests may not have them.
OPTIONAL = {"datasets", "pyarrow", "tensorboard", "wandb", "lm_eval", "scipy"}
OPTIONAL |= {"nbformat", "nbclient", "IPython"}
# The layers of engine/, from low to high. A module imports only from lower layers.
LAYERS = [
    {"errors"},
    {"config", "files", "hub", "recompute", "tensors", "triton_loss"},
    {"tokenizer"},
    {"chat", "pretrained", "lora", "rows", "shards", "decode"},
    {"adapter", "data", "distributed", "documents"},
    {"instructions", "loss", "scoring"},
    {"optim", "checkpoint", "tasks"},
    {"memory", "step", "throughput", "resume"},
    {"metrics"},
    {"plots"},
    {"report", "evaluation"},
    {"training"},
]


def project_imports(module: str) -> Iterator[str]:
    """Yield the project modules that a module imports, even in functions or for type checking."""
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "engine":
            names = [f"engine.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} has a relative import"
            names = [node.module]
        else:
            continue
        yield from (name for name in names if name in MODULES)


ENGINE = {f"engine.{file.stem}" for file in ROOT.glob("engine/*.py") if file.stem != "__init__"}
MODULES = {*ENGINE, *COMMANDS, "model"}


def test_every_module_is_in_the_tables():
    """COMMANDS and LAYERS name exactly the modules that exist."""
    assert {file.stem for file in ROOT.glob("*.py")} == {*COMMANDS, "model"}
    names = [name for layer in LAYERS for name in layer]
    assert {f"engine.{name}" for name in names} == ENGINE
    assert len(names) == len(ENGINE)


def test_engine_imports_point_down():
    """A module of engine/ imports only model.py and modules of lower layers: no commands, and no
    others of its own layer. This rules out import cycles, even between type-only imports.
    """
    for level, layer in enumerate(LAYERS):
        allowed = {f"engine.{name}" for lower in LAYERS[:level] for name in lower} | {"model"}
        for name in layer:
            imported = {*project_imports(f"engine.{name}")}
            assert imported <= allowed, f"engine.{name} imports {imported - allowed}"
    graph = {module: {*project_imports(module)} for module in ENGINE}
    assert list(TopologicalSorter(graph).static_order())  # raises a CycleError


def test_commands_and_model_import_little():
    """Commands import only engine/ and model.py; model.py imports only engine.pretrained."""
    for command in COMMANDS:
        assert {*project_imports(command)} <= {*ENGINE, "model"}, command
    assert {*project_imports("model")} == {"engine.pretrained"}


def test_help_and_imports_have_no_side_effects(tmp_path):
    """Importing a module prints nothing, and `-h` prints the help. Neither writes a file, starts a
    process group, or loads a slow or optional package. `fineweb.py -h` needs no torch.
    """
    # The worker runs all of them in one process and in this order, so the set of loaded modules
    # only grows. fineweb.py comes first, because the others load torch.
    scripts = [f"{ROOT / name}.py" for name in ("fineweb", *sorted(COMMANDS - {"fineweb"}))]
    modules = MODULES - {"engine.triton_loss"}  # needs Triton
    command = [sys.executable, str(WORKERS / "show_help.py"), *scripts, *sorted(modules)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    printed = json.loads(result.stdout)  # script or module -> (its output, modules loaded so far)
    for name, (text, loaded) in printed.items():
        assert ("\noptions:\n" in text) if name in scripts else text == ""
        assert not HEAVY & {*loaded}
        assert ("torch" in loaded) == (name != scripts[0])
    assert {*loaded} >= modules  # after the last import, everything is loaded
    assert result.stderr == ""
    assert not list(tmp_path.iterdir())


def test_optional_packages_are_imported_in_functions_only():
    """Without an optional package, only the tests that need it are skipped. If a test module, or a
    benchmark that it imports, imported the package at the top, pytest would run no test at all.
    """
    for file in (*ROOT.glob("tests/*.py"), *ROOT.glob("benchmarks/*.py")):
        for node in ast.parse(file.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & OPTIONAL, file.name


def test_engine_code_does_not_load_through_model():
    """`GPT.from_pretrained` and `GPT.save_pretrained` are for users. The engine and the commands
    call engine.pretrained directly instead of going through model.py.
    """
    for module in [*ENGINE, *COMMANDS]:
        tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        names = {ast.unparse(func) for func in calls} - {"GPT2Tokenizer.from_pretrained"}
        methods = {name.rpartition(".")[2] for name in names if "." in name}
        assert not methods & {"from_pretrained", "save_pretrained"}, module


def test_one_function_opens_a_run():
    """Both training commands open a run only through `open_run`, which locks, checks, loads and
    builds in the right order. main(given) assigns `config` once, so all its code sees one config.
    """
    only_in_open_run = {"lock_folder", "inherit_settings", "load_latest", "last_usable_step"}
    for command in ("train_gpt2", "finetune_lora"):
        tree = ast.parse((ROOT / f"{command}.py").read_text())
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert "open_run" in names
        assert not names & only_in_open_run
        (main,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "main"]
        assert [arg.arg for arg in main.args.args] == ["given"]
        nodes = [node for node in ast.walk(main) if isinstance(node, ast.Name)]
        assert [(n.id, type(n.ctx)) for n in nodes].count(("config", ast.Store)) == 1
