"""What the benchmarks share: contenders that take turns, worker processes, tables, random data.

In every round, each contender takes one turn. So if the machine is slow for a minute, that affects
all of them. We compare medians over the rounds, and ratios of these medians.
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
from engine.distributed import CPU_BF16_UNITS, Distributed, autocast, init_device
from engine.step import TrainingStep
from engine.throughput import peak_memory
from model import GPT, GPTConfig

ROOT, CPU = Path(__file__).parents[1], torch.device("cpu")
HEAD_SIZE = 64  # in every GPT-2
PADDED_VOCAB_SIZE = GPTConfig().padded_vocab_size  # for peers too, so all models have one size

Result = dict[str, Any]  # the measurements of one turn, by name
Results = dict[str, list[Result]]  # the turns of each contender, by its name
Contender = Callable[[int], Any]  # takes the turn of round i, counted from 0
Maker = Callable[[str, "Size", Any], Contender]  # makes the contender with this name


@dataclass(frozen=True)
class BenchmarkConfig:
    """The flags of benchmarks that compare contenders."""

    rounds: int = flag(5, "measured turns of each contender, after the warmup")
    threads: int = flag(2, "CPU threads of each contender")
    device: str = flag("cpu", "cpu or cuda")
    precision: Precision = flag("fp32", "fp32, or bf16 or fp16 autocast")
    contenders: list[str] = flag([], "only contenders whose name contains one of these")
    one_by_one: bool = flag(False, "one contender at a time, in one process; always on for CUDA")
    json_file: str | None = flag(None, "file to append medians to: a JSON object per contender")

    def init_device(self) -> torch.device:
        return init_device(self.device, local_rank=0)

    def autocast(self) -> AbstractContextManager:
        return autocast(torch.device(self.device), self.precision)


@dataclass(frozen=True)
class Size:
    """The size of a GPT-2, and of the batch of a step: `batch_size` sequences of T tokens."""

    n_layer: int
    n_embd: int
    batch_size: int
    T: int

    @classmethod
    def parse(cls, text: str) -> "Size":
        numbers = text.replace(":", "x").split("x")
        if len(numbers) != 4 or not all(number.isdecimal() for number in numbers):
            raise ValueError(f"size is {text}, expected LAYERSxWIDTH:BATCHxTOKENS (12x768:2x512)")
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


TINY = Size(n_layer=1, n_embd=8, batch_size=1, T=8)  # takes almost no memory


def take_turns(contenders: Mapping[str, Contender], rounds: int, *, warmup: int = 1) -> Results:
    """Call every contender once per round. After the `warmup` rounds, record the `seconds` of each
    call along with the measurements that the contender returns, if any.
    """
    results: Results = {name: [] for name in contenders}
    for i in range(warmup + rounds):
        for name, contender in contenders.items():
            started = time.perf_counter()
            measurements = contender(i)
            if i >= warmup:
                seconds = time.perf_counter() - started
                results[name].append({"seconds": seconds, **(measurements or {})})
    return results


def measure(
    make: Maker, names: Collection[str], size: Size, config: BenchmarkConfig, *, warmup: int = 1
) -> Results:
    """Make the contenders, run `config.rounds` turns of each, and return their measurements.

    Every turn has `seconds` and `peak_bytes`. On CUDA, this is the peak of the allocator. On a CPU,
    it is the peak of resident memory, minus what is resident after a tiny step.

    On a CPU, contenders take turns, each in its own process. On CUDA or with `one_by_one`, they run
    one after another in this process, so that each has the entire GPU. In this mode, a contender
    that runs out of memory or lacks its package is reported and left out.
    """
    torch.set_num_threads(config.threads)
    wanted = config.contenders or [""]  # "" is part of every name
    chosen = [name for name in names if any(part in name for part in wanted)]
    if not chosen:
        raise ValueError(f"no contender's name contains one of {wanted}; choose from {list(names)}")
    if not config.one_by_one and config.init_device().type == "cpu":
        results = measure_in_workers(make, chosen, size, config, warmup)
        for name, turns in results.items():
            append_medians(name, turns, size, config)
        return results
    results = {}
    for name in chosen:
        print(f"measuring {name}, {size}", file=sys.stderr, flush=True)
        try:
            # No variable holds the contender, so its memory is free when the next one starts.
            results |= take_turns(
                {name: make_measured(make, name, size, config)}, config.rounds, warmup=warmup
            )
        except (RuntimeError, ImportError) as error:  # no memory, cannot compile, not installed
            print(f"{name}, {size}, failed: {str(error).splitlines()[0]}", flush=True)
            continue
        append_medians(name, results[name], size, config)
    return results


def make_measured(make: Maker, name: str, size: Size, config: BenchmarkConfig) -> Contender:
    """Make a contender that also measures the `seconds` and `peak_bytes` of its turns."""
    device, baseline_bytes = config.init_device(), 0
    if device.type == "cuda":
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # Take a tiny step first, so that code loaded at first use is not counted.
        make(name, TINY, config)(0)
        gc.collect()
        baseline_bytes = read_memory("VmRSS")
    torch.manual_seed(0)
    contender = make(name, size, config)

    def take_turn(i: int) -> Result:
        started = wait_and_read_clock(device)
        # This replaces the `seconds` of `take_turns`, which include sending the turn to a worker.
        measurements = contender(i) | {"seconds": wait_and_read_clock(device) - started}
        peak = peak_memory(device) if device.type == "cuda" else read_memory("VmHWM")
        return measurements | {"peak_bytes": peak - baseline_bytes}

    return take_turn


def append_medians(name: str, turns: list[Result], size: Size, config: BenchmarkConfig) -> None:
    """Append the medians of a contender's measurements to `config.json_file`, if it is given."""
    if config.json_file is None:
        return
    numeric_keys = [key for key, value in turns[0].items() if isinstance(value, int | float)]
    medians = {key: median(turns, key) for key in numeric_keys}
    benchmark = Path(sys.argv[0]).stem
    record = {**asdict(config), "benchmark": benchmark, "size": str(size), "contender": name}
    with Path(config.json_file).open("a") as file:
        file.write(json.dumps(record | medians) + "\n")


