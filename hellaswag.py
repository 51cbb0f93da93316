"""Evaluate a model on HellaSwag (as lm-evaluation-harness or build-nanogpt does), on LAMBADA, or by
the perplexity of a text. Or compare two evaluations.
"""

import math
import time
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from engine.checkpoint import choose_checkpoint, load_model, read_progress
from engine.config import ModelSettings, Precision, flag, run_command
from engine.distributed import Distributed, autocast, default_precision
from engine.files import JSONLinesLog, lock_folder, read_json, sha256_file, write_json
from engine.metrics import PROGRESS_SECONDS
from engine.pretrained import hash_weights, load_tokenizer
from engine.tasks import TASKS, Example, HellaSwagText, Task, make_task, mean_interval
from engine.tokenizer import Tokenizer
from model import GPT

MAX_SHOWN = 12  # row numbers that `compare` prints per model
BAR_SECONDS = 1.0  # between updates of the metric shown beside a progress bar


@dataclass(frozen=True)
class EvalConfig(ModelSettings):
    task: str = flag("hellaswag", ", ".join(TASKS))
    text: HellaSwagText = flag("lm-eval", "hellaswag: cleaned (lm-eval) or raw (build-nanogpt)")
    data: str | None = flag(None, "files, or a hub dataset of rows (default: the task's)")
    limit: int | None = flag(None, "only the first N rows or documents (prefer sample)")
    sample: int | None = flag(None, "N random rows or documents, the same for every model")
    stride: int | None = flag(None, "perplexity: window step in tokens (default: block_size)")
    skip_bad_rows: bool = flag(False, "skip bad rows instead of stopping")
    out_dir: str = flag("", "folder for the results; rerun the command to resume (default: none)")
    device: str = flag("auto", "auto, cpu, cuda or mps")
    precision: Precision = flag(None, "fp32, or autocast (default: fp32; on CUDA, bf16 or fp16)")
    compare: list[str] = flag([], "only compare the results in two out_dir folders")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.make_task()
        if self.limit and self.sample:
            raise ValueError(f"limit is {self.limit} and sample is {self.sample}; set only one")
        if len(self.compare) not in (0, 2):
            raise ValueError(f"compare is {' '.join(self.compare)}, expected two folders")

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
    if changed := find_differences(earlier, settings):
        raise ValueError(f"{folder} has results with different {', '.join(changed)}; {remedy}")
    return JSONLinesLog(rows_file, "row")


def find_differences(a: dict, b: dict) -> list[str]:
    """Return the keys with different values. Those that earlier versions lack are None."""
    return sorted(k for k in {*a, *b} if a.get(k) != b.get(k))


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


def compare(folders: list[str]) -> None:
    """Print the metrics of two evaluations on the rows that both have, their difference with its
    95% interval for paired rows, and the rows that only one model got right. For perplexities, the
    difference is that of the mean nats, shown as a ratio.
    """
    settings = [read_json(Path(f, "settings.json"), "choose another folder") for f in folders]
    names, remedy = " and ".join(folders), "compare evaluations that differ only in the model"
    if changed := [k for k in find_differences(*settings) if k not in ("weights", "tokenizer")]:
        raise ValueError(f"{names} have different {', '.join(changed)}; {remedy}")
    task = EvalConfig(task=settings[0]["task"], text=settings[0]["text"]).make_task()
    logs = [JSONLinesLog.read(Path(folder, "rows.jsonl"), "row") for folder in folders]
    by_row = [{record["row"]: record for record in log} for log in logs]
    rows = np.array(sorted(by_row[0].keys() & by_row[1].keys()))
    if len(rows) == 0:
        raise ValueError(f"{names} have no {task.unit} in common; {remedy}")
    common = [[records[row] for row in rows] for records in by_row]
    metrics = [task.compute_metrics(records) for records in common]
    print(f"a is {folders[0]}, b is {folders[1]}; {len(rows):,} {task.unit} in both")
    for name in metrics[0]:
        if len({found[name]["meaning"] for found in metrics}) > 1:  # meaning has the token count
            raise ValueError(f"{names} have different windows; {remedy}")
        a, b = (found[name]["value"] for found in metrics)
        is_ratio = name.endswith("perplexity")
        log, exp, sign = (np.log, np.exp, "/") if is_ratio else (np.asarray, np.asarray, "-")
        line = f"{name:<16} a {a:.4f}, b {b:.4f}, b {sign} a {exp(log(b) - log(a)):.4f}"
        if task.unit == "rows":  # windows of a text are not independent
            x, y = log([[task.compute_metrics([r])[name]["value"] for r in rs] for rs in common])
            _, low, high = exp(mean_interval(y - x))
            line += f", paired 95% interval {low:.4f} to {high:.4f}"
            for label, is_right in (("a", x > y), ("b", x < y)) if not is_ratio else ():
                numbers = rows[is_right].tolist()
                line += f"\n  right only in {label}: {len(numbers):,} rows {numbers[:MAX_SHOWN]}"
        print(line)


def main(config: EvalConfig) -> None:
    if config.compare:
        compare(config.compare)
        return
    dist = Distributed.start(config.device)
    with nullcontext() if dist.is_main else redirect_stdout(None):  # only rank 0 prints
        evaluate(config, dist)
    dist.stop()


def evaluate(config: EvalConfig, dist: Distributed) -> None:
    if config.precision is None:  # exact results on a CPU, even if it trains in bf16
        is_cpu = dist.device.type == "cpu"
        config = replace(config, precision="fp32" if is_cpu else default_precision(dist.device))
    task = config.make_task()
    checkpoint = choose_checkpoint(config.lora_load_path or config.model)
    step = read_progress(checkpoint)["step"] if (checkpoint / "progress.json").exists() else None
    with dist.main_process_first():
        model = load_model(config.model, config.lora_load_path)
        tokenizer = load_tokenizer(model, config.tokenizer)
        examples = task.load(tokenizer, model.config.block_size)
    out = Path(config.out_dir) if config.out_dir and dist.is_main else None
    with lock_folder(out) if out else nullcontext(), autocast(dist.device, config.precision):
        settings = collect_settings(config, task, model, tokenizer) if out else {}
        log = open_rows_log(out, settings) if out else None
        started = time.perf_counter()
        records = score_examples(task, model.to(dist.device), examples, dist, log)
        seconds = time.perf_counter() - started
        metrics = task.compute_metrics(records)
        if out:
            origin = {"checkpoint": str(checkpoint), "step": step, "weights": settings["weights"]}
            results = {"config": asdict(config), **origin, "rows": len(records), **metrics}
            write_json(out / "results.json", results | {task.unit: len(records)})
    for name, metric in metrics.items():
        interval = f"{metric['low']:.4f} to {metric['high']:.4f}" if "low" in metric else ""
        print(f"{name:<16} {metric['value']:<10.4f} {interval:<18} {metric['meaning']}")
    print(f"{len(records):,} {task.unit} in {seconds:.1f} s")


if __name__ == "__main__":
    run_command(main, EvalConfig, __doc__)
