"""Batches for training and validation. The batches of a training step depend only on its number.

All shards of a split form one stream of tokens. We read it in windows of T tokens, each with the
token that follows it. Together, the windows predict every token but the first exactly once:

    stream    a b c d e f g h i            T = 4
    window 0  a b c d            predicts    b c d e
    window 1          e f g h    predicts            f g h i
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from typing import ClassVar, NamedTuple

import numpy as np
import torch

from engine.shards import TokenShards

IGNORE_INDEX = -100  # a target without loss, as in F.cross_entropy


class Batch(NamedTuple):
    """Input ids and the ids that follow them, both (B, T) int64. A target of IGNORE_INDEX is not
    predicted. `target_positions` (n) holds the indices of the other targets in targets.view(-1). It
    is None if every target is predicted.
    """

    idx: torch.Tensor
    targets: torch.Tensor
    target_positions: torch.Tensor | None = None

    def pin_memory(self) -> "Batch":
        """Copy to pinned memory, so that the transfer to the GPU can overlap with compute."""
        return Batch(*(None if t is None else t.pin_memory() for t in self))  # type: ignore[arg-type]

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(None if t is None else t.to(device, non_blocking=True) for t in self))  # type: ignore[arg-type]  # only target_positions may be None


def make_batch(idx: np.ndarray, targets: np.ndarray) -> Batch:
    """Make a batch on the CPU. Finding the target positions on a GPU would force a sync."""
    is_target = targets != IGNORE_INDEX
    positions = None if is_target.all() else torch.from_numpy(np.flatnonzero(is_target))
    return Batch(torch.from_numpy(idx), torch.from_numpy(targets), positions)


def pad_rows(rows: list[tuple[np.ndarray, np.ndarray]], length: int) -> Batch:
    """Make a batch from the inputs and targets of each row. Pad them on the right to `length`, with
    0 and IGNORE_INDEX.
    """
    idx = np.zeros((len(rows), length), dtype=np.int64)
    targets = np.full_like(idx, IGNORE_INDEX)
    for i, (row_inputs, row_targets) in enumerate(rows):
        idx[i, : len(row_inputs)] = row_inputs
        targets[i, : len(row_targets)] = row_targets
    return make_batch(idx, targets)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def round_up(n: int, multiple: int) -> int:
    return ceil_div(n, multiple) * multiple


class TrainingData(ABC):
    """The rows of a training run: windows of text, or examples. The batches of a step depend only
    on its number, so a run can resume at any step, on any number of ranks.

    Every epoch goes through all rows in a new order, drawn with the seed. A step takes the next
    `rows_per_step` rows, if need be across the end of an epoch. It splits them by micro-step, then
    by rank. For example, with batch_size 2 and 2 ranks:

        row         0 1 2 3 4 5 6 7
        micro-step  1 1 1 1 2 2 2 2
        rank        0 0 1 1 0 0 1 1
    """

    has_fixed_shape: ClassVar[bool]  # whether all batches have the same shape
    step_size_flag: ClassVar[str]  # the flag that sets step_size, for error messages
    graph_lengths: Sequence[int] = ()  # batch lengths that get a CUDA graph each; empty: no graphs
    fingerprint: str  # a hash that identifies the data
    batch_sizes: list[int]  # sizes up to batch_size that divide a step, largest first
    epoch_contents: str  # printed at the start of a run, such as "1,000 tokens"

    def __init__(
        self,
        n_rows: int,
        step_size: int,
        *,
        row_size: int,
        block_size: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        """`step_size` is the size of a step over all ranks: in tokens for pretraining, in examples
        for fine-tuning. `row_size` is what one row adds to it: block_size tokens, or 1 example. A
        row has at most `block_size` tokens. Raises ValueError if a step does not divide evenly into
        batches for all ranks.
        """
        self.n_rows, self.rows_per_step = n_rows, step_size // row_size
        self.block_size, self.batch_size, self.seed = block_size, batch_size, seed
        self.rank, self.world_size = rank, world_size
        micro_step_size = batch_size * row_size * world_size
        smaller = range(min(batch_size, self.rows_per_step), 0, -1)
        self.batch_sizes = [n for n in smaller if step_size % (n * row_size * world_size) == 0]
        if step_size % micro_step_size:
            remedy = f"use {self.step_size_flag} {round_up(step_size, micro_step_size)}"
            if self.batch_sizes:
                remedy = f"use batch_size {self.batch_sizes[0]}, which gives the same loss curve"
            raise ValueError(
                f"{self.step_size_flag} {step_size} is not a multiple of batch_size {batch_size} x "
                f"{row_size} per row x {world_size} ranks = {micro_step_size}; {remedy}"
            )

    @abstractmethod
    def read_batch(self, ids: list[int]) -> Batch:
        """Read the rows `ids` into a batch."""

    @abstractmethod
    def targets_in_step(self, step: int) -> int:
        """Return the number of tokens that a step predicts, over all ranks."""

    @abstractmethod
    def tokens_through(self, step: int) -> int:
        """Return the number of tokens in all steps up to and including this one."""

    @property
    def grad_accum_steps(self) -> int:
        return self.rows_per_step // (self.batch_size * self.world_size)

    @property
    def steps_per_epoch(self) -> float:
        return self.n_rows / self.rows_per_step

    def row_ids(self, step: int) -> list[int]:
        """Return the ids of the rows in a step. Steps count from 1."""
        ids: list[int] = []
        while len(ids) < self.rows_per_step:  # an epoch may end within the step
            epoch, i = divmod((step - 1) * self.rows_per_step + len(ids), self.n_rows)
            order = epoch_order(self.seed, epoch, self.n_rows)
            ids += order[i : i + self.rows_per_step - len(ids)].tolist()
        return ids

    def micro_batch(self, step: int, micro_step: int) -> Batch:
        """Read this rank's batch of a micro-step. Steps and micro-steps count from 1."""
        first = ((micro_step - 1) * self.world_size + self.rank) * self.batch_size
        return self.read_batch(self.row_ids(step)[first : first + self.batch_size])

    def summary(self) -> str:
        """Return a text for the user: tokens, micro-steps and steps per epoch."""
        return (
            f"{self.tokens_through(1):,} tokens in the first step: {self.batch_size} rows of up to "
            f"{self.block_size} tokens x {self.world_size} ranks x grad_accum_steps "
            f"{self.grad_accum_steps}\n"
            f"data: {self.epoch_contents}; an epoch is {self.steps_per_epoch:,.1f} steps"
        )


