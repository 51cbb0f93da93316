"""The only training loop, with its settings, evaluation and samples."""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, Self

import torch

import cli
from checkpoint import BackgroundSave, save_checkpoint
from data import Batch, TrainingData, write_atomically
from loggers import logger_names
from model import GPT
from page import write_page
from plot import plot_runs
from report import Meter, Report, describe, finite_or_none
from runtime import Distributed, Interrupt, Precision, default_precision, on_host, to_device
from step import TrainingStep, learning_rate, parameter_groups
from tasks import Example, count_hits, load_examples
from tokenizer import END_OF_TEXT_ID, IGNORE_INDEX, get_tokenizer

ValidationBatches = Callable[[], Iterator[Batch]]  # this rank's share, the same at every call
MAX_SKIPPED_IN_A_ROW = 5  # steps with a gradient that is not finite


@dataclass(frozen=True)
class Prompt:
    """What is continued for a sample, and where there is one, how it should go on."""

    text: str = "Hello, I'm a language model,"  # build-nanogpt's
    max_new_tokens: int = 32
    top_k: int = 50
    reference: str | None = None


@dataclass(frozen=True)
class TrainConfig:
    """What the loop needs to know, whatever is trained. The defaults are GPT-3's for 124M, as
    build-nanogpt uses them.
    """

    out_dir: str = "runs/gpt2_124m"
    """run folder: config, log, plot and checkpoints"""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on with the run in out_dir where there is one"""
    batch_size: int = 64
    """sequences per device and micro-step"""
    max_steps: int = 19_073
    """optimizer steps; 19,073 of 524,288 tokens are 10 B"""
    warmup_steps: int = 715
    """steps of linear warm-up; 375 M tokens in GPT-3"""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of the blocks, AdamW for the rest"""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """of the learning rate after the warm-up: a cosine to min_lr; or max_lr, then a line to 0"""
    max_lr: float = 6e-4
    """learning rate after the warm-up"""
    min_lr: float = 6e-5
    """learning rate at the end of a cosine"""
    decay_fraction: float = 0.4
    """share of the steps in which the wsd schedule goes to 0"""
    weight_decay: float = 0.1
    """AdamW's, on tensors of two or more dimensions"""
    muon_lr: float = 0.02
    """Muon's learning rate after the warm-up; it follows the same schedule"""
    muon_weight_decay: float = 0.0
    """Muon's"""
    grad_clip: float = 1.0
    """largest norm of the gradient; 0 is no limit"""
    eval_every: int = 250
    """steps between evaluations"""
    sample_every: int = 250
    """steps between samples; 0 is never"""
    hellaswag_every: int = 0
    """steps between measurements of HellaSwag, which take a while; 0 is never"""
    hellaswag_data: str | None = None
    """its rows, .jsonl or .jsonl.gz (default: the validation set from the hub)"""
    log: str = ""
    """where to log beside metrics.jsonl: tensorboard, wandb, or both with a comma"""
    save_every: int = 1000
    """steps between checkpoints"""
    keep: int = 2
    """newest checkpoints to keep, beside the best"""
    seed: int = 1337
    """of the initialisation, the order of the data and the samples"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""
    precision: Precision | None = None
    """of matrix products (default: bf16 on CUDA, fp16 on cards without it, fp32 elsewhere)"""
    compile: bool | None = None
    """torch.compile the training step (default: on CUDA)"""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """over several devices: a whole model on each (ddp), or a part (fsdp, for the large sizes)"""
    profile: int = 0
    """steps to profile, after two: a trace for chrome://tracing in the run folder, and the ten
    costliest operators; 0 is none"""
    recompute: Literal["none", "light", "block"] = "none"
    """what the backward pass computes again instead of keeping it: light, LayerNorm and GELU (a
    third less memory for nothing); block, nearly everything (a seventh of the memory, slower)"""

    def __post_init__(self) -> None:
        self._check_least(1, "batch_size", "max_steps", "eval_every", "save_every", "keep")
        self._check_least(0, "warmup_steps", "grad_clip", "sample_every", "weight_decay", "seed")
        self._check_least(0, "hellaswag_every", "profile", "muon_lr", "muon_weight_decay")
        logger_names(self.log)
        if self.seed >= 2**63:
            raise ValueError(f"seed is {self.seed}, expected less than 2**63")
        if self.max_lr is not None and not 0 <= self.min_lr <= self.max_lr > 0:
            raise ValueError(
                f"min_lr {self.min_lr} and max_lr {self.max_lr}: expected 0 <= min <= max, max > 0"
            )
        if not 0 <= self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction is {self.decay_fraction}, expected 0 to 1")

    def _check_least(self, least: int, *names: str) -> None:
        for name in names:
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} is {value}, expected at least {least}")

    def on(self, device: torch.device) -> Self:
        """With a value for what was left to the machine."""
        chosen: dict[str, Any] = {}
        if self.precision is None:
            chosen["precision"] = default_precision(device)
        if self.compile is None:
            chosen["compile"] = device.type == "cuda"
        return replace(self, **chosen)


@torch.no_grad()
def evaluate(model: GPT, batches: Iterator[Batch], dist: Distributed) -> float:
    """Mean loss in nats over all targets that the batches of all ranks predict."""
    loss_sum, n_targets = 0.0, 0
    for batch in batches:
        idx, targets, *rows = to_device(on_host(batch, dist.device), dist.device)
        loss_sum += model.loss(idx, targets, "sum", *rows).item()
        n_targets += int((batch[1] != IGNORE_INDEX).sum())
    total, n = dist.sum(loss_sum, n_targets)
    return total / n


def sample_text(model: GPT, prompt: Prompt, seed: int, device: torch.device) -> str:
    """The prompt and what the model makes of it, with the reference where there is one."""
    tokenizer = get_tokenizer()
    ids = tokenizer.encode(prompt.text, disallowed_special=()) or [END_OF_TEXT_ID]
    generator = torch.Generator(device).manual_seed(seed)
    out = model.generate(
        torch.tensor([ids], device=device),
        prompt.max_new_tokens,
        top_k=prompt.top_k,
        eos=None if prompt.reference is None else END_OF_TEXT_ID,
        generator=generator,
    )[0, len(ids) :].tolist()
    if prompt.reference is None:
        return prompt.text + tokenizer.decode(out)
    answer = tokenizer.decode([i for i in out if i != END_OF_TEXT_ID])
    return f"{prompt.text}{answer}\n[reference] {prompt.reference}"


def samples(training_step: TrainingStep, prompts: list[Prompt], step: int) -> list[str]:
    """What the model makes of the prompts at a step."""
    seed, device = training_step.config.seed + step, training_step.dist.device
    with training_step.raw():
        return [sample_text(training_step.model, prompt, seed, device) for prompt in prompts]


def validation_loss(training_step: TrainingStep, val: ValidationBatches) -> float | None:
    """The loss on the validation batches, each rank doing its share; None if not finite."""
    with training_step.raw():
        return finite_or_none(evaluate(training_step.model, val(), training_step.dist))


def hellaswag_accuracy(training_step: TrainingStep, examples: list[Example]) -> dict[str, float]:
    """lm-eval's acc and acc_norm of HellaSwag, each rank doing its share."""
    dist = training_step.dist
    with training_step.raw():
        counts = count_hits(training_step.model, examples, dist.device, dist.rank, dist.world_size)
    hits, hits_norm, n = dist.sum(*counts)
    return {"hellaswag_acc": hits / n, "hellaswag_acc_norm": hits_norm / n}


