"""A file of its own because its packages are optional: `--log tensorboard,wandb`, beside
metrics.jsonl, which stays the truth.
"""

import importlib.util
import secrets
from pathlib import Path

from checkpoint import read_metrics, read_run_config


def logger_names(log: str) -> list[str]:
    """The names in "tensorboard,wandb"; ValueError for another one or a missing package."""
    names = [name for part in log.split(",") if (name := part.strip())]
    for name in names:
        if name not in LOGGERS:
            raise ValueError(f"log is {log}, expected tensorboard, wandb, or both with a comma")
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a mere folder of that name has no origin
            raise ValueError(
                f"log is {log}, but {name} is not installed: pip install -r requirements-extra.txt"
            )
    return names


def numbers(record: dict) -> dict[str, float]:
    """What of a record can be drawn over its step."""
    return {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}


class TensorBoard:
    """Event files in RUN/tensorboard; the steps that metrics.jsonl has from before are copied."""

    def __init__(self, run: Path):
        from torch.utils.tensorboard import SummaryWriter

        folder, earlier = run / "tensorboard", []
        if (run / "metrics.jsonl").exists():
            earlier = read_metrics(run)
        go_on = bool(earlier) and any(folder.glob("events.*"))
        # A step that was written here but did not get into metrics.jsonl comes again.
        purge = earlier[-1]["step"] + 1 if go_on else None
        self.writer = SummaryWriter(str(folder), purge_step=purge)
        for record in [] if go_on else earlier:
            self.write(record)

    def write(self, record: dict) -> None:
        for name, value in numbers(record).items():
            self.writer.add_scalar(name, value, record["step"], double_precision=True)
        for i, sample in enumerate(record.get("samples", [])):
            # Indented, Markdown shows it as it is.
            text = "\n".join("    " + line for line in sample.splitlines())
            self.writer.add_text(f"sample_{i + 1}", text, record["step"])
        self.writer.flush()  # what a killed run has logged is there

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases, the same when the run goes on; its own environment variables
    (WANDB_MODE=offline, WANDB_PROJECT) hold.
    """

    def __init__(self, run: Path):
        import wandb

        id_file = run / "wandb_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        self.wandb_run = wandb.init(
            dir=run,
            id=id_file.read_text(),
            name=run.name,
            resume="allow",
            config=read_run_config(run),
            settings=wandb.Settings(console="off"),  # it would wrap stdout and the progress bar
        )

    def write(self, record: dict) -> None:
        samples = {f"sample_{i + 1}": text for i, text in enumerate(record.get("samples", []))}
        self.wandb_run.log(numbers(record) | samples, step=record["step"])

    def close(self) -> None:
        self.wandb_run.finish()


Logger = TensorBoard | WandB
LOGGERS: dict[str, type[Logger]] = {"tensorboard": TensorBoard, "wandb": WandB}
