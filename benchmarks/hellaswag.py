"""HellaSwag examples per second at GPT-2 124M: this project, lm-evaluation-harness, build-nanogpt.

    python benchmarks/hellaswag.py --data hellaswag_val.jsonl   # fp32 on a CPU thread: 12 minutes
    python benchmarks/hellaswag.py --data FILE --rows 500 --device cuda --precision bf16

All have the same random weights. Each round has new rows, the same for all, and its time includes
tokenization. We also compare the predictions. build-nanogpt's loop uses the Hugging Face GPT-2.
"""

import json
import os
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import harness
from benchmarks.harness import BenchmarkConfig, Contender, Result, Results, Size
from engine.config import flag, run_command
from engine.distributed import Distributed
from engine.pretrained import save_pretrained
from engine.rows import open_rows
from engine.tasks import make_task, predict
from engine.tokenizer import Tokenizer
from model import GPT

Predictions = list[tuple[int, int]]  # for each row, the ending with the best sum, and the best mean
OURS, OURS_RAW = "this project", "this project, raw text"
LM_EVAL_PREFIX, LOOP = "lm-eval, batch", "build-nanogpt's loop"
BLOCK_SIZE = 1024
LM_EVAL_BATCH_SIZES = {"cpu": (1, 16), "cuda": (16, 64)}


@dataclass(frozen=True)
class HellaSwagBenchmarkConfig(BenchmarkConfig):
    data: str | None = flag(None, "HellaSwag rows, .jsonl or .jsonl.gz (default: from the hub)")
    rounds: int = flag(3, "measured rounds, after one warmup round")
    rows: int = flag(30, "examples per round")
    n_layer: int = flag(12, "blocks of the model; its width is 768")
    threads: int = flag(1, "CPU threads of each contender")


def predict_with_ours(model: GPT, device: torch.device, text: str, file: Path) -> Predictions:
    task = make_task("hellaswag", data=str(file), text=text)
    examples = task.load(Tokenizer.gpt2(), model.config.block_size)
    batches = task.score_examples(model, examples, Distributed(0, 1, device))
    records = {record["row"]: record for batch in batches for record in batch}
    return [(records[row]["pred"], records[row]["pred_norm"]) for row in sorted(records)]