def resume(training_step: TrainingStep, progress: dict, state: dict) -> int:
    """Take over the state of a checkpoint; return its step."""
    training_step.load_state(state)
    state.clear()  # gigabytes that nobody needs any more
    return progress["step"]


def save(training_step: TrainingStep, record: dict, background: BackgroundSave) -> None:
    """Start to write the checkpoint and the plot of the step that `record` is of."""
    background.wait()  # it reads the last snapshot, which the next one overwrites
    params, state = training_step.snapshot()
    if not training_step.dist.is_main:
        return
    run, keep = Path(training_step.config.out_dir), training_step.config.keep
    progress = {
        "step": record["step"],
        "val_loss": record.get("val_loss"),
        "data": training_step.data.fingerprint,
    }

    def write() -> None:
        save_checkpoint(run, training_step.model, params, progress, state, keep)
        plot_runs([run], run / "loss.png")
        write_page(run, training_step.dist)

    background.start(write)


def is_due(every: int, step: int, config: TrainConfig) -> bool:
    return every > 0 and (step % every == 0 or step == config.max_steps)


def measures(config: TrainConfig, step: int) -> bool:
    """Whether `measured` has anything to do."""
    intervals = config.eval_every, config.sample_every, config.hellaswag_every
    return any(is_due(every, step, config) for every in intervals)


def measured(
    training_step: TrainingStep,
    val: ValidationBatches,
    prompts: list[Prompt],
    examples: list[Example],
    step: int,
) -> dict:
    """What is due after a step, of validation loss, samples and HellaSwag."""
    config = training_step.config
    record: dict = {}
    if is_due(config.eval_every, step, config):
        record["val_loss"] = validation_loss(training_step, val)
    if is_due(config.sample_every, step, config):
        record["samples"] = samples(training_step, prompts, step)
    if is_due(config.hellaswag_every, step, config) and step:
        record |= hellaswag_accuracy(training_step, examples)
    return record


