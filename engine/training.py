"""The training loop."""

import logging
import os
import signal
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import torch

from engine.checkpoint import BackgroundSave, RunState, save_checkpoint
from engine.config import TrainConfig, fixed_settings, to_yaml
from engine.data import TrainingData
from engine.distributed import Distributed
from engine.evaluation import Evaluation, Prompt, ValidationBatches, is_last_step, read_val_losses
from engine.files import drop_lost_terminal, write_atomically
from engine.memory import check_memory
from engine.metrics import Meter, RunLogger
from engine.optim import learning_rate, plateau_end
from engine.plots import plot_runs
from engine.report import start_record, write_report
from engine.resume import check_rates, extend_run
from engine.step import TrainingStep
from engine.tasks import Example, make_task
from engine.throughput import describe_device, flops_per_token
from engine.tokenizer import Tokenizer
from model import GPT

MIN_STEPS_PER_EPOCH = 10  # fewer get a warning
SLOW_STEP_FLOPS = 1e13  # about a minute on a few cores
MAX_SKIPPED_STEPS = 5  # end the run after this many steps in a row without a finite gradient


def train(
    model: GPT,
    tokenizer: Tokenizer,
    data: TrainingData,
    val: ValidationBatches,
    prompts: list[Prompt],
    config: TrainConfig,
    dist: Distributed,
    resumed: RunState | None = None,
) -> None:
    """Train `model` to max_steps, from the start or from the state `resumed`, whose weights it must
    already have. Raises ValueError if `resumed` was trained on other data, or with another schedule
    and is unfinished.
    """
    if resumed and resumed.progress["data"] != data.fingerprint:
        raise ValueError(
            f"the run in {config.out_dir} was trained on different data; resume it with that data"
        )
    start, run = resumed.progress["step"] if resumed else 0, Path(config.out_dir)
    earlier = read_val_losses(run, start)
    is_finished = start > 0 and is_last_step(start, config, earlier)
    if not is_finished:
        check_rates(run, config, start)
    logging.root.info("data checked, model built")
    hellaswag: list[Example] = []
    if config.hellaswag_every:
        with dist.main_process_first():
            task = make_task("hellaswag", data=config.hellaswag_data)
            hellaswag = task.load(tokenizer, model.config.block_size)
    if dist.is_main:
        announce_run(model, data, config, dist)
        print_warnings(model, data, config, dist)
    if not is_finished:
        check_memory(model, data, config, dist)
    with Interrupt() as interrupt, profile_steps(config, dist) as profiler:
        training_step = TrainingStep(model.to(dist.device), data, config, dist)
        if resumed:
            training_step.restore(resumed.tensors)
            resumed.tensors.clear()  # frees gigabytes
        loss, fixed_shape = training_step.summed_loss, data.has_fixed_shape
        evaluation = Evaluation(
            model, tokenizer, loss, val, prompts, hellaswag, config, dist, fixed_shape, earlier
        )
        # Nothing above writes to the run: if the settings, the data or the checkpoint are refused,
        # it stays as it was.
        if dist.is_main:
            extend_run(run, config)  # does nothing unless it has fewer steps
            if not is_finished:
                hashes = {"data": data.fingerprint, "tokenizer": tokenizer.sha256}
                start_record(run, dist, first_step=start + 1, **hashes)
            write_atomically(run / "config.yaml", to_yaml(config).encode())
        logger = RunLogger(config, dist, start)
        if start:
            finished = f"already finished after step {start} of {config.max_steps}"
            logger.print(finished if is_finished else f"resuming from step {start}")
        else:
            logger.log({"step": 0, "tokens": 0} | evaluation.evaluate_step(0))
            logging.root.info("step 0 evaluated")
        if not is_finished:
            steps = range(start + 1, config.max_steps + 1)
            train_steps(steps, training_step, evaluation, logger, interrupt, profiler)
        logger.finish()


