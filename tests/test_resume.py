"""A run can be continued with the same settings, or with more steps."""

import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import count, product
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import read_curve
from safetensors.torch import load_file

from engine import optim
from engine.checkpoint import choose_checkpoint, list_checkpoints
from engine.config import flag
from engine.evaluation import Evaluation
from engine.files import JSONLinesLog
from engine.metrics import read_metrics
from engine.optim import learning_rate, plateau_end
from engine.resume import extend_run, inherit_settings
from engine.shards import write_shard
from train_gpt2 import PretrainConfig, main


@dataclass(frozen=True)
class Settings:
    """Settings of a run. seed and max_lr must not change on resume; seed may be omitted."""

    seed: int | None = flag(None, "seed")
    max_lr: float = flag(0.5, "rate")
    keep: int = flag(2, "to keep", may_change=True)
    batch_size: int = flag(4, "sequences", may_change=True)
    resume: str = flag("auto", "resume", may_change=True)


def begin_run(run, config: dict) -> None:
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "metrics.jsonl").write_text('{"step": 0}\n')


def test_a_run_resumes_only_as_it_was(tmp_path):
    """A fixed setting must not change: the error lists both values. Other settings may change."""
    config = Settings(max_lr=1e-3, seed=1, keep=2, batch_size=4)
    inherit_settings(tmp_path, replace(config, resume="never"))
    begin_run(tmp_path, {**asdict(config), "seed": 2})
    allowed = replace(config, seed=None, keep=9, batch_size=2)
    assert inherit_settings(tmp_path, allowed) == {"seed": 2}
    with pytest.raises(ValueError, match=r"max_lr was 0.001, is 0.002; seed was 2, is 1"):
        inherit_settings(tmp_path, replace(config, max_lr=2e-3))
    with pytest.raises(ValueError, match="resume is never"):
        inherit_settings(tmp_path, replace(allowed, resume="never"))
    for content, problem in {"": "None", "- seed": r"\['seed'\]", "a": "'a'"}.items():
        (tmp_path / "config.yaml").write_text(content)
        expected = rf"config.yaml holds {problem}, expected lines NAME: VALUE; repair the file, or"
        with pytest.raises(ValueError, match=expected):
            inherit_settings(tmp_path, allowed)


def test_an_old_run_has_the_default_of_a_new_setting(tmp_path):
    """If config.yaml lacks a setting, the run resumes with its default and with no other value. If
    it has an unknown setting, the run does not resume, and the error names the setting.
    """
    begin_run(tmp_path, {"seed": 1, "batch_size": 4})
    assert inherit_settings(tmp_path, Settings(seed=1)) == {}
    with pytest.raises(ValueError, match=r"max_lr was 0.5, is 0.25"):
        inherit_settings(tmp_path, Settings(seed=1, max_lr=0.25))
    begin_run(tmp_path, {"seed": 1, "dropout": 0.1})
    with pytest.raises(ValueError, match=r"dropout was 0.1, is None"):
        inherit_settings(tmp_path, Settings(seed=1))


def wsd_config(out_dir, data_dir, **options) -> PretrainConfig:
    """Return the config of a tiny run with the WSD schedule, the one that can be extended."""
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4}
    rates = {"schedule": "wsd", "warmup_steps": 2, "max_lr": 1e-2, "min_lr": 0.0}
    system = {"device": "cpu", "precision": "fp32", "sample_every": 0, "eval_tokens": 64}
    options = {**sizes, **rates, **system, "total_batch_size": 128, "keep": 1, **options}
    return PretrainConfig(out_dir=str(out_dir), data_dir=str(data_dir), **options)


def read_weights(run) -> dict:
    return load_file(list_checkpoints(run)[-1] / "model.safetensors")


@pytest.fixture
def data_dir(tmp_path, no_plots):
    for split, length in (("train", 3000), ("val", 200)):
        write_shard(tmp_path / f"x_{split}.npy", np.arange(length))
    return tmp_path


def test_plateau_end_is_the_last_step_shared_with_longer_runs():
    """Rates equal those of longer runs up to plateau_end and no further. It is 0 for cosine."""
    for warmup, fraction, steps in product((0, 2, 9, 44, 99), (0, 0.01, 0.14, 0.4, 1), (9, 10, 50)):
        sizes = {"warmup_steps": warmup, "decay_fraction": fraction, "max_steps": steps}
        config = PretrainConfig(schedule="wsd", **sizes)
        end = plateau_end(config)
        assert 1 <= end <= steps
        for longer in (replace(config, max_steps=steps + 1), replace(config, max_steps=3 * steps)):
            rates = ((learning_rate(s, c) for c in (config, longer)) for s in range(1, steps + 1))
            assert [a == b for a, b in rates] == [True] * end + [False] * (steps - end)
    assert plateau_end(PretrainConfig(schedule="cosine")) == 0


