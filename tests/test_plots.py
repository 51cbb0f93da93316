"""Plots of runs show what the runs logged."""

import json
import shutil
from unittest.mock import Mock

import pytest
import yaml
from conftest import make_record, write_log
from processes import run_here

from engine.metrics import read_metrics
from engine.plots import MORE_PANELS, draw_runs, plot_runs


@pytest.fixture
def run(tmp_path):
    """A run folder with 21 records, whose name contains HTML."""
    folder = tmp_path / "run <b> & co"
    folder.mkdir()
    (folder / "config.yaml").write_text("data_dir: none\n")
    write_log(folder, map(make_record, range(21)))
    return folder


def test_curves_over_tokens_and_seconds(run):
    """The x axis can be steps, tokens, or the sum of the step times. The losses stay the same."""
    for x, last in (("step", 20), ("tokens", 1280), ("seconds", 10.0)):
        line = draw_runs([run], x).axes[0].lines[0]  # the training loss
        assert line.get_xdata()[-1] == pytest.approx(last)
        assert list(line.get_ydata()) == [9.5 - s / 10 for s in range(1, 21)]
    labels = [axes.get_ylabel() for axes in draw_runs([run], all_panels=True).axes]
    assert labels == ["loss, nats per token", *MORE_PANELS]


def test_the_training_loss_is_smoothed(run):
    """The plot has the raw training loss and its moving average over 2% of the steps (at least 5).
    The legend shows the final average.
    """
    write_log(run, ({"step": s, "tokens": 64 * s, "train_loss": s} for s in range(1, 201)))
    axes = draw_runs([run]).axes[0]
    raw, smoothed = axes.lines
    assert list(raw.get_ydata()) == list(range(1, 201))
    means = smoothed.get_ydata()
    assert means[:5].tolist() == [1, 1.5, 2, 2.5, 3]  # the first means are of fewer steps
    assert means[-1] == 198  # of 196 to 200
    label = axes.get_legend().get_texts()[0].get_text()
    assert label == f"{run.name} train 198.000, mean of 5 steps"


