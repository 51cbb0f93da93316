"""Evaluate a model on HellaSwag (as lm-evaluation-harness or build-nanogpt does), on LAMBADA, or by
the perplexity of a text.
"""

import math
import time
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from engine.checkpoint import load_model
from engine.config import ModelSettings, Precision, flag, run_command
from engine.distributed import Distributed, autocast, default_precision
from engine.files import JSONLinesLog, lock_folder, read_json, sha256_file, write_json
from engine.metrics import PROGRESS_SECONDS
from engine.pretrained import hash_weights, load_tokenizer
from engine.tasks import TASKS, Example, HellaSwagText, Task, make_task
from engine.tokenizer import Tokenizer
from model import GPT

BAR_SECONDS = 1.0  # between updates of the metric shown beside a progress bar


@dataclass(frozen=True)
class EvalConfig(ModelSettings):
    task: str = flag("hellaswag", ", ".join(TASKS))
    text: HellaSwagText = flag("lm-eval", "hellaswag: cleaned (lm-eval) or raw (build-nanogpt)")
    data: str | None = flag(None, "file, folder, glob or hub dataset (default: the task's)")
    limit: int | None = flag(None, "the first N rows or documents; HellaSwag's are ActivityNet")
    sample: int | None = flag(None, "N random rows or documents, the same for every model")
    stride: int | None = flag(None, "perplexity: window step in tokens (default: block_size)")
    skip_bad_rows: bool = flag(False, "skip bad rows instead of stopping")
    out_dir: str = flag("", "folder for the results; rerun the command to resume (default: none)")
    device: str = flag("auto", "auto, cpu, cuda or mps")
    precision: Precision = flag(None, "fp32, or autocast (default: fp32; on CUDA, bf16 or fp16)")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.make_task()
        if self.limit and self.sample:
            raise ValueError(f"limit is {self.limit} and sample is {self.sample}; set only one")

    def make_task(self) -> Task:
        """Return the task. Raises ValueError if it is unknown or a flag belongs to another task."""
        # `text` and `stride` belong to one task each, and other tasks refuse them. So pass them
        # only if they are not the default.
        changed = [k for k in ("text", "stride") if getattr(self, k) != getattr(EvalConfig, k)]
        names = ("data", "limit", "sample", "skip_bad_rows", *changed)
        return make_task(self.task, **{name: getattr(self, name) for name in names})


def collect_settings(config: EvalConfig, task: Task, model: GPT, tokenizer: Tokenizer) -> dict:
    """Collect everything that the results depend on, to be compared when resuming."""
    names = ("task", "text", "limit", "sample", "stride", "skip_bad_rows", "precision")
    settings = {name: getattr(config, name) for name in names}
    hashes = " ".join(map(sha256_file, task.find_files()))
    settings["data"] = hashes or f"{task.source} {task.hub.config} {task.hub.split}"
    settings["weights"] = hash_weights(model)
    if not tokenizer.is_gpt2:  # as in settings.json of earlier versions
        settings["tokenizer"] = tokenizer.sha256
    return settings


def open_rows_log(folder: Path, settings: dict) -> JSONLinesLog:
    """Open rows.jsonl to add to it. Raises ValueError if it was written with other settings."""
    settings_file, rows_file = folder / "settings.json", folder / "rows.jsonl"
    remedy = "choose another --out_dir"
    if not settings_file.exists() and not rows_file.exists():
        write_json(settings_file, settings)
    # If there is a rows.jsonl without a settings.json, this finds changes too.
    earlier = read_json(settings_file, remedy) if settings_file.exists() else {}
    changed = sorted(k for k in {*earlier, *settings} if earlier.get(k) != settings.get(k))
    if changed:
        raise ValueError(f"{folder} has results with different {', '.join(changed)}; {remedy}")
    return JSONLinesLog(rows_file, "row")


def score_examples(
    task: Task, model: GPT, examples: list[Example], dist: Distributed, log: JSONLinesLog | None
) -> list[dict]:
    """Score the examples that are not in the log yet, add them to it, and return all records. Only
    rank 0 has a log; the other ranks get what it holds.
    """
    logged = {record["row"]: record for record in log.records} if log else {}
    records = dist.all_gather(logged)[0]  # those of rank 0
    done = frozenset(i for i, e in enumerate(examples) if e.record["row"] in records)
    disable = None if dist.is_main else True  # None: shown if stderr is a terminal
    with tqdm(total=len(examples), initial=len(done), unit=f" {task.unit}", disable=disable) as bar:
        interval = PROGRESS_SECONDS if bar.disable else BAR_SECONDS
        shown_at = time.perf_counter()
        for batch in task.score_examples(model, examples, dist, done):
            new = [record for record in batch if record["row"] not in records]
            check_log_probs(new)
            records |= {record["row"]: record for record in new}
            if log:
                log.append(*new)
            bar.update(len(new))
            if time.perf_counter() - shown_at > interval:
                shown_at = time.perf_counter()
                metrics = task.compute_metrics(list(records.values()))
                name, metric = next(iter(metrics.items()))  # the first one is enough here
                bar.set_postfix_str(f"{name} {metric['value']:.4f}")
                if bar.disable:  # there is no terminal
                    print(f"{len(records)}/{len(examples)} {task.unit}, {bar.postfix}", flush=True)
    return [records[e.record["row"]] for e in examples]


def check_log_probs(records: list[dict]) -> None:
    for record in records:
        if not all(map(math.isfinite, record["log_probs"])):
            raise ValueError(
                f"row {record['row']} has log-probabilities {record['log_probs']}: the model is "
                "damaged, or needs --precision fp32"
            )


def main(config: EvalConfig) -> None:
    dist = Distributed.start(config.device)
    with nullcontext() if dist.is_main else redirect_stdout(None):  # only rank 0 prints
        evaluate(config, dist)
    dist.stop()


def evaluate(config: EvalConfig, dist: Distributed) -> None:
    if config.precision is None:  # exact results on a CPU, even if it trains in bf16
        is_cpu = dist.device.type == "cpu"
        config = replace(config, precision="fp32" if is_cpu else default_precision(dist.device))
    task = config.make_task()
    with dist.main_process_first():
        model = load_model(config.model, config.lora_load_path)
        tokenizer = load_tokenizer(model, config.tokenizer)
        examples = task.load(tokenizer, model.config.block_size)
    out = Path(config.out_dir) if config.out_dir and dist.is_main else None
    with lock_folder(out) if out else nullcontext(), autocast(dist.device, config.precision):
        log = open_rows_log(out, collect_settings(config, task, model, tokenizer)) if out else None
        started = time.perf_counter()
        records = score_examples(task, model.to(dist.device), examples, dist, log)
        seconds = time.perf_counter() - started
        metrics = task.compute_metrics(records)
        if out:
            results = {"config": asdict(config), "rows": len(records), **metrics}
            write_json(out / "results.json", results | {task.unit: len(records)})
    for name, metric in metrics.items():
        interval = f"{metric['low']:.4f} to {metric['high']:.4f}" if "low" in metric else ""
        print(f"{name:<16} {metric['value']:<10.4f} {interval:<18} {metric['meaning']}")
    print(f"{len(records):,} {task.unit} in {seconds:.1f} s")


if __name__ == "__main__":
    run_command(main, EvalConfig, __doc__)