def read_windows(shards: TokenShards, ids: list[int], block_size: int, n_targets: int) -> Batch:
    """Read the windows `ids` into a batch. It predicts only the first `n_targets` targets of the
    stream: past these, idx is padded with 0 and targets with IGNORE_INDEX.
    """
    rows = []
    for window in ids:
        start, stop = window * block_size, min((window + 1) * block_size, n_targets)
        tokens = shards.read(start, stop + 1) if start < stop else np.empty(0, dtype=np.int64)
        rows.append((tokens[:-1], tokens[1:]))
    return pad_rows(rows, block_size)


@lru_cache(maxsize=2)  # a step may end one epoch and begin the next
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """Return the ids of all n rows in the order of an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(n)


class PretrainingData(TrainingData):
    """Windows of block_size tokens. The last window of the stream may be shorter. It is padded."""

    has_fixed_shape = True
    step_size_flag = "total_batch_size"

    def __init__(
        self, shards: TokenShards, *, block_size: int, total_batch_size: int, **options: int
    ):
        """`options` are the batch_size, seed, rank and world_size of TrainingData."""
        self.shards, self.total_batch_size = shards, total_batch_size
        self.fingerprint, self.epoch_contents = shards.fingerprint, f"{len(shards):,} tokens"
        n_windows = ceil_div(len(shards) - 1, block_size)
        sizes = {"row_size": block_size, "block_size": block_size}
        super().__init__(n_windows, total_batch_size, **sizes, **options)

    def read_batch(self, ids: list[int]) -> Batch:
        return read_windows(self.shards, ids, self.block_size, n_targets=len(self.shards) - 1)

    def targets_in_step(self, step: int) -> int:
        """Return total_batch_size, minus the padding if the step has the last window."""
        padding = self.n_rows * self.block_size - (len(self.shards) - 1)
        return self.total_batch_size - padding * self.row_ids(step).count(self.n_rows - 1)

    def tokens_through(self, step: int) -> int:
        return step * self.total_batch_size


def validation_batches(
    shards: TokenShards,
    *,
    block_size: int,
    batch_size: int,
    eval_tokens: int,
    full_batches: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Yield this rank's share of the windows that predict the first `eval_tokens` tokens, in order.

    All ranks get the same number of batches, all of one shape, so some rows may be only padding.
    With `full_batches`, a batch has batch_size rows, as in training, so that a compiled model is
    not recompiled. Otherwise it has no more rows than needed.
    """
    n_targets = min(eval_tokens, len(shards) - 1)
    n_windows = ceil_div(n_targets, block_size)
    n_batches = ceil_div(n_windows, batch_size * world_size)  # per rank
    n_rows = batch_size if full_batches else ceil_div(n_windows, n_batches * world_size)
    for i in range(n_batches):
        first = (i * world_size + rank) * n_rows
        yield read_windows(shards, list(range(first, first + n_rows)), block_size, n_targets)


class Prefetcher:
    """Returns a rank's micro-batches on its device. While the model trains on one, a thread
    prepares the next. Batches depend only on the step, so this affects nothing but the timing.
    """

    def __init__(self, data: TrainingData, device: torch.device):
        self.data, self.device = data, device
        # Without this, the threads of all ranks would pin memory through the first GPU.
        set_device = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
        self.thread = ThreadPoolExecutor(1, "prefetch", set_device)
        self.ahead: dict[tuple[int, int], Future[Batch]] = {}  # by step and micro-step

    def __call__(self, step: int, micro_step: int) -> Batch:
        """Return the batch of a micro-step. Raises any exception from the thread."""
        is_last = micro_step == self.data.grad_accum_steps
        following = (step + 1, 1) if is_last else (step, micro_step + 1)
        for key in ((step, micro_step), following):
            if key not in self.ahead:
                self.ahead[key] = self.thread.submit(self._prepare, *key)
        # Copying 1 MB takes 40 us. That is too short to be worth a separate CUDA stream.
        return self.ahead.pop((step, micro_step)).result().to(self.device)

    def _prepare(self, step: int, micro_step: int) -> Batch:
        batch = self.data.micro_batch(step, micro_step)
        return batch.pin_memory() if self.device.type == "cuda" else batch