def test_an_extended_run_equals_one_long_run(tmp_path, data_dir):
    """A finished WSD run that is extended twice equals, bit for bit, a single run of the final
    length: weights, losses, rates. The steps of the first decay are kept in until_step_10.
    """
    run, longer = tmp_path / "run", tmp_path / "longer"
    main(wsd_config(run, data_dir, max_steps=10))
    decayed, curve = read_weights(run), read_curve(run)
    for steps in (15, 20):
        main(wsd_config(run, data_dir, max_steps=steps))
    main(wsd_config(longer, data_dir, max_steps=20))
    assert read_curve(run) == read_curve(longer)
    for name, weight in read_weights(longer).items():
        assert np.array_equal(read_weights(run)[name], weight)
    ended = run / "until_step_10"
    assert read_curve(ended) == curve
    assert all(np.array_equal(read_weights(ended)[name], w) for name, w in decayed.items())
    assert yaml.safe_load((ended / "config.yaml").read_text())["max_steps"] == 10


def test_a_run_that_was_killed_in_its_decay_is_extended(tmp_path, data_dir):
    """The steps of the decay run again, even without a checkpoint in it. All are logged once. The
    weights of its best evaluation move with its log.
    """
    run, longer = tmp_path / "run", tmp_path / "longer"
    main(wsd_config(run, data_dir, max_steps=10))
    for checkpoint in list_checkpoints(run)[1:]:  # as if killed before the next save
        checkpoint.rename(tmp_path / checkpoint.name)
    for step in (5, 9):
        (run / "best" / f"step_00000{step}").mkdir(parents=True)
        progress = f'{{"step": {step}, "val_loss": 0.0}}'
        (run / "best" / f"step_00000{step}" / "progress.json").write_text(progress)
    main(wsd_config(run, data_dir, max_steps=20))
    assert [p.name for p in run.glob("best/*")] == ["step_000005"]
    assert [p.name for p in run.glob("until_step_10/best/*")] == ["step_000009"]
    main(wsd_config(longer, data_dir, max_steps=20))
    assert read_curve(run) == read_curve(longer)


def test_runs_that_cannot_be_extended(tmp_path, data_dir):
    """A run is not extended if its schedule is cosine, if max_steps is lower, if it has no
    checkpoint from before the decay, or if adapters were trained on its last checkpoint. The error
    leaves the run unchanged.
    """
    cosine = wsd_config(tmp_path / "cosine", data_dir, schedule="cosine", max_steps=4)
    main(cosine)
    with pytest.raises(ValueError, match=r"cosine schedule with max_steps 4.*wsd"):
        main(replace(cosine, max_steps=8))
    wsd = wsd_config(tmp_path / "wsd", data_dir, max_steps=10)
    main(wsd)
    with pytest.raises(ValueError, match=r"max_steps was 10, is 9"):
        main(replace(wsd, max_steps=9))
    with pytest.raises(ValueError, match=r"max_lr was 0.01, is 0.02"):
        main(replace(wsd, max_steps=20, max_lr=0.02))
    before = {f: f.read_bytes() for f in (tmp_path / "wsd").rglob("*") if f.is_file()}
    other = tmp_path / "other"
    other.mkdir()
    for split in ("train", "val"):
        write_shard(other / f"x_{split}.npy", np.arange(999))
    for wrong, message in (
        ({"batch_size": 3}, "not a multiple"),
        ({"data_dir": str(other)}, "trained on different data"),
    ):
        with pytest.raises(ValueError, match=message):
            main(replace(wsd, max_steps=20, **wrong))
    assert before == {f: f.read_bytes() for f in (tmp_path / "wsd").rglob("*") if f.is_file()}
    plateau, last = list_checkpoints(wsd.out_dir)
    (last / "adapter_base").write_text("x\n")
    with pytest.raises(ValueError, match=r"would move .*step_000010, the base of an adapter"):
        main(replace(wsd, max_steps=20))
    (last / "adapter_base").unlink()
    plateau.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"no checkpoint from before the decay \(step 7 or"):
        main(replace(wsd, max_steps=20))
    assert [p.name for p in list_checkpoints(wsd.out_dir)] == ["step_000010"]
    assert not (tmp_path / "wsd" / "until_step_10").exists()


class Killed(BaseException):
    """Ends a function where a kill would end the process."""


def run_until_rename(call: int, monkeypatch, function: Callable) -> bool:
    """Call a function, but kill it when it renames a file or a folder for the `call`-th time.
    Return whether it was killed.
    """
    calls, rename = count(1), Path.rename

    def rename_or_die(path: Path, target: Path) -> None:
        if next(calls) == call:
            raise Killed
        rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename_or_die)
        patch.setattr(Path, "replace", rename_or_die)
        with suppress(Killed):
            function()
            return False
    return True


def run_until_logged(last_step: int, monkeypatch, config: PretrainConfig) -> bool:
    """Run the command, but kill it after it has logged a step. Return whether it was killed."""
    append = JSONLinesLog.append

    def append_or_die(log: JSONLinesLog, record: dict) -> None:
        if record["step"] > last_step:
            raise Killed
        append(log, record)

    with monkeypatch.context() as patch, suppress(Killed):
        patch.setattr(JSONLinesLog, "append", append_or_die)
        main(config)
        return False
    return True


