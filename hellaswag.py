"""Evaluate a model: HellaSwag as in lm-evaluation-harness or build-nanogpt, LAMBADA, or the
perplexity of a text.
"""

import math
import time
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from engine.checkpoint import hash_weights, load_model
from engine.config import TOKENIZER_HELP, Precision, Settings, flag, run_command
from engine.distributed import Distributed, autocast, default_precision
from engine.files import JSONLinesLog, lock_folder, read_json, sha256_file, write_json
from engine.metrics import PROGRESS_SECONDS
from engine.pretrained import load_tokenizer
from engine.tasks import TASKS, Example, HellaSwagText, Task, find_task
from engine.tokenizer import Tokenizer
from model import GPT

BAR_SECONDS = 1.0  # between updates of the figures beside a progress bar


@dataclass(frozen=True)
class EvalConfig(Settings):
    model: str = flag("gpt2", "hub name, Hugging Face folder, checkpoint, or run folder")
    lora_load_path: str | None = flag(None, "adapter to load: a folder, a run or a lora.pt")
    tokenizer: str | None = flag(None, TOKENIZER_HELP)
    task: str = flag("hellaswag", ", ".join(TASKS))
    text: HellaSwagText = flag("lm-eval", "HellaSwag's text: cleaned, or raw as in build-nanogpt")
    data: str | None = flag(
        None, "a .json(l) file or hub name (default: the task's); task text: a file, folder or glob"
    )
    limit: int | None = flag(None, "evaluate only the first N rows or documents")
    stride: int | None = flag(None, "task text: tokens between windows (default: block_size)")
    skip_bad_rows: bool = flag(False, "skip bad rows instead of stopping")
    out_dir: str = flag("", "folder of the results; the same command resumes (default: none)")
    device: str = flag("auto", "auto, cpu, cuda or mps")
    precision: Precision = flag(None, "fp32 or autocast (default: fp32 on CPUs, else bf16 or fp16)")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.find_task()

    def find_task(self) -> Task:
        """The task; ValueError if there is none, or if a given flag belongs to another task."""
        own = [k for k in ("text", "stride") if getattr(self, k) != getattr(EvalConfig, k)]
        names = ("data", "limit", "skip_bad_rows", *own)
        return find_task(self.task, **{name: getattr(self, name) for name in names})


def find_settings(config: EvalConfig, task: Task, model: GPT, tokenizer: Tokenizer) -> dict:
    """What the results depend on. An evaluation can be resumed only with equal settings."""
    keys = ("task", "text", "limit", "stride", "skip_bad_rows", "precision")
    hashes = " ".join(map(sha256_file, task.find_files()))
    data = hashes or "{} {} {}".format(task.source, *task.hub[1:])
    weights, extra = hash_weights(model), {"tokenizer": tokenizer.sha256}
    settings = {**{k: getattr(config, k) for k in keys}, "data": data, "weights": weights}
    return settings | ({} if tokenizer.is_gpt2 else extra)  # as earlier versions wrote it


def open_rows_log(folder: Path, settings: dict) -> JSONLinesLog:
    """The evaluation's rows.jsonl; ValueError if it was made with other settings."""
    file, rows, remedy = folder / "settings.json", folder / "rows.jsonl", "choose another --out_dir"
    if not file.exists() and not rows.exists():
        write_json(file, settings)
    earlier = read_json(file, remedy) if file.exists() else {}
    changed = sorted(k for k in {*earlier, *settings} if earlier.get(k) != settings.get(k))
    if changed:
        raise ValueError(f"{folder} holds an evaluation with other {', '.join(changed)}; {remedy}")
    return JSONLinesLog(rows, "row")


def score_examples(
    task: Task, model: GPT, examples: list[Example], dist: Distributed, log: JSONLinesLog | None
) -> list[dict]:
    """The records of all examples: those in the log of rank 0, and new ones, which are added."""
    records = dist.all_gather({record["row"]: record for record in log.records} if log else {})[0]
    done = frozenset(i for i, e in enumerate(examples) if e.record["row"] in records)
    is_hidden = None if dist.is_main else True  # None: without a terminal
    bar = tqdm(total=len(examples), initial=len(done), unit=" rows", disable=is_hidden)
    shown_at, interval = time.perf_counter(), PROGRESS_SECONDS if bar.disable else BAR_SECONDS
    with bar:
        for batch in task.score_examples(model, examples, dist, done):
            new = [record for record in batch if record["row"] not in records]
            for record in new:
                if not all(map(math.isfinite, record["log_probs"])):
                    raise ValueError(
                        f"row {record['row']} has log-probabilities {record['log_probs']}: the "
                        "model is damaged, or needs --precision fp32"
                    )
            records |= {record["row"]: record for record in new}
            if log:
                log.append(*new)
            bar.update(len(new))
            if time.perf_counter() - shown_at > interval:
                shown_at = time.perf_counter()
                metrics = task.compute_metrics(list(records.values()))
                name, metric = next(iter(metrics.items()))
                bar.set_postfix_str(f"{name} {metric['value']:.4f}")
                if bar.disable:
                    print(f"{len(records)}/{len(examples)} rows, {bar.postfix}", flush=True)
    return [records[e.record["row"]] for e in examples]


def main(config: EvalConfig) -> None:
    dist = Distributed.start(config.device)
    with nullcontext() if dist.is_main else redirect_stdout(None):  # rank 0 reports
        evaluate(config, dist)
    dist.stop()


def evaluate(config: EvalConfig, dist: Distributed) -> None:
    if config.precision is None:  # on a CPU exact, although it may train in bf16
        is_cpu = dist.device.type == "cpu"
        config = replace(config, precision="fp32" if is_cpu else default_precision(dist.device))
    task = config.find_task()
    with dist.main_process_first():
        model = load_model(config.model, config.lora_load_path)
        tokenizer = load_tokenizer(model, config.tokenizer)
        examples = task.load(tokenizer, model.config.block_size)
    out = Path(config.out_dir) if config.out_dir and dist.is_main else None
    with lock_folder(out) if out else nullcontext(), autocast(dist.device, config.precision):
        log = open_rows_log(out, find_settings(config, task, model, tokenizer)) if out else None
        started = time.perf_counter()
        records = score_examples(task, model.to(dist.device), examples, dist, log)
        seconds = time.perf_counter() - started
        metrics = task.compute_metrics(records)
        if out:
            results = {"config": asdict(config), "rows": len(records), **metrics}
            write_json(out / "results.json", results)
    for name, metric in metrics.items():
        interval = f"{metric['low']:.4f} to {metric['high']:.4f}" if "low" in metric else ""
        print(f"{name:<16} {metric['value']:<10.4f} {interval:<18} {metric['meaning']}")
    print(f"{len(records):,} rows in {seconds:.1f} s")


if __name__ == "__main__":
    run_command(main, EvalConfig, __doc__)