def measure_in_workers(
    make: Maker, names: list[str], size: Size, config: BenchmarkConfig, warmup: int
) -> Results:
    """Measure contenders that take turns. Each is made and kept in its own worker process."""
    for variable in [variable for variable in os.environ if variable.startswith("OMP_")]:
        del os.environ[variable]  # config.threads decides, not the shell
    context, contenders = multiprocessing.get_context("spawn"), {}
    with ExitStack() as stack:
        for name in names:
            worker = stack.enter_context(ProcessPoolExecutor(1, context))
            pickled = pickle.dumps((make, name, size, config))
            contenders[name] = partial(request_turn, worker, pickled)
        return take_turns(contenders, config.rounds, warmup=warmup)


def request_turn(worker: ProcessPoolExecutor, pickled: bytes, i: int) -> Result:
    """Have the worker take a turn. Return its measurements, or raise what it raised."""
    try:
        return worker.submit(take_turn_in_worker, pickled, i).result()
    except BrokenProcessPool as error:
        raise ValueError("the process of a contender was killed; use a smaller size") from error


def take_turn_in_worker(pickled: bytes, i: int) -> Result:
    return contender_of_worker(pickled)(i)


@functools.cache  # a worker always gets the same bytes, so it makes its contender only once
def contender_of_worker(pickled: bytes) -> Contender:
    make, name, size, config = pickle.loads(pickled)  # noqa: S301  # from this program
    sys.stdout = sys.stderr  # what contenders print does not belong in the tables
    torch.set_num_threads(config.threads)
    return make_measured(make, name, size, config)


def wait_and_read_clock(device: torch.device) -> float:
    """Wait until the device has done all its work. Return the time in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def read_memory(field: str, process: int | str = "self") -> int:
    """Return the resident bytes of a process: VmRSS (now) or VmHWM (their peak). Linux only."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def median(turns: list[Result], key: str = "seconds") -> float:
    return statistics.median(turn[key] for turn in turns)


def ratio(results: Results, name: str, reference: str, key: str = "seconds") -> str:
    """Divide a contender's median by the reference's. Return "" if one was not measured."""
    if not {name, reference} <= results.keys():
        return ""
    return f"{median(results[name], key) / median(results[reference], key):.2f}"


@functools.cache  # prints only once
def print_machine() -> None:
    """Print the GPU or CPU, because results from different kinds cannot be compared."""
    if torch.cuda.is_initialized():
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
        return
    info = Path("/proc/cpuinfo").read_text()
    names = re.findall(r"(?m)^model name\s*: (.*)", info) or [platform.machine()]
    units = [unit for unit in CPU_BF16_UNITS if unit in info.split()]
    kind = f"{names[0]} ({', '.join(units) or 'no bf16 units'})"
    print(f"{kind}, {torch.get_num_threads()} threads, torch {torch.__version__}")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print an empty line and a Markdown table. The first call prints the machine before them."""
    print_machine()
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (columns, *rows)]
    lines.insert(1, f"{'|---' * len(columns)}|")
    print("", *lines, sep="\n", flush=True)


def meta_model(config: GPTConfig) -> GPT:
    """Return a model on the meta device, which takes no memory, to count its parameters."""
    with torch.device("meta"):
        return GPT(config)


class RandomBatches:
    """Training data for `TrainingStep`: each step has one batch of random tokens."""

    has_fixed_shape, grad_accum_steps = True, 1

    def __init__(self, size: Size, use_graphs: bool = False):
        self.size, self.block_size, self.batch_size = size, size.T, size.batch_size
        self.graph_lengths = [size.T] if use_graphs else []

    def micro_batch(self, _step: int, _micro_step: int) -> Batch:
        ids = self.size.random_ids(CPU)
        return Batch(ids, ids)

    def targets_in_step(self, _step: int) -> int:
        return self.size.tokens


def random_training_step(
    model: GPT,
    size: Size,
    config: BenchmarkConfig,
    step_class: Any = TrainingStep,
    use_graphs: bool = False,
    **settings: Any,
) -> Any:
    """Return a real training step, an instance of `step_class`, that trains on random tokens."""
    dist = Distributed(rank=0, world_size=1, device=config.init_device())
    defaults = {"batch_size": size.batch_size, "precision": config.precision, "compile": False}
    train_config = TrainConfig(**(defaults | settings))
    data: Any = RandomBatches(size, use_graphs)
    return step_class(model.to(dist.device), data, train_config, dist)


def transformers_gpt2(config: GPTConfig) -> Any:
    """Return a Hugging Face GPT-2 of the same shape, with random weights and without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    options: dict[str, Any] = {"n_layer": config.n_layer, "n_head": config.n_head}
    options |= {"n_embd": config.n_embd, "n_positions": config.block_size, "use_cache": False}
    options |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=PADDED_VOCAB_SIZE, **options))


def transformers_copy(model: GPT) -> Any:
    """Return a Hugging Face GPT-2 with the weights of `model`, in eval mode."""
    from transformers import GPT2LMHeadModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return GPT2LMHeadModel.from_pretrained(folder).eval()
