"""The batches of a training step as a function of the step.

A split is one stream of N tokens that runs through its shards. Window w of T tokens predicts tokens
w*T + 1 to (w + 1)*T from the ones before them. Together the windows predict every token but the
first exactly once.
"""

import functools
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

from engine.shards import TokenShards

IGNORE_INDEX = -100  # a target that does not count, as in F.cross_entropy


class Batch(NamedTuple):
    """Token ids and the tokens after them, (B, T) int64. `rows` (n) are the indices into the
    flattened (B*T) targets that are not IGNORE_INDEX, or None if all are targets.
    """

    idx: torch.Tensor
    targets: torch.Tensor
    rows: torch.Tensor | None = None

    def pin_memory(self) -> "Batch":
        """In pinned memory, from which copies to CUDA run beside the computation."""
        rows = None if self.rows is None else self.rows.pin_memory()
        return Batch(self.idx.pin_memory(), self.targets.pin_memory(), rows)

    def to(self, device: torch.device) -> "Batch":
        idx, targets = (t.to(device, non_blocking=True) for t in (self.idx, self.targets))
        rows = None if self.rows is None else self.rows.to(device, non_blocking=True)
        return Batch(idx, targets, rows)


def make_batch(idx: np.ndarray, targets: np.ndarray) -> Batch:
    """A batch on the CPU. `rows` are found here because on CUDA that would stall the CPU."""
    is_target = targets != IGNORE_INDEX
    rows = None if is_target.all() else torch.from_numpy(np.flatnonzero(is_target))
    return Batch(torch.from_numpy(idx), torch.from_numpy(targets), rows)


class TrainingData(Protocol):
    """The data of a training run: batches as a function of the step alone, so that a run can resume
    at any step, on any number of ranks.
    """

    @property
    def block_size(self) -> int:
        """Tokens in the longest row."""

    @property
    def has_one_shape(self) -> bool:
        """Whether all batches have the same shape."""

    @property
    def fingerprint(self) -> str:
        """A hash that identifies the data."""

    @property
    def grad_accum_steps(self) -> int:
        """Micro-steps per step."""

    def micro_batch(self, step: int, micro_step: int) -> Batch:
        """This rank's rows of a micro-step. Both arguments count from 1."""

    def targets_in_step(self, step: int) -> int:
        """Predicted tokens of a step over all ranks."""

    def tokens_through(self, step: int) -> int:
        """Tokens of all steps up to and including this one."""

    @property
    def epoch_size(self) -> str:
        """The tokens or examples of an epoch, for the user."""

    @property
    def steps_per_epoch(self) -> float: ...

    def summary(self) -> str:
        """The sizes that follow from the config, for the user."""


def read_windows(shards: TokenShards, ids: list[int], block_size: int, limit: int) -> Batch:
    """The windows `ids` as a batch, from the first `limit` + 1 tokens. Beyond them idx is 0 and
    targets are IGNORE_INDEX.
    """
    idx = np.zeros((len(ids), block_size), dtype=np.int64)
    targets = np.full((len(ids), block_size), IGNORE_INDEX, dtype=np.int64)
    for row, window in enumerate(ids):
        start = window * block_size
        length = min(block_size, limit - start)
        if length > 0:
            tokens = shards.read(start, start + length + 1)
            idx[row, :length] = tokens[:-1]
            targets[row, :length] = tokens[1:]
    return make_batch(idx, targets)


def epoch_entries(first: int, count: int, n: int, seed: int) -> list[int]:
    """`count` entries from `first` on of an endless sequence of epochs, each of which holds
    0 to n - 1 in a new seeded order.
    """
    ids: list[int] = []
    while len(ids) < count:
        epoch, i = divmod(first + len(ids), n)
        ids.extend(epoch_order(seed, epoch, n)[i : i + count - len(ids)])
    return [int(i) for i in ids]


@functools.lru_cache(maxsize=2)  # a step may end one epoch and begin the next
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)