def train_steps(
    steps: range,
    training_step: TrainingStep,
    evaluation: Evaluation,
    logger: RunLogger,
    interrupt: "Interrupt",
    profiler: Any,
) -> None:
    """The loop over `steps`."""
    config, dist = training_step.config, training_step.dist
    meter = Meter(training_step.model, training_step.data, dist)
    save = BackgroundSave()
    for step in steps:
        begin = meter.begin_step()
        loss, grad_norm = training_step(step)
        record = {"step": step, "lr": training_step.lr}
        meter.add(record, begin, loss, grad_norm, stop=interrupt.signum is not None)

        # On CUDA, the meter returns the record of a step only after the next step was launched, so
        # the GPU never waits for Python. If this step has to be evaluated or saved, wait for its
        # record: `read` then returns it last.
        is_save_due = config.is_due(config.save_every, step) or step == plateau_end(config)
        evaluated: dict[str, Any] = {}
        for finished in meter.read(wait=is_save_due or config.is_any_evaluation_due(step)):
            if finished["step"] == step:
                evaluated = evaluation.evaluate_step(step)
            logger.log(finished | evaluated)
            check_skipped(meter, finished["step"], logger)
        profiler.step()
        save.check()

        # `stop_requested` is the same on all ranks: the meter sums it together with the loss. The
        # validation losses are the same on all ranks, too.
        is_last = is_last_step(step, config, evaluation.val_losses)
        val_loss = evaluated.get("val_loss")
        is_save_due |= is_last or meter.stop_requested
        is_best = val_loss is not None and evaluation.is_best()
        if is_save_due or (is_best and config.save_best):
            results = {"step": step, "val_loss": val_loss}
            weights_only = not is_save_due
            start_save(save, training_step, evaluation.tokenizer, results, weights_only)
        if is_last or meter.stop_requested:
            save.wait()
            dist.barrier()  # if a rank left early, torchrun would stop the one that saves
        if is_last and step < config.max_steps:
            n = config.patience
            logger.print(f"ending after step {step}: no lower validation loss in {n} evaluations")
            break
        if meter.stop_requested and not is_last:
            logger.print(f"stopped after step {step} and saved it; run the same command to resume")
            sys.exit(128 + (interrupt.signum or signal.SIGTERM))  # the code that a shell reports


def announce_run(model: GPT, data: TrainingData, config: TrainConfig, dist: Distributed) -> None:
    """Print the settings, the sizes and the device of the run."""
    n_params = sum(p.numel() for p in model.parameters() if p.requires_grad)
    device = f"{dist.world_size} x {describe_device(dist.device)}, {config.precision}"
    sizes = f"trainable parameters: {n_params:,}\n{data.summary()}\ndevice: {device}"
    print(to_yaml(config), sizes, sep="\n", flush=True)


def print_warnings(model: GPT, data: TrainingData, config: TrainConfig, dist: Distributed) -> None:
    """Print which settings keep the run from learning, or make it too slow for a CPU."""
    step_flops = flops_per_token(model, data.block_size) * data.tokens_through(1)
    if dist.device.type == "cpu" and step_flops > SLOW_STEP_FLOPS * dist.world_size:
        print(
            f"a step needs {step_flops / 1e12:,.0f} TFLOPs, which takes minutes on a CPU; "
            "configs/demo.yaml and configs/small.yaml are made for CPUs"
        )
    if config.warmup_steps > (plateau_end(config) or config.max_steps):
        rate, step = max((learning_rate(s, config), s) for s in range(1, config.max_steps + 1))
        print(
            f"warmup_steps {config.warmup_steps} is too many for max_steps {config.max_steps} with "
            f"schedule {config.schedule}: the learning rate peaks at {rate / config.max_lr:.1%} of "
            f"max_lr at step {step}; lower warmup_steps"
        )
    if data.steps_per_epoch < MIN_STEPS_PER_EPOCH:
        print(
            f"an epoch has only {data.steps_per_epoch:.1f} steps; to learn more from so little "
            "data, use fewer tokens or examples per step"
        )


