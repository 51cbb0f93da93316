"""What the benchmarks share: contenders that take turns, worker processes, tables, random data.

Contenders take turns, so that a slow minute of the machine slows all of them. Compared are medians
over the rounds, and ratios of medians.
"""

import functools
import gc
import json
import multiprocessing
import os
import pickle
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from engine.config import Precision, TrainConfig, flag
from engine.data import Batch
from engine.distributed import CPU_BF16_UNITS, Distributed, autocast_dtype, open_device
from engine.step import TrainingStep
from engine.throughput import peak_memory
from model import GPT, GPTConfig

ROOT, CPU = Path(__file__).parents[1], torch.device("cpu")
HEAD_SIZE = 64  # of every GPT-2
VOCAB_SIZE = GPTConfig().padded_vocab_size  # of the peers' models, as of this project's

Result = dict[str, Any]  # figures of a turn by name
Results = dict[str, list[Result]]  # by contender
Contender = Callable[[int], Any]  # does its part of a round, counted from 0
Maker = Callable[[str, "Size", Any], Contender]  # of the contender of that name


@dataclass(frozen=True)
class BenchmarkConfig:
    """The flags of benchmarks whose contenders run in processes of their own."""

    rounds: int = flag(5, "measured turns of each contender, after those that warm up")
    threads: int = flag(2, "CPU threads of each contender")
    device: str = flag("cpu", "cpu or cuda")
    precision: Precision = flag("fp32", "bf16 and fp16: autocast")
    contenders: list[str] = flag([], "only contenders whose name contains one of these")
    one_by_one: bool = flag(False, "one contender after another in this process, as on CUDA")
    json_file: str | None = flag(None, "append each contender's figures, a JSON object a line")

    def open_device(self) -> torch.device:
        return open_device(self.device, local_rank=0)

    def autocast(self) -> AbstractContextManager:
        device = torch.device(self.device)
        dtype = autocast_dtype(self.precision)
        return torch.autocast(device.type, dtype, enabled=dtype is not None)


