"""Open a run: new, resumed with the same settings, or extended to more steps."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path

from engine.checkpoint import BASE_MARK, RunState, list_checkpoints, load_latest, read_run_config
from engine.config import TrainConfig, fixed_settings
from engine.distributed import Config, Distributed
from engine.files import JSONLinesLog, lock_folder, write_atomically
from engine.optim import plateau_end
from model import GPT


@contextmanager
def open_run(
    given: Config,
    dist: Distributed,
    build_model: Callable[[Config], GPT],
    resolve: Callable[[Config, GPT], Config],
    base: str | None = None,
) -> Iterator[tuple[Config, GPT, RunState | None]]:
    """Lock the run folder and open its run: the complete config, the model, and the state to resume
    from. A new run has no state, and `build_model` makes its model. A resumed adapter is loaded
    onto `base`. `resolve` fills in settings that depend on the model, the data or the device.
    """
    run = Path(given.out_dir)
    with lock_folder(run) if dist.is_main else nullcontext():
        with dist.main_process_first():
            config = replace(given, **check_same_run(run, given))
            latest = load_latest(run, base, last_step=last_usable_step(run, config))
            model, resumed = latest or (build_model(config), None)
        del build_model  # which may hold gigabytes
        yield resolve(config, model), model, resumed


def check_same_run(run: Path, config: TrainConfig) -> dict:
    """The settings that are None in `config` and that the run in the folder has, if there is one. A
    setting that its config.yaml lacks has its default. More max_steps than the run has are fine if
    `extend_run` can add them. ValueError if `config` would not continue the run exactly.
    """
    if not (run / "metrics.jsonl").exists() and not list_checkpoints(run):
        return {}
    now = asdict(config)
    if now["resume"] == "never":
        raise ValueError(f"{run} already holds a run and resume is never; choose another out_dir")
    earlier = {f.name: f.default for f in fields(config)} | read_run_config(run)
    names = fixed_settings(type(config)) | earlier.keys() - now.keys()  # of an earlier version
    unset = {name: earlier[name] for name in names & now.keys() if now[name] is None}
    changed = {name for name in names - unset.keys() if now.get(name) != earlier[name]}
    is_longer = "max_steps" in changed and now["max_steps"] > earlier["max_steps"]
    if differences := changed - ({"max_steps"} if is_longer else set()):
        shown = "; ".join(f"{n} was {earlier[n]}, is {now.get(n)}" for n in sorted(differences))
        raise ValueError(
            f"{run} holds a run with other settings, so it cannot be resumed exactly: {shown}. "
            "Choose another out_dir, or the earlier settings"
        )
    if is_longer:
        check_extension(run, replace(config, **unset), earlier["max_steps"])
    return unset


def last_usable_step(run: Path, config: TrainConfig) -> int | None:
    """The last step from which the run in the folder, if it has fewer max_steps than `config`, is
    on the way of the longer run; None if it has as many.
    """
    has_config = (run / "config.yaml").is_file()
    max_steps = read_run_config(run).get("max_steps") if has_config else None
    if max_steps is None or config.max_steps is None or max_steps >= config.max_steps:
        return None
    return plateau_end(replace(config, max_steps=max_steps))


def check_extension(run: Path, config: TrainConfig, max_steps: int) -> None:
    """ValueError if the run, of `max_steps`, cannot be extended to config.max_steps."""
    if config.schedule != "wsd":
        raise ValueError(
            f"{run} has max_steps {max_steps}, on which a cosine depends from its first step. Only "
            "runs with schedule wsd can be extended; start a new run from its weights "
            "(init_from, or lora_load_path) with a lower max_lr and another out_dir"
        )
    end = plateau_end(replace(config, max_steps=max_steps))
    later = list_checkpoints(run, after=end)
    if later and later == list_checkpoints(run):
        raise ValueError(
            f"{run} cannot be extended, because it has no checkpoint from before the decay, of "
            f"step {end} or earlier; use init_from {run} and another out_dir"
        )
    if bases := [path for path in later if (path / BASE_MARK).exists()]:
        raise ValueError(
            f"adapters were trained on {bases[0]}, which an extension would move; extend a copy of "
            f"{run} in which you have deleted {bases[0].name}/{BASE_MARK}"
        )


def extend_run(run: Path, config: TrainConfig) -> None:
    """If the run in the folder has fewer max_steps than `config`, take it back to its last usable
    step. What it did after that becomes a run folder of its own, RUN/until_step_N. The new
    config.yaml, which the caller writes then, ends the extension; until then it can be repeated.
    """
    end = last_usable_step(run, config)
    if end is None or not (run / "metrics.jsonl").exists():  # it has not begun
        return
    max_steps = read_run_config(run)["max_steps"]
    later = list_checkpoints(run, after=end)
    records = JSONLinesLog.read(run / "metrics.jsonl", "step")
    kept = [record for record in records if record["step"] <= end]
    if not later and kept == records:
        return
    ended = run / f"until_step_{max_steps}"
    (ended / "checkpoints").mkdir(parents=True, exist_ok=True)
    for file in run.iterdir():
        if file.is_file() and file.name != "lock" and not (ended / file.name).exists():
            write_atomically(ended / file.name, file.read_bytes())
    for path in later:
        path.rename(ended / "checkpoints" / path.name)
    lines = "".join(json.dumps(record) + "\n" for record in kept)
    write_atomically(run / "metrics.jsonl", lines.encode())
    (run / "wandb_id").unlink(missing_ok=True)  # W&B does not take steps back
    print(f"extending {run} to {config.max_steps} steps; what followed step {end} is in {ended}")