def check_skipped(meter: Meter, step: int, logger: RunLogger) -> None:
    """Report a skipped step. Raises ValueError after MAX_SKIPPED_STEPS of them in a row."""
    n = meter.skipped_in_a_row
    if n:
        logger.print(f"step {step} skipped: its gradient is not finite ({n} in a row)")
    if n >= MAX_SKIPPED_STEPS:
        raise ValueError(
            f"the gradient was not finite in {n} consecutive steps; lower max_lr or set precision "
            "fp32, and start again in another out_dir"
        )


def start_save(
    save: BackgroundSave,
    training_step: TrainingStep,
    tokenizer: Tokenizer,
    results: dict[str, Any],
    weights_only: bool,
) -> None:
    """Start saving a checkpoint, the plot and the report in the background, or only the weights.
    `results` has the step and its validation loss.
    """
    save.wait()  # a snapshot takes gigabytes: only one at a time
    params, tensors = training_step.snapshot(weights_only)  # called by all ranks
    dist, config = training_step.dist, training_step.config
    if not dist.is_main:
        return
    run = Path(config.out_dir)
    progress = results | {
        "data": training_step.data.fingerprint,
        "facts": collect_facts(training_step.model, training_step.data, results["step"]),
        "fixed_settings": sorted(fixed_settings(type(config))),
    }

    def write() -> None:
        model, state = training_step.model, RunState(progress, tensors)
        # Always keep the checkpoint at the end of the plateau: a longer run can start from it.
        keep, kept_step = config.keep, plateau_end(config)
        save_checkpoint(run, model, tokenizer, params, state, keep=keep, kept_step=kept_step)
        logging.root.info("checkpoint saved")
        if not weights_only:
            plot_runs([run], run / "loss.png")
            write_report(run)
            logging.root.info("plot and report written")

    save.start(write)


def collect_facts(model: GPT, data: TrainingData, step: int) -> dict[str, str]:
    """Return the lines of a run's summary that are neither in its log nor in its settings."""
    params = list(model.parameters())
    flops = flops_per_token(model, data.block_size) * data.tokens_through(step)
    return {
        "parameters": f"{sum(p.numel() for p in params):,}",
        "trainable parameters": f"{sum(p.numel() for p in params if p.requires_grad):,}",
        "training data": data.epoch_contents,
        "epochs": f"{step / data.steps_per_epoch:.2f}",
        "training FLOPs": f"{flops:.2e}",
    }


def profile_steps(config: TrainConfig, dist: Distributed) -> AbstractContextManager:
    """Return a profiler that skips two steps and then records config.profile steps. On other ranks,
    and if config.profile is 0, it does nothing. The loop must call its `step()`. If the run ends
    early, the trace has fewer steps.
    """

    def write(profiler: torch.profiler.profile) -> None:
        file = Path(config.out_dir) / "profile.json.gz"
        profiler.export_chrome_trace(str(file))
        kind = "cuda" if dist.device.type == "cuda" else "cpu"
        slowest = profiler.key_averages().table(f"self_{kind}_time_total", row_limit=10)
        print(f"{slowest}\nopen {file} in chrome://tracing", flush=True)

    if not config.profile or not dist.is_main:
        return nullcontext(SimpleNamespace(step=lambda: None))
    schedule = torch.profiler.schedule(wait=1, warmup=1, active=config.profile, repeat=1)
    return torch.profiler.profile(schedule=schedule, on_trace_ready=write)


class Interrupt:
    """Turns Ctrl-C, SIGTERM and SIGHUP (the terminal disconnected) into a request to stop after the
    current step. A second Ctrl-C or SIGTERM stops at once. Under nohup, SIGHUP stays ignored.
    """

    def __init__(self) -> None:
        self.signum: int | None = None

    def __enter__(self) -> Self:
        signals = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signals.append(signal.SIGHUP)
        self.previous = {s: signal.signal(s, self._handle) for s in signals}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, _: object) -> None:
        name = signal.Signals(signum).name
        if name == "SIGHUP":
            drop_lost_terminal()
        elif self.signum is not None:
            raise KeyboardInterrupt
        self.signum = self.signum or signum
        text = f"\n{name}: will save and stop after this step (interrupt again to stop at once)\n"
        os.write(2, text.encode())  # print() is not safe in a signal handler
