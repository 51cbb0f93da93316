"""Open a run: a new one, one to resume with the same settings, or one to extend to more steps."""

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path

from engine.checkpoint import BASE_MARK, RunState, list_checkpoints, load_latest, read_run_config
from engine.config import TrainConfig, fixed_settings
from engine.distributed import Config, Distributed
from engine.files import JSONLinesLog, lock_folder, write_atomically
from engine.optim import learning_rate, plateau_end
from model import GPT


@contextmanager
def open_run(
    given: Config,
    dist: Distributed,
    build_model: Callable[[Config], GPT],
    resolve: Callable[[Config, GPT], Config],
    base: str | None = None,
) -> Iterator[tuple[Config, GPT, RunState | None]]:
    """Lock the run folder. Yield the complete config, the model, and the state to resume from.

    `given` is the config from the command line. A new run has no state, and `build_model` makes its
    model. `resolve` fills in the settings that depend on the model, the data or the device. `base`
    is the name of the base model, needed to resume a run that trains an adapter.

    This writes only the lock. Later, `train` calls `extend_run` and writes config.yaml.
    """
    run = Path(given.out_dir)
    with lock_folder(run) if dist.is_main else nullcontext():
        with dist.main_process_first():
            config = replace(given, **inherit_settings(run, given))
            latest = load_latest(run, base, last_step=last_usable_step(run, config))
            model, resumed = latest or (build_model(config), None)
        del build_model  # frees the base model that it may refer to
        yield resolve(config, model), model, resumed


def inherit_settings(run: Path, config: TrainConfig) -> dict:
    """Return the settings of the existing run that are None in `config`, or {} if there is no run.
    Raises ValueError if `config` would not continue the run exactly. A larger max_steps is allowed
    if the run can be extended.
    """
    if not (run / "metrics.jsonl").exists() and not list_checkpoints(run):
        return {}
    now = asdict(config)
    if now["resume"] == "never":
        raise ValueError(f"{run} holds a run already, but resume is never; choose another out_dir")
    # A setting that was added after the run started has its default.
    earlier = {f.name: f.default for f in fields(config)} | read_run_config(run)
    fixed = fixed_settings(type(config))
    inherited = {name: earlier[name] for name in fixed if now[name] is None}
    # Settings that only the run has come from another version or command. Refuse them as well.
    compared = (fixed - inherited.keys()) | (earlier.keys() - now.keys())
    changed = sorted(name for name in compared if earlier[name] != now.get(name))
    is_longer = "max_steps" in changed and now["max_steps"] > earlier["max_steps"]
    refused = [name for name in changed if not (is_longer and name == "max_steps")]
    if refused:
        changes = "; ".join(f"{name} was {earlier[name]}, is {now.get(name)}" for name in refused)
        raise ValueError(
            f"{run} holds a run with different settings, so it cannot be resumed exactly: "
            f"{changes}. Choose another out_dir, or restore the settings"
        )
    if is_longer:
        check_extension(run, replace(config, **inherited), earlier["max_steps"])
    return inherited


def last_usable_step(run: Path, config: TrainConfig) -> int | None:
    """If `config` extends the existing run, return the last step before the decay of that run. The
    extended run must continue from that step or an earlier one. Otherwise return None: the run can
    continue from any step.
    """
    has_config = (run / "config.yaml").is_file()
    earlier = read_run_config(run).get("max_steps") if has_config else None
    if earlier is None or config.max_steps is None or config.max_steps <= earlier:
        return None
    return plateau_end(replace(config, max_steps=earlier))


def check_extension(run: Path, config: TrainConfig, earlier_max_steps: int) -> None:
    """Raise ValueError if the run cannot be extended to config.max_steps."""
    if config.schedule != "wsd":
        raise ValueError(
            f"{run} has a cosine schedule with max_steps {earlier_max_steps}; only runs with "
            "schedule wsd can be extended. Start a new run from its weights (init_from, "
            "model_name_or_path or lora_load_path) with a lower max_lr and another out_dir"
        )
    end = plateau_end(replace(config, max_steps=earlier_max_steps))
    checkpoints = list_checkpoints(run)
    if checkpoints and checkpoints == list_checkpoints(run, after=end):
        raise ValueError(
            f"{run} cannot be extended: it has no checkpoint from before the decay (step {end} or "
            f"earlier); use init_from {run} and another out_dir"
        )
    later = list_checkpoints(run, after=end, with_best=True)
    if bases := [path for path in later if (path / BASE_MARK).exists()]:
        raise ValueError(
            f"extending {run} would move {bases[0]}, the base of an adapter; copy the run, delete "
            f"{bases[0].name}/{BASE_MARK} in the copy, and extend the copy"
        )


def check_rates(run: Path, config: TrainConfig, last_step: int) -> None:
    """Raise ValueError if a learning rate logged up to `last_step` is not the one that `config`
    gives. Earlier versions had a different wsd schedule.
    """
    log = run / "metrics.jsonl"
    records = JSONLinesLog.read(log, "step") if log.exists() else []
    logged = {r["step"]: r["lr"] for r in records if "lr" in r and r["step"] <= last_step}
    for step, rate in logged.items():
        expected = learning_rate(step, config)
        if not math.isclose(rate, expected):  # the last bit may differ
            raise ValueError(
                f"{run} had a learning rate of {rate} at step {step}, but in this version it is "
                f"{expected}; resume it with the earlier version, or choose another out_dir"
            )


def extend_run(run: Path, config: TrainConfig) -> None:
    """If `config` has more steps than the existing run, take the run back to the last step before
    its decay. Later log records and checkpoints move to RUN/until_step_N, itself a run folder.

        steps          1 ........ end ...... N             max_steps
        existing run   |--plateau--|--decay--|    the decay moves to until_step_N
        longer run     |------------plateau---------|--decay--|

    The caller must then write the new config.yaml. Until then it is safe to call this again, even
    if the process was killed halfway.
    """
    end = last_usable_step(run, config)
    if end is None or not (run / "metrics.jsonl").exists():
        # `config` does not have more steps, or the run has not begun.
        return
    max_steps = read_run_config(run)["max_steps"]
    later = list_checkpoints(run, after=end, with_best=True)
    log = JSONLinesLog(run / "metrics.jsonl", "step")
    if not later and all(record["step"] <= end for record in log.records):
        return
    archive = run / f"until_step_{max_steps}"
    archive.mkdir(exist_ok=True)
    # An earlier call that was killed may have filled the archive and shortened the log here. The
    # run may have repeated steps since then. Keep the files of the attempt that got further.
    archived = JSONLinesLog(archive / "metrics.jsonl", "step")
    if len(log.records) >= len(archived.records):
        for file in run.iterdir():
            if file.is_file() and file.name != "lock":
                write_atomically(archive / file.name, file.read_bytes())
    for path in later:
        target = archive / path.parent.name / path.name
        target.parent.mkdir(exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)  # from an earlier attempt
        path.rename(target)
    (run / "wandb_id").unlink(missing_ok=True)  # the steps of a W&B run cannot go down
    log.drop_after(end)  # must be last: then another call does nothing
    print(f"extending {run} to {config.max_steps} steps; what followed step {end} is in {archive}")
