"""Evaluation during training: validation loss, samples, HellaSwag."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.config import TrainConfig
from engine.data import IGNORE_INDEX, Batch
from engine.distributed import Distributed, autocast, cudnn_attention, has_finite_weights
from engine.loss import SummedLoss
from engine.metrics import finite_or_none, read_metrics
from engine.tasks import Example, make_task
from engine.tokenizer import Tokenizer
from model import GPT

ValidationBatches = Callable[[], Iterable[Batch]]  # each call returns this rank's batches


@dataclass(frozen=True)
class Prompt:
    """A text to continue as a sample. `reference` is the expected continuation, if there is one.
    `ids` are the tokens of the text; None stands for those of `encode_prompt`.
    """

    text: str = "Hello, I'm a language model,"  # the prompt of build-nanogpt
    max_new_tokens: int = 32
    top_k: int = 50
    reference: str | None = None
    ids: list[int] | None = None


def read_val_losses(run: Path, last_step: int) -> list[float | None]:
    """Return the validation losses in a run's log, up to `last_step`. Step 0 does not count."""
    records = read_metrics(run) if (run / "metrics.jsonl").exists() else []
    return [r["val_loss"] for r in records if "val_loss" in r and 0 < r["step"] <= last_step]


def evaluations_since_best(val_losses: list[float | None]) -> int:
    """Return how many evaluations followed the best one. Ties go to the first."""
    losses = [math.inf if loss is None else loss for loss in val_losses]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


def is_last_step(step: int, config: TrainConfig, val_losses: list[float | None]) -> bool:
    """Return whether the run ends at `step`: at max_steps, or because patience is used up."""
    patience = config.patience or math.inf
    return step == config.max_steps or evaluations_since_best(val_losses) >= patience


@dataclass
class Evaluation:
    """Evaluates a model in training. Validation batches and HellaSwag are split over the ranks. All
    ranks generate all samples, because FSDP needs every rank in each forward pass.
    """

    model: GPT
    tokenizer: Tokenizer
    summed_loss: SummedLoss
    val: ValidationBatches
    prompts: list[Prompt]
    hellaswag: list[Example]
    config: TrainConfig
    dist: Distributed
    has_fixed_shape: bool  # whether all batches have the shape that training is compiled for
    val_losses: list[float | None]  # of all evaluations after step 0; None if not finite

    def is_best(self) -> bool:
        """Return whether the latest evaluation beats all earlier ones."""
        return evaluations_since_best(self.val_losses) == 0

    def evaluate_step(self, step: int) -> dict:
        """Run the evaluations that are due at this step. Return their entries for the log."""
        record: dict[str, Any] = {}
        model, config, dist, started = self.model, self.config, self.dist, time.perf_counter()
        if not config.is_any_evaluation_due(step):
            return record
        if config.is_due(config.eval_every, step):
            with eval_mode(model, config, dist, compiled=True, fixed_shape=self.has_fixed_shape):
                token_bytes = self.tokenizer.token_bytes
                loss, bpb = evaluate_loss(self.summed_loss, self.val(), token_bytes, dist)
            record["val_loss"] = finite_or_none(loss)
            self.val_losses += [record["val_loss"]] if step else []
            record["val_bpb"] = None if bpb is None else finite_or_none(bpb)
        with eval_mode(model, config, dist):
            if config.is_due(config.sample_every, step):
                options: dict[str, Any] = {"seed": config.seed + step, "device": dist.device}
                record["samples"] = generate_samples(model, self.tokenizer, self.prompts, **options)
            if config.is_due(config.hellaswag_every, step) and step:  # not at step 0
                record |= evaluate_task("hellaswag", model, self.hellaswag, dist)
        # The GPU is idle here: each evaluation has returned numbers.
        return record | {"eval_ms": round((time.perf_counter() - started) * 1e3, 2)}


@contextmanager
def eval_mode(
    model: GPT,
    config: TrainConfig,
    dist: Distributed,
    *,
    compiled: bool = False,
    fixed_shape: bool = False,
) -> Iterator[None]:
    """Put the model into evaluation mode: no dropout, autocast as in training, but no TF32, so that
    HellaSwag gives the same results as in hellaswag.py.

    Without `compiled`, the model runs eagerly: compiling for the many shapes of samples takes
    longer than it saves. `fixed_shape` says that all batches have the same shape; only then may
    attention use cuDNN, because cuDNN is slow to plan for a new shape.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    model.eval()
    stance = torch.compiler.set_stance("default" if compiled else "force_eager")
    with stance, cudnn_attention(fixed_shape), autocast(dist.device, config.precision):
        yield
    model.train()
    torch.set_float32_matmul_precision(precision)


@torch.no_grad()
def evaluate_loss(
    summed_loss: SummedLoss, batches: Iterable[Batch], token_bytes: np.ndarray, dist: Distributed
) -> tuple[float, float | None]:
    """Return the mean loss over all targets in the batches of all ranks, in nats per token and in
    bits per byte of text. `token_bytes` (V) holds the number of bytes of each token. Bits per byte
    are None if the targets have no bytes.
    """
    lengths = torch.from_numpy(token_bytes)
    loss_sum, n_targets, n_bytes = 0.0, 0, 0
    for batch in batches:
        loss_sum += summed_loss(batch.to(dist.device)).item()
        targets = batch.targets[batch.targets != IGNORE_INDEX]
        n_targets += len(targets)
        n_bytes += int(lengths[targets].sum())
    nats, all_targets, all_bytes = dist.sum(loss_sum, n_targets, n_bytes)
    bits_per_byte = nats / math.log(2) / all_bytes if all_bytes else None
    return nats / all_targets, bits_per_byte


def evaluate_task(
    name: str, model: GPT, examples: list[Example], dist: Distributed
) -> dict[str, float | None]:
    """Evaluate the model on a task. Return the metrics under the names they have in the log."""
    task = make_task(name)
    batches = task.score_examples(model, examples, dist)
    metrics = task.compute_metrics([record for batch in batches for record in batch])
    return {f"{name}_{key}": finite_or_none(metric["value"]) for key, metric in metrics.items()}


def generate_samples(
    model: GPT, tokenizer: Tokenizer, prompts: list[Prompt], *, seed: int, device: torch.device
) -> list[str]:
    """Return each prompt with the model's continuation, and with its reference if it has one."""
    if not has_finite_weights(model):
        raise ValueError(
            "the model has weights that are not finite, so it cannot generate samples; start again "
            "in another out_dir, with a lower max_lr or from another model"
        )
    samples, unused = [], tokenizer.unused_ids(model.config.vocab_size)
    for prompt in prompts:
        ids = prompt.ids or tokenizer.encode_prompt(prompt.text)
        # If there is a reference, the sample is an answer: stop at the end of text. Otherwise show
        # what the model writes after it, too.
        has_reference = prompt.reference is not None
        end = tokenizer.end_of_text if has_reference else None
        out = model.generate(
            torch.tensor([ids], device=device),
            prompt.max_new_tokens,
            top_k=prompt.top_k,
            eos=end,
            suppress_tokens=unused,
            generator=torch.Generator(device).manual_seed(seed),
        )
        new = [i for i in out[0, len(ids) :].tolist() if i != end]
        reference = f"\n[reference] {prompt.reference}" if has_reference else ""
        samples.append(prompt.text + tokenizer.decode(new) + reference)
    return samples
