import json
import math
import multiprocessing

import numpy as np
import pytest
import torch
from conftest import HELLASWAG_ROWS, ROOT, run_script
from processes import fork_server

from benchmarks import gpu, harness, lora, time_to_loss
from benchmarks.harness import TINY, BenchmarkConfig
from benchmarks.time_to_loss import BASELINE, FAST, RECIPES, TUNED, TimeToLossConfig
from engine.distributed import CPU_BF16_UNITS
from engine.shards import write_shard

QUICKEST = "train_step_64"
SLOW_PARTS = [pytest.param(part, marks=pytest.mark.slow) for part in gpu.PARTS if part != QUICKEST]


@pytest.mark.parametrize("part", [QUICKEST, *SLOW_PARTS])
def test_a_dry_run_of_the_gpu_benchmark(tmp_path, part):
    """Each part writes tables to results.md, and every row of them as a line to results.jsonl."""
    flags = ["--dry_run", "--parts", part, "--out_dir", tmp_path, "--data", HELLASWAG_ROWS]
    done = run_script("benchmarks/gpu.py", *flags)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "results.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("| ")]
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    names = [record["contender"] for record in records]
    n_tables = len({record["size"] for record in records})  # one header row per table
    assert len(names) == len(table) - n_tables
    assert all(any(row.startswith(f"| {name} |") for row in table) for name in names)
    assert all(record["seconds"] > 0 for record in records)


def test_a_failing_contender_does_not_stop_the_others(tmp_path, capsys):
    """If a contender fails, the reason is printed and the others are still measured."""
    errors = {"a": ImportError("No module named 'peer'"), "b": RuntimeError("out of memory")}

    def make(name, *_):
        if name in errors:
            raise errors[name]
        return lambda _: {"x": 3}

    file = tmp_path / "figures.jsonl"
    config = BenchmarkConfig(one_by_one=True, rounds=2, json_file=str(file))
    results = harness.measure(make, ["a", "b", "c"], TINY, config)
    assert list(results) == ["c"]
    out = capsys.readouterr().out
    assert "a, 1 x 8, 1 x 8, failed: No module named 'peer'" in out
    assert "b, 1 x 8, 1 x 8, failed: out of memory" in out
    (record,) = map(json.loads, file.read_text().splitlines())
    assert (record["contender"], record["x"]) == ("c", 3)


def test_contenders_are_chosen_by_name():
    """--contenders picks those whose names contain any of its strings. No match is an error."""
    names = ["full none", "lora none", "peft"]

    def measure(**flags):
        config = BenchmarkConfig(one_by_one=True, rounds=1, **flags)
        return list(harness.measure(lambda *_: lambda _: {}, names, TINY, config))

    assert measure(contenders=["none"]) == ["full none", "lora none"]
    with pytest.raises(ValueError, match="no contender's name contains"):
        measure(contenders=["nobody"])


def test_the_machine_is_named_once(capsys):
    """A line above the first table names the CPU, its bf16 units, the threads and torch version."""
    harness.print_machine.cache_clear()
    for _ in range(2):
        harness.print_table(["a"], [[1]])
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.endswith(f", {torch.get_num_threads()} threads, torch {torch.__version__}")
    capabilities = torch.cpu.get_capabilities()
    assert all((unit in first) == capabilities.get(unit, False) for unit in CPU_BF16_UNITS)
    assert rest == ["", "| a |", "|---|", "| 1 |"] * 2


@pytest.mark.parametrize("name", ["lora", "lora full", "lora none x", "other none"])
def test_invalid_names_of_lora_contenders(name):
    """A name that does not say what is trained and what is recomputed is an error."""
    with pytest.raises(ValueError, match="expected METHOD RECOMPUTE"):
        lora.make_contender(name, TINY, lora.LoRABenchmarkConfig())


def test_a_sweep_changes_one_setting_of_each_recipe():
    """A sweep adds one full-length run per recipe and setting, under a name of its own."""
    config = TimeToLossConfig(recipes=[FAST], sweep=["muon_lr=0.04", "beta1=0.9"], seeds=1)
    runs = time_to_loss.plan_runs(config, "data", "fp32")
    assert [run.recipe for run in runs[:-2]] == [FAST] * 4  # its four lengths
    assert [(run.recipe, run.settings, run.steps) for run in runs[-2:]] == [
        ("fast, muon_lr 0.04", {**RECIPES[FAST], "muon_lr": 0.04}, 600),
        ("fast, beta1 0.9", {**RECIPES[FAST], "beta1": 0.9}, 600),
    ]


