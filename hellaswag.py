"""Measure a model: HellaSwag as lm-evaluation-harness and build-nanogpt do, LAMBADA, or the
perplexity of a text.
"""

import json
import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import cli
from checkpoint import Log, check_vocabulary, load_model, lock_run, weights_sha256
from data import sha256_of, write_json
from model import GPT
from report import PROGRESS_SECONDS
from runtime import Distributed, Precision, autocast_dtype, default_precision
from scoring import Score, score
from tasks import HUB_ROWS, Example, load_examples, predictions
from text import find_files

Z_95 = 1.959964  # the normal quantile of a 95 % interval
MAX_EXPONENT = 709  # e to the power of more is no float


@dataclass(frozen=True)
class EvalConfig:
    model: str = "gpt2"
    """hub name, Hugging Face folder, checkpoint, or run folder (its newest checkpoint)"""
    lora_load_path: str | None = None
    """adapter to put on the model: a folder, a run or a lora.pt"""
    task: Literal["hellaswag", "lambada", "text"] = "hellaswag"
    """hellaswag, lambada (OpenAI's, the last word of each text), or text (its perplexity)"""
    text: Literal["lm-eval", "raw"] = "lm-eval"
    """hellaswag: the text as lm-eval cleans it (acc, acc_norm), or as build-nanogpt takes it
    (acc_raw, acc_token_norm)"""
    data: str | None = None
    """rows, .jsonl or .jsonl.gz (default: from the hub); task text: .txt, .jsonl or .parquet too,
    a file, a folder or a glob"""
    limit: int | None = None
    """use the first n rows, or documents, only"""
    stride: int | None = None
    """task text: tokens between windows (default: the model's block_size, so none overlap)"""
    skip_bad_rows: bool = False
    """leave broken rows out instead of stopping"""
    out_dir: str | None = None
    """folder for results.json and rows.jsonl; the same command goes on there (default: none)"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""
    precision: Precision | None = None
    """of matrix products (default: bf16 on CUDA, fp16 on cards without it, fp32 elsewhere)"""

    def __post_init__(self) -> None:
        for name in ("limit", "stride"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name, task in (("stride", "text"), ("text", "hellaswag")):
            if self.task != task and getattr(self, name) not in (None, "lm-eval"):
                raise ValueError(f"--{name} is for --task {task}, and the task is {self.task}")


def record_of(task: str, example: Example, scores: list[Score]) -> dict:
    """The example's line of rows.jsonl; ValueError for a log-probability that is not finite."""
    log_probs = [score.log_prob for score in scores]
    if not all(map(math.isfinite, log_probs)):
        raise ValueError(
            f"row {example.facts['row']} has log-probabilities {log_probs}: the model is damaged, "
            "or needs --precision fp32"
        )
    record = {**example.facts, "log_probs": log_probs}
    if task == "hellaswag":
        record["pred"], record["pred_norm"] = predictions(log_probs, record["lengths"])
    elif task == "lambada":
        record["greedy"] = scores[0].greedy
    return record


