import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine import checkpoint
from engine.checkpoint import (
    BackgroundSave,
    RunState,
    best_checkpoint,
    list_checkpoints,
    load_latest,
    load_model,
    read_state,
    save_checkpoint,
)
from engine.tokenizer import get_tokenizer
from model import GPT, GPTConfig

STATE = {
    "optimizer": {"state": {"w": {"step": 1}}, "param_groups": [{"params": ["w"]}]},
    "scaler": {},
    "rng": {"cpu": torch.zeros(1), "cuda": None},
}


def save(run, model, step: int, val_loss: float | None = None, keep: int = 2):
    params = dict(model.named_parameters())
    state = RunState({"step": step, "val_loss": val_loss, "data": "abc"}, STATE)
    save_checkpoint(run, model, params, state, keep=keep)
    return run / "checkpoints" / f"step_{step:06d}"


def steps(run) -> list[int]:
    return [int(folder.name.removeprefix("step_")) for folder in list_checkpoints(run)]


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
    """Loading a run gives the weights of its latest checkpoint, bit for bit, with the padding."""
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
    """A save that fails at any of its writes leaves the earlier checkpoint and no partial one."""
    save(tmp_path, tiny_model, 1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    for target, name in (
        (checkpoint, "save_pretrained"),
        (checkpoint, "save_tokenizer"),
        (torch, "save"),
        (checkpoint.os, "fsync"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, full)
            with pytest.raises(OSError, match="No space left"):
                save(tmp_path, tiny_model, 2)
        assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]
        assert read_state(list_checkpoints(tmp_path)[0]) == STATE
    save(tmp_path, tiny_model, 2)
    assert steps(tmp_path) == [1, 2]
    assert not list(tmp_path.glob("checkpoints/*.tmp"))


def test_newest_and_best_are_kept(tmp_path, tiny_model):
    """The latest `keep` checkpoints and the one with the lowest validation loss are kept."""
    for step, loss in enumerate((5.0, 3.0, None, 4.0, 4.5, 4.2), start=1):
        save(tmp_path, tiny_model, step, loss)
    assert steps(tmp_path) == [2, 5, 6]
    assert best_checkpoint(tmp_path).name == "step_000002"


def test_a_damaged_checkpoint_falls_back(tmp_path, tiny_model, capsys):
    """If the latest checkpoint cannot be read, the one before is used, with a line; if none can,
    that is an error, not a fresh start.
    """
    assert load_latest(tmp_path) is None
    for step in (1, 2):
        save(tmp_path, tiny_model, step)
    for file in ("model.safetensors", "state.pt", "config.json", "progress.json"):
        path = list_checkpoints(tmp_path)[-1] / file
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        assert load_latest(tmp_path)[1].progress["step"] == 1, file
        assert "step_000002 is damaged" in capsys.readouterr().out
        path.write_bytes(whole)
    assert load_latest(tmp_path)[1].progress["step"] == 2
    for folder in list_checkpoints(tmp_path):
        (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 2 checkpoints"):
        load_latest(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda _: {},
        lambda _: {"optimizer": {}},
        lambda s: {**s, "optimizer": {**s["optimizer"], "state": {}}},
        lambda s: {"optimizer": s["optimizer"], "rng": s["rng"]},
        lambda _: [1],
    ],
)
def test_missing_parts_of_the_state_are_damage(tmp_path, tiny_model, change, capsys):
    """A checkpoint whose state.pt or progress.json lacks a part is damaged: the one before is used,
    and the optimizer never starts afresh.
    """
    for step in (1, 2):
        folder = save(tmp_path, tiny_model, step)
    torch.save(change(STATE), folder / "state.pt")
    assert load_latest(tmp_path)[1].progress["step"] == 1
    assert "step_000002 is damaged" in capsys.readouterr().out
    torch.save(STATE, folder / "state.pt")
    for progress in ('{"step": 2}', '{"val_loss": null, "data": "abc"}', "{}", "[" * 100_000):
        (folder / "progress.json").write_text(progress)
        assert load_latest(tmp_path)[1].progress["step"] == 1


def test_files_and_empty_folders_are_no_checkpoints(tmp_path, tiny_model):
    """A plain file or an empty folder with a checkpoint's name is not taken for one, and saving
    replaces it, as it does a plain file with the name of an unfinished checkpoint.
    """
    save(tmp_path, tiny_model, 1)
    for name, make in (
        ("step_000099", lambda path: path.write_text("x")),
        ("step_000098", lambda path: path.mkdir()),
        ("step_000097.tmp", lambda path: path.write_text("x")),
        ("step_000099.tmp", lambda path: path.write_text("x")),
    ):
        make(tmp_path / "checkpoints" / name)
    assert steps(tmp_path) == [1]
    for step in (98, 99):
        save(tmp_path, tiny_model, step, keep=5)
    assert steps(tmp_path) == [1, 98, 99]
    assert load_latest(tmp_path)[1].progress["step"] == 99
    assert not list(tmp_path.glob("checkpoints/*.tmp"))


def test_a_failed_background_save_is_not_silent():
    """The error of a background save is raised by the next call, once."""
    background = BackgroundSave()
    background.start(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        background.start(lambda: None)
    background.wait()
    background.check()


def test_checkpoints_are_ordered_by_step(tmp_path, tiny_model):
    """Step 1,000,000 comes after step 999,999, and a user's own copy is left alone."""
    for step in (999_998, 999_999, 1_000_000):
        save(tmp_path, tiny_model, step, keep=5)
    mine = tmp_path / "checkpoints" / "step_1_mine"
    mine.mkdir()
    save(tmp_path, tiny_model, 1_000_001)
    assert steps(tmp_path) == [1_000_000, 1_000_001]
    assert mine.exists()
