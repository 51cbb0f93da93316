"""The log of a run, the loggers that must agree with it, and the summary."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import CPU_DIST, make_record

from engine import metrics
from engine.config import TrainConfig
from engine.metrics import RunLogger, name_dataset, read_metrics, summarize_run

SAMPLE = "</pre><script>&amp;"  # text that must not be interpreted


def log_steps(run: Path, log: str, steps: range, start: int = 0) -> RunLogger:
    logger = RunLogger(TrainConfig(out_dir=str(run), max_steps=20, log=log), CPU_DIST, start)
    for step in steps:
        logger.log(make_record(step, SAMPLE))
    for each in logger.loggers.values():
        each.close()
    return logger


def test_the_log_is_appended_and_has_each_step_once(tmp_path):
    """A resumed run drops a line that a crash cut short and appends the steps that are missing."""
    log_steps(tmp_path, "", range(4))
    log = tmp_path / "metrics.jsonl"
    before = log.read_bytes()
    log.write_bytes(before + b'{"step": 4, "tok')
    assert read_metrics(tmp_path) == [make_record(step, SAMPLE) for step in range(4)]
    log_steps(tmp_path, "", range(2, 6), start=1)
    assert log.read_bytes().startswith(before)
    lines = log.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [make_record(step, SAMPLE) for step in range(6)]


@pytest.mark.parametrize("earlier_log", ["tensorboard", ""])
def test_tensorboard_equals_metrics_jsonl(tmp_path, earlier_log):
    """After a run is killed and resumed from an earlier step, TensorBoard's own reader finds each
    number in metrics.jsonl exactly once, even if TensorBoard was only turned on when resuming.
    """
    reader = "tensorboard.backend.event_processing.event_accumulator"
    reader = pytest.importorskip(reader, reason="needs tensorboard")
    log_steps(tmp_path, earlier_log, range(13))
    # As if killed after TensorBoard got step 12, but before metrics.jsonl did: step 12 repeats.
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    log_steps(tmp_path, "tensorboard", range(11, 21), start=10)
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"), {"scalars": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    for key in ("train_loss", "val_loss", "grad_norm", "lr", "tokens", "tokens_per_s"):
        expected = [(r["step"], r[key]) for r in read_metrics(tmp_path) if r.get(key) is not None]
        if key in tags["scalars"]:
            found = [(e.step, e.value) for e in events.Scalars(key)]
        else:
            found = [(e.step, read_double(e.tensor_proto)) for e in events.Tensors(key)]
        assert [step for step, _ in found] == [step for step, _ in expected], key
        assert [v for _, v in found] == pytest.approx([v for _, v in expected], rel=1e-6)
    texts = events.Tensors("sample_1/text_summary")
    assert [e.step for e in texts] == [0, 10, 20]
    assert SAMPLE in texts[0].tensor_proto.string_val[0].decode()


def read_double(tensor) -> float:
    """Read the number from a TensorBoard protobuf that holds one double."""
    return float([*tensor.double_val, *np.frombuffer(tensor.tensor_content)][0])


def test_wandb_resumes_the_same_run(tmp_path, monkeypatch):
    """When a run resumes, wandb continues the same run, even offline."""
    pytest.importorskip("wandb", reason="needs wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "config.yaml").write_text("max_steps: 20\n")
    log_steps(tmp_path, "wandb", range(3))
    run_id = (tmp_path / "wandb_id").read_text()
    log_steps(tmp_path, "wandb", range(2, 5), start=1)
    assert (tmp_path / "wandb_id").read_text() == run_id
    assert {f.name for f in tmp_path.glob("wandb/offline-run-*/*.wandb")} == {f"run-{run_id}.wandb"}


class FakeWandb:
    """Stands in for the module wandb and for its run. As in wandb's handler.go, the current step is
    0 until the first record comes, then at least `starting_step`, and lower steps are ignored with
    a warning. `starting_step` follows the last step that the server has.
    """

    __spec__ = SimpleNamespace(origin="wandb")
    Settings = dict

    def __init__(self) -> None:
        self.server: dict[int, dict] = {}  # what was uploaded
        self.n_ignored = 0

    def init(self, **options) -> "FakeWandb":
        assert options["resume"] == "allow"
        self.starting_step, self.step = max(self.server, default=-1) + 1, 0
        return self

    def log(self, values: dict, step: int) -> None:
        self.step = max(self.step, self.starting_step)
        if step < self.step:
            self.n_ignored += 1
            return
        self.step = step
        self.server.setdefault(step, {}).update(values)

    def finish(self) -> None:
        pass


@pytest.mark.parametrize("uploaded", [0, 8, 11, 14])
def test_wandb_gets_the_steps_that_a_killed_run_did_not_upload(tmp_path, monkeypatch, uploaded):
    """A run is killed after step 15, when W&B had the first `uploaded` steps, and resumes from step
    10. Then W&B has each step of metrics.jsonl once, and nothing was logged in vain.
    """
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    (tmp_path / "config.yaml").write_text("max_steps: 20\n")
    log_steps(tmp_path, "wandb", range(16))
    wandb.server = {step: wandb.server[step] for step in range(uploaded)}
    log_steps(tmp_path, "wandb", range(11, 21), start=10)
    assert wandb.n_ignored == 0
    assert [*wandb.server] == [record["step"] for record in read_metrics(tmp_path)]
    for record in read_metrics(tmp_path):
        logged = wandb.server[record["step"]]
        assert logged["val_loss"] == record["val_loss"]
        assert logged.get("train_loss") == record.get("train_loss")
        assert logged.get("sample_1") == record.get("samples", [None])[0]


def test_failing_logger_is_turned_off(tmp_path, monkeypatch, capsys):
    """An exception in a logger is printed once, and metrics.jsonl continues without that logger."""
    pytest.importorskip("tensorboard", reason="needs tensorboard")

    class Failing:
        def __init__(self, run, earlier):
            pass

        def write(self, record):
            raise ConnectionError("no route")

    monkeypatch.setitem(metrics.LOGGER_CLASSES, "tensorboard", Failing)
    assert log_steps(tmp_path, "tensorboard", range(4)).loggers == {}
    assert capsys.readouterr().out.count("logging to tensorboard is off from here on") == 1
    assert [r["step"] for r in read_metrics(tmp_path)] == [0, 1, 2, 3]


def test_samples_are_shown_without_blank_lines(tmp_path, capsys):
    """The terminal collapses blank lines in a sample; the log keeps the text unchanged."""
    logger = RunLogger(TrainConfig(out_dir=str(tmp_path), max_steps=20), CPU_DIST, 0)
    logger.log({"step": 0, "tokens": 0, "samples": ["a\n\n \n\n\nb\nc"]})
    assert "  sample: a\n  b\n  c\n" in capsys.readouterr().out
    assert read_metrics(tmp_path)[0]["samples"] == ["a\n\n \n\n\nb\nc"]


def test_time_left(tmp_path, capsys):
    """The time left is the median of recent steps times the steps left, plus the mean of the
    evaluations times those that are due. The first step and, if there are others, the first
    evaluation do not count, because they compile. Nor does a step that compiles again.
    """
    config = TrainConfig(out_dir=str(tmp_path), max_steps=1000, eval_every=50, sample_every=100)
    logger, left = RunLogger(config, CPU_DIST, 0), {}
    logger.log({"step": 0, "tokens": 0, "eval_ms": 60_000.0})
    for step in range(1, 101):
        compiles = step in (1, 7, 30)
        record = make_record(step) | {"step_ms": 20_000.0 if compiles else 500.0}
        logger.log(record | ({"eval_ms": 10_000.0} if step % 50 == 0 else {}))
        text = re.search(r"\| ([^|]+) left$", capsys.readouterr().out, re.MULTILINE)
        left |= {step: text[1]} if text else {}
    # The evaluated steps are printed. 950 x 0.5 s + 19 x 10 s; 900 x 0.5 s + 18 x 10 s
    assert left == {50: "11 minutes", 100: "10 minutes"}


def test_time_left_of_a_resumed_run(tmp_path, capsys, monkeypatch):
    """Before the first evaluation of a resumed run, only its own steps count, without the first."""
    monkeypatch.setattr(metrics, "PROGRESS_SECONDS", -1)  # print every step
    logger = RunLogger(TrainConfig(out_dir=str(tmp_path), max_steps=48), CPU_DIST, 10)
    for step in (11, 12):
        logger.log(make_record(step) | {"step_ms": 60_000.0 if step == 11 else 2000.0})
    assert "| 72 s left" in capsys.readouterr().out.splitlines()[-1]


def save_run(run: Path, progress: dict) -> Path:
    """Write a run folder with records of the steps 0 to 20. Return its checkpoint."""
    (run / "config.yaml").write_text("max_steps: 40\ndata_dir: none\n")
    log_steps(run, "", range(21))
    checkpoint = run / "checkpoints" / f"step_{progress['step']:06d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "progress.json").write_text(json.dumps(progress))
    return checkpoint


def test_summary_of_a_run(tmp_path, capsys):
    """The summary draws on the config, the facts in the checkpoint, and the log up to that
    checkpoint. It leaves out what was not logged. It is printed at the end of a run.
    """
    checkpoint = save_run(tmp_path, {"step": 10, "facts": {"parameters": "7,000,000"}})
    summary = summarize_run(tmp_path, checkpoint)
    assert summary == {
        "validation loss": "9.0000 to 8.0000",
        "best validation loss": "8.0000 at step 10",
        "training loss": "8.5000",
        "speed, median": "128 tokens/s",
        "time in training steps": "0:00:05",
        "peak memory": "0.60 GB",
        "steps": "10 of 40",
        "tokens trained on": "640",
        "data": "files in none",
        "parameters": "7,000,000",
    }
    RunLogger(TrainConfig(out_dir=str(tmp_path), max_steps=40), CPU_DIST, 10).finish()
    lines = dict(re.findall("^(.+?)  +(.*)$", capsys.readouterr().out, re.MULTILINE))
    assert lines.items() > summary.items()
    assert lines["sample before"] == repr(f"{SAMPLE} at 0")
    assert lines["report"] == str(tmp_path / "report.html")
    assert lines["in transformers"] == f"AutoModelForCausalLM.from_pretrained('{checkpoint}')"


def test_summary_without_facts(tmp_path):
    """A checkpoint of an earlier version has no facts, so its summary has none after "data"."""
    assert list(summarize_run(tmp_path, save_run(tmp_path, {"step": 20})))[-1] == "data"


def test_names_of_datasets(tmp_path, monkeypatch):
    """A dataset goes by the name in its manifest, or by its name on the hub. Your own files go by
    the name of their folder or file, without the path.
    """
    monkeypatch.chdir(tmp_path)
    for name, dataset in (("a", "stdlib"), ("b", "files")):
        Path(name).mkdir()
        Path(name, "manifest.json").write_text(json.dumps({"dataset": dataset, "shards": []}))
    for setting, expected in {
        f"data_dir: {tmp_path}/a": "stdlib",
        "data_dir: b": "files in b",
        "data_dir: data/mine": "files in mine",
        "data: ./a": "a",
        "data: user/name-2.5": "user/name-2.5",
        "data: gone/rows.jsonl": "rows.jsonl",
        f"data: {tmp_path}/rows": "rows",
    }.items():
        Path("config.yaml").write_text(setting)
        assert name_dataset(tmp_path) == expected