def test_steps_to_a_loss():
    """Between runs, loss is linear in log(steps). Outside their range, the steps are infinite."""
    losses = {100: 4.0, 400: 3.0, 800: 2.8}
    assert time_to_loss.steps_to(4.0, losses) == 100
    assert time_to_loss.steps_to(3.5, losses) == pytest.approx(200)
    assert time_to_loss.steps_to(2.9, losses) == pytest.approx(400 * 2**0.5)
    assert time_to_loss.steps_to(4.1, losses) == -math.inf
    assert time_to_loss.steps_to(2.7, losses) == math.inf


def test_ratios_of_time_to_loss(capsys):
    """Token ratios come from mean losses. A single seed may never reach the loss."""
    losses = {TUNED: {400: [3.5, 3.1]}, FAST: {100: [4.0, 4.2], 400: [3.0, 3.2]}}
    time_to_loss.print_ratios(losses, {TUNED: 1.0, FAST: 2.0})
    row = capsys.readouterr().out.splitlines()[-1]
    tokens = 0.25 * 4**0.8  # from 4.1 to 3.1, with 3.3 at 0.8 of the way
    # One seed takes 200 of 400 steps, the other more than 400. A step takes twice the time.
    cells = [TUNED, f"{tokens:.2f}", "0.50", "above 1.00", f"{2 * tokens:.2f}"]
    assert [cell.strip() for cell in row.strip("| ").split("|")] == cells


def test_arrows_show_the_share_of_tokens():
    """An arrow from the end of each curve points to where the fast recipe reaches that loss,
    labeled with the share of tokens. If the fast recipe never reaches it, there is no arrow.
    """
    records = []
    # The fast recipe reaches the baseline loss in 200 steps; TUNED would take more than 400.
    finals = (BASELINE, 400, 3.5), (TUNED, 400, 2.9), (FAST, 100, 4.0), (FAST, 400, 3.0)
    for recipe, steps, loss in finals:
        record = {"recipe": recipe, "steps": steps, "seed": 1, "size": "1x64:4x32", "loss": loss}
        records.append(record | {"curve": [(steps // 2, loss + 1), (steps, loss)]})
    (axes,) = time_to_loss.draw_curves(records).axes
    arrow, label = axes.texts
    assert label.get_text() == "0.50 of the tokens"
    assert arrow.xy == pytest.approx((200 * 128 / 1e6, 3.5))
    assert arrow.xyann == label.xy == pytest.approx((400 * 128 / 1e6, 3.5))


def test_redrawing_trains_nothing(tmp_path, monkeypatch):
    """The figure in docs/ is drawn from finished runs alone. Missing runs are an error."""
    monkeypatch.setattr(time_to_loss, "train_run", pytest.fail)
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **_: figures.append(args))
    file = str(ROOT / "docs" / "time_to_loss.jsonl")
    time_to_loss.main(TimeToLossConfig(redraw=file, plot="a.png"))
    ((figure, name),) = figures
    assert name == "a.png"
    shares = [text.get_text() for text in figure.axes[0].texts if text.get_text()]
    assert shares == ["0.26 of the tokens", "0.41 of the tokens", "0.82 of the tokens"]
    with pytest.raises(ValueError, match="has no runs with these flags"):
        time_to_loss.main(TimeToLossConfig(redraw=file, steps=7))
    (tmp_path / "runs.jsonl").touch()
    with pytest.raises(ValueError, match="has no runs with these flags"):
        time_to_loss.main(TimeToLossConfig(redraw=str(tmp_path / "runs.jsonl")))


def test_finished_runs_are_not_repeated(tmp_path, monkeypatch, capsys):
    """A repeated command trains only the missing runs, here the second seed, and reports all."""
    server = fork_server()  # starts processes faster than spawn
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: server)
    for split, length in (("train", 20_000), ("val", 2_000)):
        write_shard(tmp_path / f"x_{split}.npy", np.arange(length))
    file, records = tmp_path / "out" / "runs.jsonl", []
    for seeds in (1, 2):
        sizes = {"size": "1x64:4x32", "steps": 4, "seeds": seeds, "jobs": 1}
        folders = {"data": str(tmp_path), "out_dir": str(file.parent)}
        time_to_loss.main(TimeToLossConfig(**sizes, **folders, recipes=[TUNED]))
        records.append([json.loads(line) for line in file.read_text().splitlines()])
    assert [len(after_command) for after_command in records] == [1, 2]
    assert records[0] == records[1][:1]
    assert records[1][0]["loss"] != records[1][1]["loss"]
    _, row = [line for line in capsys.readouterr().out.splitlines() if "AdamW" in line]
    assert all(f"{record['loss']:.3f}" in row for record in records[1])  # of the second command
