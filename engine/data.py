"""The batches of a training step as a function of the step.

A split is one stream of N tokens that runs through its shards. Window w of T tokens predicts tokens
w*T + 1 to (w + 1)*T from the ones before them. Together the windows predict every token but the
first exactly once.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

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
        return Batch(*(None if t is None else t.pin_memory() for t in self))  # type: ignore[arg-type]

    def to(self, device: torch.device) -> "Batch":
        copies = (None if t is None else t.to(device, non_blocking=True) for t in self)
        return Batch(*copies)  # type: ignore[arg-type]  # only rows may be None


def make_batch(idx: np.ndarray, targets: np.ndarray) -> Batch:
    """A batch on the CPU. `rows` are found here because on CUDA that would stall the CPU."""
    is_target = targets != IGNORE_INDEX
    rows = None if is_target.all() else torch.from_numpy(np.flatnonzero(is_target))
    return Batch(torch.from_numpy(idx), torch.from_numpy(targets), rows)


class TrainingData(ABC):
    """The rows of a training run, and the batches of a step as a function of the step alone, so
    that a run can resume at any step, on any number of ranks.

    Epochs follow each other without a gap, each with its own seeded order of all rows. Step s is
    the s-th run of `rows_per_step` rows of that sequence, dealt out to micro-steps, ranks and the
    rows of a batch in this order. So a step has the same rows on any machine.
    """

    has_one_shape: ClassVar[bool]  # whether all batches have the same shape
    setting: ClassVar[str]  # the name of `step_size` in the config
    fingerprint: str  # a hash that identifies the data
    epoch_size: str  # of an epoch, for the user

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
        """A step is `step_size` tokens or examples, a row `row_size` of these, and `block_size`
        tokens at most.
        """
        self.n_rows, self.rows_per_step = n_rows, step_size // row_size
        self.block_size, self.batch_size, self.seed = block_size, batch_size, seed
        self.rank, self.world_size = rank, world_size
        if step_size % (micro := batch_size * row_size * world_size):
            sizes = range(min(batch_size, self.rows_per_step), 0, -1)
            fits = next((n for n in sizes if step_size % (n * row_size * world_size) == 0), None)
            remedy = f"{-(-step_size // micro) * micro} is one"
            if fits:
                remedy = f"batch_size {fits} fits, and the loss curve is the same with it"
            raise ValueError(
                f"{self.setting} {step_size} is not a multiple of batch_size {batch_size} x "
                f"{row_size} x {world_size} ranks = {micro}; {remedy}"
            )

    @abstractmethod
    def read_rows(self, ids: list[int]) -> Batch:
        """The rows as a batch."""

    @abstractmethod
    def targets_in_step(self, step: int) -> int:
        """Predicted tokens of a step over all ranks."""

    @abstractmethod
    def tokens_through(self, step: int) -> int:
        """Tokens of all steps up to and including this one."""

    @property
    def grad_accum_steps(self) -> int:
        return self.rows_per_step // (self.batch_size * self.world_size)

    @property
    def steps_per_epoch(self) -> float:
        return self.n_rows / self.rows_per_step

    def row_ids(self, step: int) -> list[int]:
        """The rows of a step, counted from 1."""
        ids: list[int] = []
        while len(ids) < self.rows_per_step:
            epoch, i = divmod((step - 1) * self.rows_per_step + len(ids), self.n_rows)
            order = epoch_order(self.seed, epoch, self.n_rows)
            ids += order[i : i + self.rows_per_step - len(ids)].tolist()
        return ids

    def micro_batch(self, step: int, micro_step: int) -> Batch:
        """This rank's rows of a micro-step. Both arguments count from 1."""
        first = ((micro_step - 1) * self.world_size + self.rank) * self.batch_size
        return self.read_rows(self.row_ids(step)[first : first + self.batch_size])

    def summary(self) -> str:
        """The sizes that follow from the config, for the user."""
        return (
            f"{self.tokens_through(1):,} tokens in the first step: {self.batch_size} rows of up to "
            f"{self.block_size} tokens x {self.world_size} ranks x grad_accum_steps "
            f"{self.grad_accum_steps}\n"
            f"data: {self.epoch_size}; an epoch is {self.steps_per_epoch:,.1f} steps"
        )


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


@functools.lru_cache(maxsize=2)  # a step may end one epoch and begin the next
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """All n rows in the order of an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(n)


class PretrainingData(TrainingData):
    """Windows of tokens. The last window of an epoch may be short."""

    has_one_shape = True
    setting = "total_batch_size"

    def __init__(
        self, shards: TokenShards, *, block_size: int, total_batch_size: int, **options: int
    ):
        self.shards, self.total_batch_size = shards, total_batch_size
        self.fingerprint, self.epoch_size = shards.fingerprint, f"{len(shards):,} tokens"
        n_windows = -(-(len(shards) - 1) // block_size)
        sizes = {"row_size": block_size, "block_size": block_size, **options}
        super().__init__(n_windows, total_batch_size, **sizes)

    def read_rows(self, ids: list[int]) -> Batch:
        return read_windows(self.shards, ids, self.block_size, limit=len(self.shards) - 1)

    def targets_in_step(self, step: int) -> int:
        """total_batch_size, less what the last window of an epoch lacks."""
        missing = self.n_rows * self.block_size - (len(self.shards) - 1)
        return self.total_batch_size - missing * self.row_ids(step).count(self.n_rows - 1)

    def tokens_through(self, step: int) -> int:
        return step * self.total_batch_size


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
