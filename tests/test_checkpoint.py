import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import checkpoint
from checkpoint import (
    MetricsLog,
    best_checkpoint,
    checkpoints,
    claim_run,
    load_model,
    load_state,
    read_metrics,
    save_checkpoint,
)
from model import GPT, GPTConfig
from tokenizer import get_tokenizer


def save(run, model, step: int, val_loss: float | None = None, keep: int = 2):
    return save_checkpoint(run, model, {"step": step, "val_loss": val_loss}, {"x": 1}, keep)


def steps(run) -> list[int]:
    return [int(folder.name.removeprefix("step_")) for folder in checkpoints(run)]


def test_a_checkpoint_is_a_hugging_face_model(tmp_path):
    """Stock transformers opens model and tokenizer from the folder, with equal logits, and with
    50257 ids although the model trains with 50304.
    """
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, n_layer=2, n_head=2, n_embd=32))
    folder = save(tmp_path, model, 1)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "To be, or not to be"
    idx = torch.tensor([get_tokenizer().encode(text)])
    assert tokenizer.encode(text) == idx[0].tolist()
    with torch.no_grad():
        assert model.transformer.wte.num_embeddings == 50304
        assert theirs(idx).logits.shape[-1] == 50257
        torch.testing.assert_close(theirs(idx).logits, model(idx), atol=1e-4, rtol=0)
    out = theirs.generate(idx, max_new_tokens=20, do_sample=True, top_k=0, temperature=50.0)
    assert out.max() < 50257


def test_weights_come_back_to_the_bit(tmp_path, tiny_model):
    """Loading a run gives the weights of its newest checkpoint, bit for bit, padding included."""
    save(tmp_path, tiny_model, 1)
    with torch.no_grad():
        tiny_model.transformer.wpe.weight += 1
    save(tmp_path, tiny_model, 2)
    loaded = load_model(tmp_path)
    for (name, mine), theirs in zip(
        tiny_model.named_parameters(), loaded.parameters(), strict=True
    ):
        assert torch.equal(mine, theirs), name


def test_failing_save_loses_nothing(tmp_path, tiny_model, monkeypatch):
    """A save that fails at any of its writes leaves the earlier checkpoint, and no half a one."""
    save(tmp_path, tiny_model, 1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    for target, name in (
        (GPT, "save_pretrained"),
        (checkpoint, "save_tokenizer"),
        (torch, "save"),
        (checkpoint.os, "fsync"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, full)
            with pytest.raises(OSError, match="No space left"):
                save(tmp_path, tiny_model, 2)
        assert steps(tmp_path) == [1]
        assert load_state(checkpoints(tmp_path)[0]) == {"x": 1}
    save(tmp_path, tiny_model, 2)
    assert steps(tmp_path) == [1, 2]
    assert not list(tmp_path.glob("checkpoints/*.tmp"))


def test_newest_and_best_are_kept(tmp_path, tiny_model):
    """Of many checkpoints the newest `keep` and the one with the lowest validation loss stay."""
    for step, loss in enumerate((5.0, 3.0, None, 4.0, 4.5, 4.2), start=1):
        save(tmp_path, tiny_model, step, loss)
    assert steps(tmp_path) == [2, 5, 6]
    assert best_checkpoint(tmp_path).name == "step_000002"


def test_a_run_goes_on_only_as_it_was(tmp_path, tiny_model):
    """Settings that the curve depends on may not change; the error lists them as then and now.
    Others may, and a folder in which no run has begun belongs to nobody.
    """
    config = {"max_lr": 1e-3, "seed": 1, "keep": 2, "batch_size": 4}
    assert claim_run(tmp_path / "run", config, "auto") is None
    assert claim_run(tmp_path / "run", config | {"seed": 2}, "auto") is None
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0}\n')
    folder = save(tmp_path / "run", tiny_model, 1)
    free = config | {"seed": 2, "keep": 9, "batch_size": 2}
    assert claim_run(tmp_path / "run", free, "auto") == folder
    with pytest.raises(ValueError, match=r"max_lr 0.001 then, 0.002 now; seed 2 then, 1 now"):
        claim_run(tmp_path / "run", config | {"max_lr": 2e-3}, "auto")
    with pytest.raises(ValueError, match="--resume is never"):
        claim_run(tmp_path / "run", free, "never")


def test_the_log_is_appended_and_a_step_stands_once(tmp_path):
    """A new process appends to metrics.jsonl, drops a line that a crash cut short, and does not log
    again what is there.
    """
    log = MetricsLog(tmp_path)
    for step in range(4):
        log.write({"step": step, "run": 1})
    whole = log.file.read_bytes()
    log.file.write_bytes(whole + b'{"step": 4, "ru')
    assert [r["step"] for r in read_metrics(tmp_path)] == [0, 1, 2, 3]
    again = MetricsLog(tmp_path)
    for step in range(2, 6):
        again.write({"step": step, "run": 2})
    records = [json.loads(line) for line in log.file.read_text().splitlines()]
    assert [(r["step"], r["run"]) for r in records] == [*[(s, 1) for s in range(4)], (4, 2), (5, 2)]
    assert log.file.read_bytes().startswith(whole)