@dataclass(frozen=True)
class PretrainingData:
    """Batches of token windows, as `TrainingData` describes.

    Epochs follow each other without a gap, each with its own seeded order of all windows. Step s is
    the s-th run of total_batch_size / block_size windows of that sequence, dealt out to
    micro-steps, ranks and rows in this order. So a step has the same windows on any machine.
    """

    shards: TokenShards
    _: KW_ONLY
    block_size: int
    batch_size: int
    total_batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        micro = self.batch_size * self.block_size * self.world_size
        if self.total_batch_size % micro:
            rows, rest = divmod(self.total_batch_size, self.block_size * self.world_size)
            fitting = [n for n in range(min(self.batch_size, rows), 0, -1) if rows % n == 0]
            below = self.total_batch_size // micro * micro
            nearest = " or ".join(str(n) for n in (below, below + micro) if n)
            remedy = f"the nearest are {nearest}"
            if fitting and not rest:
                remedy = f"--batch_size {fitting[0]} fits, and the loss curve is the same with it"
            raise ValueError(
                f"total_batch_size {self.total_batch_size} is not a multiple of batch_size "
                f"{self.batch_size} x block_size {self.block_size} x {self.world_size} ranks = "
                f"{micro}; {remedy}"
            )

    @property
    def has_one_shape(self) -> bool:
        return True

    @property
    def fingerprint(self) -> str:
        return self.shards.fingerprint

    @property
    def grad_accum_steps(self) -> int:
        return self.total_batch_size // (self.batch_size * self.block_size * self.world_size)

    @property
    def windows_per_step(self) -> int:
        return self.total_batch_size // self.block_size

    @property
    def n_windows(self) -> int:
        """Windows in an epoch. The last one may be short."""
        return -(-(len(self.shards) - 1) // self.block_size)

    def _window_ids(self, first: int, count: int) -> list[int]:
        return epoch_entries(first, count, self.n_windows, self.seed)

    def micro_batch(self, step: int, micro_step: int) -> Batch:
        position = (micro_step - 1) * self.world_size + self.rank
        first = (step - 1) * self.windows_per_step + position * self.batch_size
        ids = self._window_ids(first, self.batch_size)
        return read_windows(self.shards, ids, self.block_size, limit=len(self.shards) - 1)

    def targets_in_step(self, step: int) -> int:
        """total_batch_size, less what the last window of an epoch lacks."""
        ids = self._window_ids((step - 1) * self.windows_per_step, self.windows_per_step)
        missing = self.n_windows * self.block_size - (len(self.shards) - 1)
        return self.total_batch_size - missing * ids.count(self.n_windows - 1)

    def tokens_through(self, step: int) -> int:
        return step * self.total_batch_size

    @property
    def epoch_size(self) -> str:
        return f"{len(self.shards):,} tokens"

    @property
    def steps_per_epoch(self) -> float:
        return len(self.shards) / self.total_batch_size

    def summary(self) -> str:
        return (
            f"tokens per step: {self.total_batch_size:,} = {self.batch_size} sequences x "
            f"{self.block_size} tokens x {self.world_size} ranks x grad_accum_steps "
            f"{self.grad_accum_steps}\n"
            f"data: {self.epoch_size}, an epoch is {self.steps_per_epoch:,.1f} steps"
        )


def validation_batches(
    shards: TokenShards,
    *,
    block_size: int,
    batch_size: int,
    eval_tokens: int,
    one_shape: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """This rank's share of the windows that predict the first `eval_tokens` tokens, in order. All
    ranks get equally many batches of the same shape; some may have sequences without targets. With
    `one_shape` it is that of training, for which a model was compiled; else no larger than needed.
    """
    limit = min(eval_tokens, len(shards) - 1)
    n_windows = -(-limit // block_size)
    n_batches = -(-n_windows // (batch_size * world_size))
    rows = batch_size if one_shape else -(-n_windows // (n_batches * world_size))
    for first in range(0, n_windows, rows * world_size):
        start = first + rank * rows
        yield read_windows(shards, list(range(start, start + rows)), block_size, limit)