def predict_with_lm_eval(lm: Any, file: Path) -> Predictions:
    from lm_eval.api.instance import Instance
    from lm_eval.tasks.hellaswag.utils import preprocess

    requests, lengths = [], []
    for row in map(json.loads, file.read_text().splitlines()):
        context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}"
        query = preprocess(f"{row['activity_label']}: {context}")
        choices = [preprocess(ending) for ending in row["endings"]]
        pairs = [(query, f" {choice}") for choice in choices]
        requests += [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        lengths.append([len(choice) for choice in choices])
    answers = lm.loglikelihood(requests, disable_tqdm=True)
    log_probs = iter([log_prob for log_prob, _is_greedy in answers])
    # Each row takes the log-probabilities of its own endings from the iterator.
    return [predict(list(islice(log_probs, len(n_chars))), n_chars) for n_chars in lengths]


def predict_with_loop(peer: Any, file: Path) -> Predictions:
    """Predict like build-nanogpt: one example at a time, padded, with logits at all positions."""
    predictions, encode = [], Tokenizer.gpt2().encode
    for row in map(json.loads, file.read_text().splitlines()):
        context, endings = encode(row["ctx"]), [encode(" " + e) for e in row["endings"]]
        tokens = torch.zeros(len(endings), len(context) + max(map(len, endings)), dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for i, ending in enumerate(endings):
            n = len(context) + len(ending)
            tokens[i, :n] = torch.tensor(context + ending)
            mask[i, len(context) : n] = 1
        tokens, mask = tokens.to(peer.device), mask[:, 1:].to(peer.device)
        logits, targets = peer(tokens).logits[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        sums = (losses.view_as(mask) * mask).sum(dim=1)
        predictions.append((int(sums.argmin()), int((sums / mask.sum(dim=1)).argmin())))
    return predictions


def make_contender(
    files: list[Path], name: str, size: Size, config: HellaSwagBenchmarkConfig
) -> Contender:
    """Make a contender that predicts the endings of the rows in `files[i]` in round i."""
    model, device = GPT(size.gpt_config(BLOCK_SIZE)).eval(), config.init_device()
    predict_file: Callable[[Path], Predictions]
    if name.startswith(LM_EVAL_PREFIX):
        os.environ["HF_HUB_OFFLINE"] = "1"  # lm-eval finds all it needs in the folder
        from lm_eval.models.huggingface import HFLM

        with tempfile.TemporaryDirectory() as folder:
            save_pretrained(model, Path(folder), Tokenizer.gpt2())
            batch_size = int(name.removeprefix(LM_EVAL_PREFIX))
            lm = HFLM(pretrained=folder, device=str(device), batch_size=batch_size)
        predict_file = partial(predict_with_lm_eval, lm)
    elif name == LOOP:
        predict_file = partial(predict_with_loop, harness.transformers_copy(model).to(device))
    else:
        text = "raw" if name == OURS_RAW else "lm-eval"
        predict_file = partial(predict_with_ours, model.to(device), device, text)

    @torch.no_grad()
    def step(i: int) -> Result:
        with config.autocast():
            return {"predictions": predict_file(files[i])}

    return step


def write_rounds(config: HellaSwagBenchmarkConfig, folder: str) -> list[Path]:
    """Write one file of random rows per round, including the warmup."""
    task = make_task("hellaswag", data=config.data)
    rows = open_rows(task.source, task.hub.config, task.hub.split)
    lines = [c.decode() if isinstance(c, bytes) else json.dumps(c) + "\n" for _, _, c in rows]
    n = (config.rounds + 1) * config.rows
    if len(lines) < n:
        raise ValueError(f"data has {len(lines)} rows, expected at least {n}; lower --rows")
    random.Random(0).shuffle(lines)
    files = [Path(folder) / f"round_{i}.jsonl" for i in range(config.rounds + 1)]
    for i, file in enumerate(files):
        file.write_text("".join(lines[i * config.rows : (i + 1) * config.rows]))
    return files


def list_cells(name: str, results: Results, n_rows: int) -> list[str]:
    ours = OURS_RAW if name in (OURS_RAW, LOOP) else OURS  # the loop scores raw text
    theirs = [each for turn in results[name] for each in turn["predictions"]]
    expected = [each for turn in results.get(ours, []) for each in turn["predictions"]]
    pairs = list(zip(theirs, expected, strict=False))  # none if --contenders leaves ours out
    equal = [f"{sum(a[i] == b[i] for a, b in pairs)} of {len(pairs)}" for i in (0, 1)]
    speed = f"{n_rows / harness.median(results[name]):.2f}"
    return [name, speed, f"{harness.ratio(results, name, ours)} x", *equal]


def main(config: HellaSwagBenchmarkConfig) -> None:
    lm_eval = [f"{LM_EVAL_PREFIX} {n}" for n in LM_EVAL_BATCH_SIZES[config.init_device().type]]
    names = OURS, *lm_eval, OURS_RAW, LOOP
    with tempfile.TemporaryDirectory() as folder:
        files = write_rounds(config, folder)
        size = Size(config.n_layer, 768, batch_size=1, T=BLOCK_SIZE)
        results = harness.measure(partial(make_contender, files), names, size, config)
    columns = "examples/s", "ours / this", "equal (summed)", "equal (normalized)"
    rows = [list_cells(name, results, config.rows) for name in results]
    harness.print_table(["contender", *columns], rows)


if __name__ == "__main__":
    run_command(main, HellaSwagBenchmarkConfig, __doc__)
