"""Whether the run in a folder can be continued: with the same settings, or with more steps."""

from dataclasses import asdict, dataclass, replace

import numpy as np
import pytest
import yaml
from conftest import read_curve
from safetensors.torch import load_file

from engine.checkpoint import list_checkpoints
from engine.config import flag
from engine.metrics import read_metrics
from engine.optim import learning_rate, plateau_end
from engine.resume import check_same_run
from engine.shards import write_shard
from train_gpt2 import PretrainConfig, main


@dataclass(frozen=True)
class Settings:
    """Settings of which seed and max_lr are fixed; seed may be left open."""

    seed: int | None = flag(None, "seed")
    max_lr: float = flag(0.5, "rate")
    keep: int = flag(2, "to keep", may_change=True)
    batch_size: int = flag(4, "sequences", may_change=True)
    resume: str = flag("auto", "resume", may_change=True)


def begin_run(run, config: dict) -> None:
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "metrics.jsonl").write_text('{"step": 0}\n')


def test_a_run_resumes_only_as_it_was(tmp_path):
    """Fixed settings must not change, and the error lists both values; others may."""
    config = Settings(max_lr=1e-3, seed=1, keep=2, batch_size=4)
    check_same_run(tmp_path, replace(config, resume="never"))
    begin_run(tmp_path, {**asdict(config), "seed": 2})
    free = replace(config, seed=None, keep=9, batch_size=2)
    assert check_same_run(tmp_path, free) == {"seed": 2}
    with pytest.raises(ValueError, match=r"max_lr was 0.001, is 0.002; seed was 2, is 1"):
        check_same_run(tmp_path, replace(config, max_lr=2e-3))
    with pytest.raises(ValueError, match="resume is never"):
        check_same_run(tmp_path, replace(free, resume="never"))
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ValueError, match=r"config.yaml is damaged"):
        check_same_run(tmp_path, free)


def test_a_run_from_before_a_setting_has_had_its_default(tmp_path):
    """A run whose config.yaml lacks a setting resumes with its default and with no other value; an
    unknown setting there prevents resuming, and the error names it.
    """
    begin_run(tmp_path, {"seed": 1, "batch_size": 4})
    assert check_same_run(tmp_path, Settings(seed=1)) == {}
    with pytest.raises(ValueError, match=r"max_lr was 0.5, is 0.25"):
        check_same_run(tmp_path, Settings(seed=1, max_lr=0.25))
    begin_run(tmp_path, {"seed": 1, "dropout": 0.1})
    with pytest.raises(ValueError, match=r"dropout was 0.1, is None"):
        check_same_run(tmp_path, Settings(seed=1))


def wsd_config(out_dir, data_dir, **options) -> PretrainConfig:
    """A tiny run of the schedule that can be extended."""
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
    """Up to plateau_end and no further, the rates equal those of any longer run; 0 for cosine."""
    for warmup, fraction, steps in (
        (2, 0.4, 10),
        (2, 0.4, 11),
        (0, 0, 10),
        (5, 1, 10),
        (2, 0.01, 9),
    ):
        config = PretrainConfig(
            schedule="wsd", warmup_steps=warmup, decay_fraction=fraction, max_steps=steps
        )
        end = plateau_end(config)
        for longer in (replace(config, max_steps=steps + 1), replace(config, max_steps=3 * steps)):
            same = [
                learning_rate(s, config) == learning_rate(s, longer) for s in range(1, steps + 1)
            ]
            assert same == [True] * end + [False] * (steps - end)
    assert plateau_end(PretrainConfig(schedule="cosine")) == 0


def test_an_extended_run_is_the_longer_run(tmp_path, data_dir):
    """A finished wsd run that is extended, twice, equals a run of that length to the bit: weights,
    losses, rates. What it did in its decay stays as a run folder of its own.
    """
    run, longer = tmp_path / "run", tmp_path / "longer"
    main(wsd_config(run, data_dir, max_steps=10))
    decayed, curve = read_weights(run), read_curve(run)
    for steps in (15, 20):
        main(wsd_config(run, data_dir, max_steps=steps))
    main(wsd_config(longer, data_dir, max_steps=20))
    assert read_curve(run)[:-1] == read_curve(longer)[:-1]
    assert read_curve(run)[-1] == read_curve(longer)[-1]
    for name, weight in read_weights(longer).items():
        assert np.array_equal(read_weights(run)[name], weight)
    ended = run / "until_step_10"
    assert read_curve(ended) == curve
    assert all(np.array_equal(read_weights(ended)[name], w) for name, w in decayed.items())
    assert yaml.safe_load((ended / "config.yaml").read_text())["max_steps"] == 10


def test_a_run_that_was_killed_in_its_decay_is_extended(tmp_path, data_dir):
    """Without a checkpoint in the decay its logged steps are taken back all the same."""
    run, longer = tmp_path / "run", tmp_path / "longer"
    main(wsd_config(run, data_dir, max_steps=10))
    for checkpoint in list_checkpoints(run)[1:]:  # as if killed before the next save
        checkpoint.rename(tmp_path / checkpoint.name)
    main(wsd_config(run, data_dir, max_steps=20))
    main(wsd_config(longer, data_dir, max_steps=20))
    assert read_curve(run) == read_curve(longer)


def test_runs_that_cannot_be_extended(tmp_path, data_dir):
    """A cosine, fewer steps, a run without a checkpoint from before the decay, and one whose last
    checkpoint is the base of adapters are refused, and nothing in them changes.
    """
    cosine = wsd_config(tmp_path / "cosine", data_dir, schedule="cosine", max_steps=4)
    main(cosine)
    with pytest.raises(ValueError, match=r"max_steps 4, on which a cosine depends.*wsd"):
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
    with pytest.raises(ValueError, match=r"adapters were trained on .*step_000010"):
        main(replace(wsd, max_steps=20))
    (last / "adapter_base").unlink()
    plateau.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"no checkpoint from before the decay, of step 7 or"):
        main(replace(wsd, max_steps=20))
    assert [p.name for p in list_checkpoints(wsd.out_dir)] == ["step_000010"]
    assert not (tmp_path / "wsd" / "until_step_10").exists()


def test_a_run_that_was_killed_before_its_first_line_starts_with_more_steps(tmp_path, data_dir):
    """A run that has written its config.yaml and nothing else may have any max_steps."""
    config = wsd_config(tmp_path / "run", data_dir, schedule="cosine", max_steps=2)
    main(config)
    for name in ("checkpoints", "metrics.jsonl"):
        (tmp_path / "run" / name).rename(tmp_path / name)
    main(replace(config, max_steps=3))
    assert [r["step"] for r in read_metrics(tmp_path / "run")] == [0, 1, 2, 3]


def test_a_run_of_the_other_command_is_named(tmp_path):
    """A fine-tuning run is not resumed by train_gpt2.py; one line names the settings it lacks."""
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "config.yaml").write_text("model_name_or_path: gpt2\nmax_lr: 1.0\n")
    with pytest.raises(ValueError, match=r"model_name_or_path was gpt2, is None.*Choose another"):
        check_same_run(tmp_path, PretrainConfig())