def announce(model: GPT, data: TrainingData, config: TrainConfig) -> None:
    """Print what is about to run, and write it into the run folder."""
    text = cli.as_yaml(config)
    print(text)
    print(describe(parameter_groups(model), data), flush=True)
    write_atomically(Path(config.out_dir) / "config.yaml", text.encode())


@contextmanager
def out_of_memory_told(config: TrainConfig, device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{device} has too little memory for batch_size {config.batch_size}; halve it (the "
            "curve stays the same), or add --recompute block"
        ) from error


def profiled(config: TrainConfig, dist: Distributed) -> AbstractContextManager:
    """Profiles what comes between calls of its `step`, where that was asked for, on the main rank;
    a run that ends earlier writes the trace of what it has done.
    """

    def write(profiler: torch.profiler.profile) -> None:
        file = Path(config.out_dir) / "profile.json.gz"
        profiler.export_chrome_trace(str(file))
        kind = dist.device.type if dist.device.type == "cuda" else "cpu"
        costs = profiler.key_averages().table(f"self_{kind}_time_total", 10, 200, 40)
        print(
            f"{costs}\n{config.profile} steps are in {file}; open it in chrome://tracing",
            flush=True,
        )

    if not config.profile or not dist.is_main:
        return nullcontext(SimpleNamespace(step=lambda: None))
    stages = torch.profiler.schedule(wait=1, warmup=1, active=config.profile, repeat=1)
    return torch.profiler.profile(schedule=stages, on_trace_ready=write)


def train(
    model: GPT,
    data: TrainingData,
    val: ValidationBatches,
    prompts: list[Prompt],
    config: TrainConfig,
    dist: Distributed,
    resumed: tuple[dict, dict] | None = None,
) -> None:
    """Train `model` to max_steps, from the start, or from the progress and state of a checkpoint
    whose weights it has.
    """
    if resumed and resumed[0]["data"] != data.fingerprint:
        raise ValueError(
            f"{config.out_dir} was trained on other data than these; it goes on exactly only with "
            "the same"
        )
    examples: list[Example] = []
    if config.hellaswag_every:
        with dist.main_first():
            examples = load_examples("hellaswag", config.hellaswag_data, model.config.block_size)
    if dist.is_main:
        announce(model, data, config)
    with (
        out_of_memory_told(config, dist.device),
        Interrupt() as interrupt,
        profiled(config, dist) as profiler,
    ):
        meter = Meter(model, data, dist)
        training_step = TrainingStep(model.to(dist.device), data, config, dist)
        start = resume(training_step, *resumed) if resumed else 0
        report = Report(Path(config.out_dir), config.max_steps, dist, start, config.log)
        background = BackgroundSave()
        if start:
            finished = start == config.max_steps
            report.line("finished before" if finished else f"going on from step {start}")
        else:
            record: dict = {"step": 0, "tokens": 0}
            report.step(record | measured(training_step, val, prompts, examples, 0))
        stop = False
        for step in range(start + 1, config.max_steps + 1):
            started = time.perf_counter()
            meter.launched(step, started, *training_step(step), interrupt.signum is not None)
            last, to_save = step == config.max_steps, is_due(config.save_every, step, config)
            wait = to_save or measures(config, step)
            while read := meter.read(wait or stop):
                record, asked_to_stop = read
                stop = stop or asked_to_stop
                record["lr"] = learning_rate(record["step"], config)
                if record["step"] == step:
                    record |= measured(training_step, val, prompts, examples, step)
                report.step(record)
                if meter.skipped_in_a_row:
                    background.wait()
                    tell_of_skipped(meter.skipped_in_a_row, record["step"], config, report)
            profiler.step()
            background.check()
            if to_save or stop:
                save(training_step, record, background)
            if last or stop:
                background.wait()
                dist.barrier()  # a rank that leaves early has torchrun stop the one that saves
            if stop and not last:
                report.line(f"stopped after step {step}, saved; the same command goes on")
                sys.exit(128 + (interrupt.signum or signal.SIGTERM))  # as a shell reports it
        report.finish()


def tell_of_skipped(in_a_row: int, step: int, config: TrainConfig, report: Report) -> None:
    """Tell of a step that was skipped; ValueError when as many in a row as are too many."""
    report.line(f"step {step} skipped: its gradient is not finite ({in_a_row} in a row)")
    if in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise ValueError(
            f"{in_a_row} steps in a row had a gradient that is not finite; the checkpoints in "
            f"{config.out_dir} are good. Lower --max_lr, or use --precision fp32"
        )
