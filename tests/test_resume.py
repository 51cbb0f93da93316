"""A run can be continued with the same settings, or with more steps."""

from dataclasses import asdict, dataclass, replace

import numpy as np
import pytest
import yaml
from conftest import read_curve
from safetensors.torch import load_file

from engine.checkpoint import choose_checkpoint, list_checkpoints
from engine.config import flag
from engine.evaluation import Evaluation
from engine.metrics import read_metrics
from engine.optim import learning_rate, plateau_end
from engine.resume import inherit_settings
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
    cases = (2, 0.4, 10), (2, 0.4, 11), (0, 0, 10), (5, 1, 10), (2, 0.01, 9)
    for warmup, fraction, steps in cases:
        sizes = {"warmup_steps": warmup, "decay_fraction": fraction, "max_steps": steps}
        config = PretrainConfig(schedule="wsd", **sizes)
        end = plateau_end(config)
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
