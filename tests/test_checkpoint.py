import io

import pytest
import torch
from conftest import GPT2_TOKENIZER, TIKTOKEN
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
from engine.tokenizer import Tokenizer
from model import GPT, GPTConfig

STATE = {
    "optimizer": {"state": {"w": {"step": 1}}, "param_groups": [{"params": ["w"]}]},
    "scaler": {},
    "rng": {"cpu": torch.zeros(1), "cuda": None},
}


def save(run, model, step: int, val_loss: float | None = None, keep: int = 2):
    params = dict(model.named_parameters())
    state = RunState({"step": step, "val_loss": val_loss, "data": "abc"}, STATE)
    save_checkpoint(run, model, GPT2_TOKENIZER, params, state, keep=keep)
    return run / "checkpoints" / f"step_{step:06d}"


def steps(run) -> list[int]:
    return [int(folder.name.removeprefix("step_")) for folder in list_checkpoints(run)]


def test_a_checkpoint_is_a_hugging_face_model(tmp_path):
    """Stock transformers loads the model and tokenizer from the folder. Logits are equal, and the
    vocabulary has 50257 ids, although the model trains with 50304.
    """
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, n_layer=2, n_head=2, n_embd=32))
    assert model.transformer.wte.num_embeddings == 50304
    folder = save(tmp_path, model, 1)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    text = "To be, or not to be"
    idx = torch.tensor([TIKTOKEN.encode(text)])
    assert AutoTokenizer.from_pretrained(folder).encode(text) == idx[0].tolist()
    with torch.no_grad():
        assert theirs(idx).logits.shape[-1] == 50257
        torch.testing.assert_close(theirs(idx).logits, model(idx), atol=1e-4, rtol=0)
    out = theirs.generate(idx, max_new_tokens=20, do_sample=True, top_k=0, temperature=50.0)
    assert out.max() < 50257


def test_weights_come_back_bit_for_bit(tmp_path, tiny_model):
    """Loading a run gives the weights of its latest checkpoint bit for bit, padding included."""
    save(tmp_path, tiny_model, 1)
    with torch.no_grad():
        tiny_model.transformer.wpe.weight += 1
    save(tmp_path, tiny_model, 2)
    loaded = load_model(tmp_path).state_dict()
    for name, weight in tiny_model.state_dict().items():
        assert torch.equal(weight, loaded[name]), name


def test_failing_save_loses_nothing(tmp_path, tiny_model, monkeypatch):
    """If any write of a save fails, the earlier checkpoint stays and no partial one is left."""
    save(tmp_path, tiny_model, 1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    for target, name in (
        (checkpoint, "save_pretrained"),
        (Tokenizer, "save"),
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
    """The `keep` latest checkpoints by step, the best one and a user's own copy are kept."""
    mine = tmp_path / "checkpoints" / "step_1_mine"
    mine.mkdir(parents=True)
    (mine / "config.json").touch()
    for step, loss in enumerate((5.0, 3.0, None, 4.0, 4.5, 4.2), start=999_996):
        save(tmp_path, tiny_model, step, loss)
    assert steps(tmp_path) == [999_997, 1_000_000, 1_000_001]
    assert best_checkpoint(tmp_path).name == "step_999997"
    assert mine.exists()


class Unsafe:
    """An object that can only be unpickled by importing its class."""


def test_a_damaged_checkpoint_falls_back(tmp_path, tiny_model, capsys):
    """If a file of the latest checkpoint is cut short, lacks a part or holds a pickled class, the
    previous one is used and a line says so. If no checkpoint can be read, that is an error, not a
    fresh start.
    """

    def to_bytes(state) -> bytes:
        file = io.BytesIO()
        torch.save(state, file)
        return file.getvalue()

    assert load_latest(tmp_path) is None
    for step in (1, 2):
        folder = save(tmp_path, tiny_model, step)
    files = ("model.safetensors", "state.pt", "config.json", "progress.json")
    whole = {name: (folder / name).read_bytes() for name in files}
    damaged = [(name, content[: len(content) // 2]) for name, content in whole.items()]
    without_steps = {**STATE, "optimizer": {**STATE["optimizer"], "state": {}}}
    without_scaler = {"optimizer": STATE["optimizer"], "rng": STATE["rng"]}
    states = ({}, [1], without_steps, without_scaler, {**STATE, "rng": Unsafe()})
    damaged += [("state.pt", to_bytes(state)) for state in states]
    progress = (b'{"step": 2}', b'{"val_loss": null, "data": "abc"}', b"[" * 100_000)
    damaged += [("progress.json", content) for content in progress]
    for name, content in damaged:
        (folder / name).write_bytes(content)
        assert load_latest(tmp_path)[1].progress["step"] == 1, (name, content)
        assert "step_000002 is damaged" in capsys.readouterr().out
        (folder / name).write_bytes(whole[name])
    assert load_latest(tmp_path)[1].progress["step"] == 2
    for folder in list_checkpoints(tmp_path):
        (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 2 checkpoints"):
        load_latest(tmp_path)


def test_files_and_empty_folders_are_not_checkpoints(tmp_path, tiny_model):
    """A plain file or an empty folder does not count as a checkpoint, even if its name fits. Saving
    replaces it. A file in the place of an unfinished checkpoint does not stop a save either.
    """
    save(tmp_path, tiny_model, 1)
    (tmp_path / "checkpoints" / "step_000098").mkdir()
    for name in ("step_000099", "step_000097.tmp", "step_000099.tmp"):
        (tmp_path / "checkpoints" / name).write_text("x")
    assert steps(tmp_path) == [1]
    for step in (98, 99):
        save(tmp_path, tiny_model, step, keep=5)
    assert steps(tmp_path) == [1, 98, 99]
    assert load_latest(tmp_path)[1].progress["step"] == 99
    assert not list(tmp_path.glob("checkpoints/*.tmp"))


def test_a_failed_background_save_is_not_silent():
    """If a background save fails, the next call raises its error, once."""
    background = BackgroundSave()
    background.start(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        background.start(lambda: None)
    background.wait()
    background.check()