def test_plot_command(run, monkeypatch, capsys):
    """--out sets the image file. A glob stands for the runs that it matches, each drawn once. An
    unsupported suffix, or no run, is an error.
    """
    monkeypatch.chdir(run)
    run_here("plot.py", ".", "--x", "tokens", "--out", "a.svg")
    assert "<svg" in (run / "a.svg").read_text()
    drawn = Mock()
    monkeypatch.setattr("engine.plots.plot_runs", drawn)
    names = [run.with_name(name) for name in ("s 1", "s 2", "[3]")]
    for folder in names:
        shutil.copytree(run, folder)
    run.with_name("s 0").mkdir()  # not a run
    run_here("plot.py", "../s*", "../s 1", "../[3]", str(run.with_name("s*")))
    found = drawn.call_args.args[0]
    assert [path.resolve() for path in found] == [*names, *names[:2]]  # relative, then absolute
    monkeypatch.undo()
    monkeypatch.chdir(run)
    for args, error in (
        ((".", "--out", "a.doc"), "doc' is not supported"),
        (("../x*",), "../x*/metrics.jsonl: No such file"),
        ((), "required: RUN"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run_here("plot.py", *args)
        assert error in capsys.readouterr().err


def test_gpt2_loss_depends_on_the_data(tmp_path):
    """A run on FineWeb or FineWeb-Edu shows the validation loss of GPT-2 on that data. A run on
    other data shows none, even if its folder is called fineweb.
    """
    (tmp_path / "metrics.jsonl").write_text("")
    data = tmp_path / "fineweb"
    data.mkdir()
    (tmp_path / "config.yaml").write_text(f"data_dir: {data}\n")
    losses = {"fineweb": 3.4250, "fineweb-edu": 3.2924, "stdlib": None, "files": None}
    for dataset, loss in losses.items():
        (data / "manifest.json").write_text(json.dumps({"dataset": dataset, "shards": []}))
        labels = [line.get_label() for line in draw_runs([tmp_path]).axes[0].lines]
        assert labels == ([f"GPT-2 124M val {loss:.3f} (published)"] if loss else [])


def test_hellaswag_has_its_own_panel(run):
    """A run with HellaSwag gets a second panel with published accuracies of GPT-2 and GPT-3."""
    assert len(draw_runs([run]).axes) == 1
    logged = {"step": 21, "tokens": 1344, "hellaswag_acc_norm": 0.25, "hellaswag_acc": 0.25}
    write_log(run, [*read_metrics(run), logged])
    _, panel = draw_runs([run]).axes
    labels = " ".join(text.get_text() for text in panel.get_legend().get_texts())
    for text in ("acc_norm 0.2500", "acc_norm 0.3114", "0.2955", "GPT-3 Small, token-normalized"):
        assert text in labels


def test_each_run_has_its_color_in_all_panels(run, tmp_path):
    """Runs are drawn in the order given, each in one color, with its name in the legend."""
    other = tmp_path / "{other}"
    shutil.copytree(run, other)
    panels = draw_runs([run, other], all_panels=True).axes
    labels = [text.get_text() for text in panels[0].get_legend().get_texts()]
    splits = ("train 7.700, mean of 5 steps", "val 7.000")
    assert labels == [f"{folder.name} {split}" for folder in (run, other) for split in splits]
    assert [line.get_color() for line in panels[0].lines] == ["C0"] * 3 + ["C1"] * 3
    for panel in panels[1:]:
        assert [line.get_color() for line in panel.lines] == ["C0", "C1"]


def test_runs_that_differ_in_the_seed_are_averaged(run, tmp_path):
    """With mean, runs whose settings differ only in the seed and in what may change on resume are
    one curve: the mean, with a band from the minimum to the maximum, at the steps that all of them
    logged. Times are means too. Another run is drawn as without mean.
    """
    settings = {"seed": 1, "out_dir": "a", "eval_every": 1, "max_lr": 1e-3, "data_dir": "none"}
    changes = ({}, {"seed": 2, "out_dir": "b", "eval_every": 5}, {"seed": 1, "max_lr": 1e-4})
    runs = [tmp_path / f"r{i}" for i in range(3)]
    for i, (folder, change) in enumerate(zip(runs, changes, strict=True)):
        folder.mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump(settings | change))
        logged = {"val_loss": 4.0 + i, "train_loss": 7.0 + i, "step_ms": 1e3 * (i + 1)}
        records = [{"step": s, "tokens": 64 * s, **logged} for s in range(1, 11)]
        for record in records:
            if i == 1 and record["step"] % 5:
                del record["val_loss"]
        write_log(folder, records[: 10 - i])  # the second run has 9 steps
    (axes,) = draw_runs(runs, "seconds", mean=True).axes
    val, other_val = (line for line in axes.lines if line.get_gid() == "val_loss")
    assert val.get_xydata().tolist() == [[7.5, 4.5]]  # step 5, after 5 s and after 10 s
    assert other_val.get_ydata().tolist() == [6.0] * 8
    raw, smoothed = axes.lines[:2]
    assert raw.get_xdata().tolist() == [1.5 * s for s in range(1, 10)]
    assert raw.get_ydata().tolist() == smoothed.get_ydata().tolist() == [7.5] * 9
    bands = [band.get_paths()[0].vertices[:, 1] for band in axes.collections]
    assert [[band.min(), band.max()] for band in bands] == [[7, 8], [4, 5]]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    group = "r0 … r1, mean of 2 seeds (band: min to max),"
    assert labels == [
        f"{group} train 7.500, mean of 5 steps",
        f"{group} val 4.500",
        "r2 train 9.000, mean of 5 steps",
        "r2 val 6.000",
    ]
    assert len(draw_runs(runs).axes[0].lines) == 9
    assert len(draw_runs([run], mean=True).axes[0].collections) == 0


@pytest.mark.parametrize(
    ("name", "label"), [("a$b$c", r"a\$b\$c"), ("_x", " _x"), ("\u6a21", "\u6a21")]
)
def test_any_name_is_in_the_legend(run, name, label):
    """Names with characters that are special to matplotlib are shown unchanged."""
    named = run.rename(run.with_name(name))
    legend = draw_runs([named]).axes[0].get_legend()
    assert any(text.get_text().startswith(f"{label} val ") for text in legend.get_texts())
    plot_runs([named], named / "loss.png")