def read_attempt(run: Path) -> tuple[list, str, dict]:
    """Return the log with its times, a file beside it, and the files of the last checkpoint."""
    files = {file.name: file.read_bytes() for file in list_checkpoints(run)[-1].iterdir()}
    return read_metrics(run), (run / "note").read_text(), files


@pytest.mark.parametrize("until", [7, 8, 10])
def test_an_extension_that_was_killed_is_repeated(tmp_path, data_dir, monkeypatch, capsys, until):
    """Kill an extension before each file that it writes or moves. Run the shorter run again, until
    the step `until`, and extend it. Then until_step_10 holds the attempt that got further, or the
    later one if both ended: it resumes as finished.
    """
    first, run = tmp_path / "first", tmp_path / "run"
    config = wsd_config(run, data_dir, max_steps=10)
    longer = replace(config, max_steps=20)
    main(replace(config, out_dir=str(first)))
    (first / "note").write_text("first")
    for call in range(1, 8):  # four files, a checkpoint, the shorter log; the seventh never comes
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(first, run)
        is_killed = run_until_rename(call, monkeypatch, lambda: extend_run(run, longer))
        assert is_killed == (call < 7)
        expected = read_attempt(first)
        if until > 7 and call > 5:  # the checkpoint of step 10 has moved
            (run / "note").write_text("second")
            assert run_until_logged(until, monkeypatch, config) == (until < 10)
            expected = read_attempt(run) if until == 10 else expected
        extend_run(run, longer)
        assert read_attempt(run / "until_step_10") == expected
        assert [r["step"] for r in read_metrics(run)] == list(range(8))
        assert [path.name for path in list_checkpoints(run)] == ["step_000007"]
    main(replace(config, out_dir=str(run / "until_step_10")))
    assert "already finished after step 10 of 10" in capsys.readouterr().out


def test_a_run_with_the_rates_of_an_earlier_version(tmp_path, data_dir, monkeypatch, capsys):
    """Earlier versions finished the warmup even if it reached into the decay, and then fell to the
    rate of the decay. Such a run does not resume after its rates differ: the error has both rates.
    If it has finished, or is still before that step, it works.
    """

    def earlier_rate(step: int, config: PretrainConfig) -> float:
        return config.max_lr * (step / 9 if step <= 9 else (11 - step) / 4)

    sizes = {"max_steps": 10, "warmup_steps": 9, "save_every": 9, "keep": 3}
    config = wsd_config(tmp_path / "run", data_dir, **sizes)
    with monkeypatch.context() as patch:
        patch.setattr(optim, "learning_rate", earlier_rate)
        main(config)
    main(config)
    assert "already finished after step 10 of 10" in capsys.readouterr().out
    before, middle, last = list_checkpoints(config.out_dir)
    last.rename(tmp_path / "last")
    files = {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file()}
    message = r"rate of 0.00888\d* at step 8, but in this version it is 0.0075; resume it with the"
    with pytest.raises(ValueError, match=message):
        main(config)
    assert files == {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file()}
    middle.rename(tmp_path / "middle")
    assert before.name == "step_000007"
    main(config)
    rates = [r["lr"] for r in read_metrics(config.out_dir)[1:]]
    assert rates == pytest.approx([*(s / 900 for s in range(1, 8)), 0.0075, 0.005, 0.0025])


def test_a_run_that_was_killed_before_it_logged_may_change_max_steps(tmp_path, data_dir):
    """A run that has only written its config.yaml may start with any max_steps."""
    config = wsd_config(tmp_path / "run", data_dir, schedule="cosine", max_steps=2)
    main(config)
    for name in ("checkpoints", "metrics.jsonl"):
        (tmp_path / "run" / name).rename(tmp_path / name)
    main(replace(config, max_steps=3))
    assert [r["step"] for r in read_metrics(tmp_path / "run")] == [0, 1, 2, 3]


def test_patience_ends_pretraining(tmp_path, data_dir, monkeypatch, capsys):
    """Pretraining ends after `patience` evaluations without a new best, and stands for its latest
    checkpoint.
    """
    losses = [9.0, 5.0, 4.0, 6.0, 4.5, 3.0]  # of each step

    def evaluate_step(self: Evaluation, step: int) -> dict:
        self.val_losses += losses[step : step + 1] if step else []
        return {"val_loss": losses[step], "val_bpb": None}

    monkeypatch.setattr(Evaluation, "evaluate_step", evaluate_step)
    config = wsd_config(tmp_path / "run", data_dir, max_steps=5, patience=2, schedule="cosine")
    main(config)
    assert [r["step"] for r in read_metrics(config.out_dir)] == [0, 1, 2, 3, 4]
    assert choose_checkpoint(config.out_dir).name == "step_000004"
    main(config)
    assert "already finished after step 4 of 5" in capsys.readouterr().out


def test_a_run_of_the_other_command_is_refused(tmp_path):
    """train_gpt2.py does not resume a fine-tuning run. One line names the settings that differ."""
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "config.yaml").write_text("model_name_or_path: gpt2\nmax_lr: 1.0\n")
    with pytest.raises(ValueError, match=r"model_name_or_path was gpt2, is None.*Choose another"):
        inherit_settings(tmp_path, PretrainConfig())