@dataclass(frozen=True)
class Size:
    """A GPT-2 and the batch of a step: `batch_size` sequences of T tokens."""

    n_layer: int
    n_embd: int
    batch_size: int
    T: int

    @classmethod
    def parse(cls, text: str) -> "Size":
        numbers = text.replace(":", "x").split("x")
        if len(numbers) != 4 or not all(number.isdecimal() for number in numbers):
            raise ValueError(f"size is {text}, expected LAYERSxWIDTH:BATCHxTOKENS, 12x768:2x512")
        return cls(*map(int, numbers))

    def __str__(self) -> str:
        return f"{self.n_layer} x {self.n_embd}, {self.batch_size} x {self.T}"

    def gpt_config(self, block_size: int | None = None) -> GPTConfig:
        T, C = block_size or self.T, self.n_embd
        return GPTConfig(T, n_layer=self.n_layer, n_head=max(1, C // HEAD_SIZE), n_embd=C)

    @property
    def tokens(self) -> int:
        return self.batch_size * self.T

    def random_ids(self, device: torch.device) -> torch.Tensor:
        return torch.randint(GPTConfig.vocab_size, (self.batch_size, self.T), device=device)


TINY = Size(n_layer=1, n_embd=8, batch_size=1, T=8)  # so small that its memory does not count


def take_turns(contenders: Mapping[str, Contender], rounds: int, *, warmup: int = 1) -> Results:
    """In every round call one contender after another. Return, without the first `warmup` rounds,
    the `seconds` of each call and the figures that it returned, if any.
    """
    results: Results = {name: [] for name in contenders}
    for i in range(warmup + rounds):
        for name, contender in contenders.items():
            started = time.perf_counter()
            figures = contender(i)
            if i >= warmup:
                seconds = time.perf_counter() - started
                results[name].append({"seconds": seconds, **(figures or {})})
    return results


def measure(
    make: Maker, names: Collection[str], size: Size, config: BenchmarkConfig, *, warmup: int = 1
) -> Results:
    """Make the contenders and run them; return what each measured in `config.rounds` turns.

    A contender does a step and returns figures by name. This adds `seconds` and
    `peak_bytes`: CUDA's allocator peak, or on a CPU the highest resident memory so far, less what a
    tiny step leaves resident. On CUDA each contender needs the GPU for itself, so they run one
    after another in this process, as with `one_by_one`. A contender that runs out of memory or
    lacks its package is reported and left out.
    """
    torch.set_num_threads(config.threads)
    parts = config.contenders or [""]
    chosen = [name for name in names if any(part in name for part in parts)]
    if not chosen:
        raise ValueError(f"contenders is {config.contenders}, expected parts of {list(names)}")
    if not config.one_by_one and config.open_device().type == "cpu":
        results = measure_in_turns(make, chosen, size, config, warmup)
        for name, turns in results.items():
            append_figures(name, turns, size, config)
        return results
    results = {}
    for name in chosen:
        print(f"measuring {name}, {size}", file=sys.stderr, flush=True)
        try:
            # Nothing else refers to the contender, so its memory is free for the next one.
            results |= take_turns(
                {name: make_turn(make, name, size, config)}, config.rounds, warmup=warmup
            )
        except (RuntimeError, ImportError) as error:  # out of memory, not compiled, not installed
            print(f"{name}, {size}, failed: {str(error).splitlines()[0]}", flush=True)
            continue
        append_figures(name, results[name], size, config)
    return results


def make_turn(make: Maker, name: str, size: Size, config: BenchmarkConfig) -> Contender:
    """The contender, which adds `seconds` and `peak_bytes` to its figures."""
    device, before = config.open_device(), 0
    if device.type == "cuda":
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        make(name, TINY, config)(0)  # code that is loaded at first use is not memory of the step
        gc.collect()
        before = read_memory("VmRSS")
    torch.manual_seed(0)
    step = make(name, size, config)

    def turn(i: int) -> Result:
        started = read_clock(device)
        figures = step(i) | {"seconds": read_clock(device) - started}
        peak = peak_memory(device) if device.type == "cuda" else read_memory("VmHWM")
        return figures | {"peak_bytes": peak - before}

    return turn


def append_figures(name: str, turns: list[Result], size: Size, config: BenchmarkConfig) -> None:
    """Append the medians of a contender's figures to `config.json_file`, if it is given."""
    if config.json_file is None:
        return
    numbers = [key for key, value in turns[0].items() if isinstance(value, int | float)]
    figures = {key: median(turns, key) for key in numbers}
    benchmark = Path(sys.argv[0]).stem
    record = {**asdict(config), "benchmark": benchmark, "size": str(size), "contender": name}
    with Path(config.json_file).open("a") as file:
        file.write(json.dumps(record | figures) + "\n")


def measure_in_turns(
    make: Maker, names: list[str], size: Size, config: BenchmarkConfig, warmup: int
) -> Results:
    """Measure contenders that take turns, each in its own process."""
    for variable in [variable for variable in os.environ if variable.startswith("OMP_")]:
        del os.environ[variable]  # config.threads decides, not the shell
    context, contenders = multiprocessing.get_context("spawn"), {}
    with ExitStack() as stack:
        for name in names:
            process = stack.enter_context(ProcessPoolExecutor(1, context))
            contenders[name] = partial(ask, process, pickle.dumps((make, name, size, config)))
        return take_turns(contenders, config.rounds, warmup=warmup)


def ask(process: ProcessPoolExecutor, contender: bytes, i: int) -> Result:
    """The figures of a turn in the process; raises what it raised."""
    try:
        return process.submit(take_turn, contender, i).result()
    except BrokenProcessPool as error:
        raise ValueError("the process of a contender was killed; use a smaller size") from error


def take_turn(contender: bytes, i: int) -> Result:
    return start_contender(contender)(i)


@functools.cache
def start_contender(contender: bytes) -> Contender:
    """Make the contender of this process, in its first turn."""
    make, name, size, config = pickle.loads(contender)  # noqa: S301  # from this program
    sys.stdout = sys.stderr  # what contenders print does not belong in the tables
    torch.set_num_threads(config.threads)
    return make_turn(make, name, size, config)


def read_clock(device: torch.device) -> float:
    """The time in seconds, after all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def read_memory(field: str, process: int | str = "self") -> int:
    """Bytes of a process: VmRSS, resident now, or VmHWM, their highest so far. Linux only."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def median(turns: list[Result], figure: str = "seconds") -> float:
    return statistics.median(turn[figure] for turn in turns)


def ratio(results: Results, name: str, reference: str, figure: str = "seconds") -> str:
    """The median of a contender over that of the reference; nothing where one is missing."""
    if not {name, reference} <= results.keys():
        return ""
    return f"{median(results[name], figure) / median(results[reference], figure):.2f}"


@functools.cache
def print_machine() -> None:
    """Print once what the figures are of. Those of two kinds of CPU cannot be compared."""
    if torch.cuda.is_initialized():
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
        return
    info = Path("/proc/cpuinfo").read_text()
    names = re.findall(r"(?m)^model name\s*: (.*)", info) or [platform.machine()]
    units = [unit for unit in CPU_BF16_UNITS if unit in info.split()]
    kind = f"{names[0]} ({', '.join(units) or 'no bf16 units'})"
    print(f"{kind}, {torch.get_num_threads()} threads, torch {torch.__version__}")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a Markdown table after an empty line, the first one after the machine's name."""
    print_machine()
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (columns, *rows)]
    lines.insert(1, f"{'|---' * len(columns)}|")
    print("", *lines, sep="\n", flush=True)


def meta_model(config: GPTConfig) -> GPT:
    """A model without memory, to count its parameters."""
    with torch.device("meta"):
        return GPT(config)


class RandomBatches:
    """The data of a training step: one batch of random tokens."""

    has_one_shape, grad_accum_steps = True, 1

    def __init__(self, size: Size):
        self.size, self.block_size = size, size.T

    def micro_batch(self, _step: int, _micro_step: int) -> Batch:
        ids = self.size.random_ids(CPU)
        return Batch(ids, ids)

    def targets_in_step(self, _step: int) -> int:
        return self.size.tokens


def random_training_step(
    model: GPT, size: Size, config: BenchmarkConfig, step_class: Any = TrainingStep, **settings: Any
) -> Any:
    """The real training step, a `step_class`, of random tokens."""
    dist = Distributed(rank=0, world_size=1, device=config.open_device())
    shared = {"batch_size": size.batch_size, "precision": config.precision, "compile": False}
    train_config = TrainConfig(**(shared | settings))
    data: Any = RandomBatches(size)
    return step_class(model.to(dist.device), data, train_config, dist)


def transformers_gpt2(config: GPTConfig) -> Any:
    """transformers' model of this shape, without dropout, with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    options: dict[str, Any] = {"n_layer": config.n_layer, "n_head": config.n_head}
    options |= {"n_embd": config.n_embd, "n_positions": config.block_size, "use_cache": False}
    options |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB_SIZE, **options))


def transformers_copy(model: GPT) -> Any:
    """transformers' model with the same weights, in eval mode."""
    from transformers import GPT2LMHeadModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return GPT2LMHeadModel.from_pretrained(folder).eval()