def running(config: EvalConfig, record: dict) -> tuple[str, float, float]:
    """What the bar shows the mean of: its name, and what a record adds to the sum and to n."""
    if config.task == "text":
        return "nats per token", -record["log_probs"][0], record["tokens"]
    if config.task == "lambada":
        return "acc", record["greedy"], 1
    name = "acc_norm" if config.text == "lm-eval" else "acc_token_norm"
    return name, record["pred_norm"] == record["label"], 1


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion."""
    p, z2 = hits / n, Z_95**2
    centre = p + z2 / (2 * n)
    half = Z_95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (centre - half) / (1 + z2 / n), (centre + half) / (1 + z2 / n)


def accuracy(hits: list[bool], meaning: str) -> dict:
    low, high = wilson(sum(hits), len(hits))
    return {"value": sum(hits) / len(hits), "low": low, "high": high, "meaning": meaning}


def exp(nats: float) -> float:
    return math.exp(nats) if nats < MAX_EXPONENT else math.inf


def metrics(task: str, text: str, records: list[dict]) -> dict[str, dict]:
    """The value of each metric, its 95 % interval where rows are independent, and its meaning."""
    if task == "hellaswag":
        hits = [r["pred"] == r["label"] for r in records]
        hits_norm = [r["pred_norm"] == r["label"] for r in records]
        if text == "raw":
            return {
                "acc_raw": accuracy(hits, "build-nanogpt's acc: raw text, summed"),
                "acc_token_norm": accuracy(hits_norm, "build-nanogpt's acc_norm: mean of tokens"),
            }
        return {
            "acc": accuracy(hits, "lm-eval's acc: cleaned text, summed"),
            "acc_norm": accuracy(hits_norm, "lm-eval's acc_norm: divided by characters"),
        }
    nats = [-r["log_probs"][0] for r in records]
    total = math.fsum(nats)
    if task == "lambada":
        mean = total / len(nats)
        variance = math.fsum((x - mean) ** 2 for x in nats) / max(1, len(nats) - 1)
        half = Z_95 * math.sqrt(variance / len(nats))
        return {
            "acc": accuracy([r["greedy"] for r in records], "lm-eval's acc: last word likeliest"),
            "perplexity": {
                "value": exp(mean),
                "low": exp(mean - half),
                "high": exp(mean + half),
                "meaning": "lm-eval's perplexity of the last word",
            },
        }
    tokens, words, n_bytes = (
        sum(r.get(k, 0) for r in records) for k in ("tokens", "words", "bytes")
    )
    return {
        "token_perplexity": {"value": exp(total / tokens), "meaning": f"{tokens:,} tokens"},
        "word_perplexity": {"value": exp(total / words), "meaning": f"{words:,} words"},
        "bits_per_byte": {"value": total / n_bytes / math.log(2), "meaning": f"{n_bytes:,} bytes"},
    }


def settings_of(config: EvalConfig, model: GPT) -> dict:
    """What the results depend on; with the same settings an evaluation may go on."""
    keys = ("task", "text", "limit", "stride", "skip_bad_rows", "precision")
    if config.data is None:
        data = "{} {} {}".format(*HUB_ROWS[config.task])
    else:
        data = " ".join(sha256_of(file) for file in find_files([config.data]))
    return {**{k: getattr(config, k) for k in keys}, "data": data, "weights": weights_sha256(model)}


class RowsLog(Log):
    """rows.jsonl of an evaluation, which goes on with the settings that lie beside it."""

    def __init__(self, folder: Path, settings: dict):
        file = folder / "rows.jsonl"
        settings_file = folder / "settings.json"
        if settings_file.exists():
            try:
                earlier = dict(json.loads(settings_file.read_text()))
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"{settings_file} is damaged: {error}; choose another --out_dir"
                ) from error
            changed = sorted(k for k in {*earlier, *settings} if earlier.get(k) != settings.get(k))
            if changed:
                raise ValueError(
                    f"{folder} holds an evaluation with other {', '.join(changed)}; choose another "
                    "--out_dir"
                )
        elif file.exists():
            raise ValueError(
                f"{folder} holds a rows.jsonl without settings.json; choose another --out_dir"
            )
        else:
            write_json(settings_file, settings)
        super().__init__(file, "row")


def evaluate(
    config: EvalConfig,
    model: GPT,
    examples: list[Example],
    device: torch.device,
    log: RowsLog | None = None,
) -> list[dict]:
    """The records of all examples, those that `log` has already and new ones, which it gets."""
    records = {record["row"]: record for record in log.records} if log else {}
    done = frozenset(i for i, e in enumerate(examples) if e.facts["row"] in records)
    dtype = autocast_dtype(config.precision, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype is not None)
    bar = tqdm(total=len(examples), initial=len(done), unit=" rows", disable=None)
    last_line, total, n = time.perf_counter(), 0.0, 0.0
    with autocast, bar:
        for batch in score(model, [e.request for e in examples], device, done=done):
            new = [record_of(config.task, examples[i], scores) for i, scores in batch]
            new = [record for record in new if record["row"] not in records]
            records |= {record["row"]: record for record in new}
            if log:
                log.append(*new)
            bar.update(len(new))
            for record in new:
                name, amount, count = running(config, record)
                total, n = total + amount, n + count
            told = f"{name} {total / n:.4f}" if n else ""
            bar.set_postfix_str(told)
            if bar.disable and time.perf_counter() - last_line > PROGRESS_SECONDS:
                last_line = time.perf_counter()
                print(f"{len(records)}/{len(examples)} rows, {told}", flush=True)
    return [records[e.facts["row"]] for e in examples]


def main(config: EvalConfig) -> None:
    dist = Distributed.start(config.device)
    if dist.world_size > 1:
        raise ValueError(f"one process measures, this is one of {dist.world_size}; leave torchrun")
    config = replace(config, precision=config.precision or default_precision(dist.device))
    model = load_model(config.model, config.lora_load_path)
    check_vocabulary(model, config.model)
    examples = load_examples(
        config.task,
        config.data,
        model.config.block_size,
        text=config.text,
        limit=config.limit,
        stride=config.stride,
        skip_bad_rows=config.skip_bad_rows,
    )
    out = Path(config.out_dir) if config.out_dir else None
    with lock_run(out) if out else nullcontext():
        log = RowsLog(out, settings_of(config, model)) if out else None
        started = time.perf_counter()
        records = evaluate(config, model.to(dist.device), examples, dist.device, log)
        seconds = time.perf_counter() - started
        results = metrics(config.task, config.text, records)
        if out:
            write_json(
                out / "results.json", {"config": asdict(config), "rows": len(records)} | results
            )
    for name, metric in results.items():
        interval = f"{metric['low']:.4f} to {metric['high']:.4f}" if "low" in metric else ""
        print(f"{name:<16} {metric['value']:<10.4f} {interval:<18} {metric['meaning']}")
    print(f"{len(records):,} rows in {seconds:.1f} s")


if __name__ == "__main__":
    cli.run(main, EvalConfig, __doc__)
