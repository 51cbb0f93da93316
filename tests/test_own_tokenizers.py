"""Models with tokenizers of their own, in each command, compared to transformers and lm-eval."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HELLASWAG_ROWS, ROOT, as_flags, expect_error, read_curve, run_script, tiny_run
from test_tasks import lm_eval_samples
from tokenizers import AddedToken
from tokenizers import Tokenizer as HFTokenizer
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    pipeline,
)

from engine.data import IGNORE_INDEX
from engine.evaluation import Prompt, generate_samples
from engine.instructions import pad, read_examples
from engine.pretrained import load_pretrained, load_tokenizer
from engine.shards import load_data_tokenizer
from engine.tokenizer import Tokenizer, find_tokenizer
from fineweb import PrepareConfig
from fineweb import main as prepare
from hellaswag import EvalConfig
from hellaswag import main as evaluate
from sample import Continuation, SampleConfig
from sample import main as sample

TEXT = (ROOT / "tests" / "test_config.py").read_text()
SHIFT = 7  # of ids, in a tokenizer with GPT-2's tokens under other ids
BLOCK_SIZE = 128


def gpt2_backend() -> HFTokenizer:
    return HFTokenizer.from_str(Tokenizer.gpt2().backend.to_str())


def make_smaller() -> HFTokenizer:
    return Tokenizer.train([TEXT.splitlines()], 600, "smaller").backend


def make_equal() -> HFTokenizer:
    """As many tokens as GPT-2's, under other ids."""
    spec = json.loads(gpt2_backend().to_str())
    vocab, (end,) = spec["model"]["vocab"], spec["added_tokens"]
    spec["model"]["vocab"] = {token: (i + SHIFT) % len(vocab) for token, i in vocab.items()}
    end["id"] = (end["id"] + SHIFT) % len(vocab)
    return HFTokenizer.from_str(json.dumps(spec))


def make_larger() -> HFTokenizer:
    """GPT-2's with the tokens of a chat model, and a word that is no special token."""
    backend = gpt2_backend()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    backend.add_tokens([AddedToken("covid19", normalized=False)])
    return backend


# The tokenizer, its eos_token, and the vocab_size and eos_token_id in config.json.
KINDS = {
    "smaller": (make_smaller, "<|endoftext|>", 600, 599),
    "equal": (make_equal, "<|endoftext|>", 50257, SHIFT - 1),
    "larger": (make_larger, "<|im_end|>", 50304, 50258),
    "other_eos": (gpt2_backend, "<|endoftext|>", 50257, 198),  # a newline
}
SOME_SLOW = [pytest.param(k, marks=[pytest.mark.slow] * (k != "larger")) for k in KINDS]
PROMPTS = ("The value of", "", "<|im_start|>user\nIs covid19 new?<|im_end|>\n<|endoftext|>")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """For each kind the folder of a small GPT-2 that transformers wrote, with its tokenizer."""
    folders = {}
    for kind, (make, eos, vocab_size, eos_id) in KINDS.items():
        folder = folders[kind] = tmp_path_factory.mktemp(kind)
        shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": BLOCK_SIZE}
        ids = {"vocab_size": vocab_size, "eos_token_id": eos_id, "bos_token_id": eos_id}
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(**shape, **ids))
        for param in model.parameters():
            param.data.mul_(8)  # so that greedy text varies
        model.save_pretrained(folder)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=make(), eos_token=eos, bos_token=eos)
        tokenizer.save_pretrained(folder)
    return folders


def own_tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(load_pretrained(folder))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_samples_are_the_text_of_transformers(models, kind, prompt, capsys):
    """sample.py prints what transformers' pipeline generates: the prompt's special tokens are
    recognized, the model's end of text ends it, and special tokens are not shown. pipeline is told
    not to generate ids without a token.
    """
    options = {"max_new_tokens": 40, "temperature": 0.0, "device": "cpu"}
    sample(SampleConfig(model=str(models[kind]), prompt=prompt, **options))
    generate = pipeline("text-generation", str(models[kind]), device="cpu")
    unused = own_tokenizer(models[kind]).unused_ids(KINDS[kind][2])
    assert len(unused) == (44 if kind == "larger" else 0)
    expected = generate(
        prompt or generate.tokenizer.bos_token,
        max_new_tokens=40,
        do_sample=False,
        suppress_tokens=unused or None,
        return_full_text=False,
    )
    assert capsys.readouterr().out == f"{prompt}{expected[0]['generated_text']}\n"


def test_ids_without_a_token_are_never_sampled(models, tmp_path, capsys):
    """Where a model prefers an embedding that no token has, another token is sampled."""
    folder = shutil.copytree(models["larger"], tmp_path / "padded")
    model = GPT2LMHeadModel.from_pretrained(folder)
    model.transformer.wte.weight.data[50260:] = 0
    model.transformer.ln_f.weight.data.zero_()
    model.transformer.ln_f.bias.data.fill_(1)
    model.transformer.wte.weight.data[50260:] = 9  # the most likely ids by far
    model.save_pretrained(folder)
    options = {"prompt": "a", "max_new_tokens": 20, "num_return_sequences": 3, "device": "cpu"}
    sample(SampleConfig(model=str(folder), **options))
    printed = capsys.readouterr()
    assert "60 tokens" in printed.err
    assert all(len(text) > 20 for text in printed.out.split("> a")[1:])
    given = load_pretrained(folder), own_tokenizer(folder), [Prompt("a", 20)]
    assert len(generate_samples(*given, seed=1, device=torch.device("cpu"))[0]) > 20


def test_a_special_token_can_be_a_stop_text(models):
    """A special token is not shown, and ends a continuation if it is one of the stop texts."""
    tokenizer = own_tokenizer(models["larger"])
    ids = tokenizer.encode("Well<|im_start|> done<|im_end|> no more")
    for stop, expected in ([], "Well done"), (["<|im_start|>", "x"], "Well"), (["ll"], "We"):
        row = Continuation(tokenizer, stop)
        assert "".join(map(row.add, ids)) + row.finish() == row.text == expected


@pytest.mark.parametrize("kind", KINDS)
def test_hellaswag_agrees_with_lm_eval(models, kind, tmp_path, capsys):
    """Log-probabilities of HellaSwag's endings are lm-eval's, which loads the model's tokenizer
    with transformers; a row with a special token in its text is mentioned.
    """
    rows = [json.loads(line) for line in HELLASWAG_ROWS.read_text().splitlines()][:6]
    rows[1]["endings"][0] += "<|endoftext|>"
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    out = str(tmp_path / "out")
    evaluate(EvalConfig(str(models[kind]), data=str(data), out_dir=out, device="cpu"))
    assert "1 of 6 rows contain special tokens" in capsys.readouterr().out
    ours = [json.loads(line) for line in Path(out, "rows.jsonl").read_text().splitlines()]
    theirs = lm_eval_samples(models[kind], "hellaswag", str(data))
    for record, found in zip(sorted(ours, key=lambda r: r["row"]), theirs, strict=True):
        expected = [response[0][0] for response in found["resps"]]
        assert record["log_probs"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_examples_have_the_tokens_of_transformers(models, kind, write_rows):
    """A row's tokens are transformers': those of prompt and completion, then the model's end of
    text. A completion that has it at its end already gets no second one.
    """
    theirs, ours = AutoTokenizer.from_pretrained(models[kind]), own_tokenizer(models[kind])
    end = theirs.decode([KINDS[kind][3]])
    rows = [{"prompt": p, "completion": "yes" + e} for p in PROMPTS[::2] for e in ("", end)]
    examples = read_examples(write_rows(rows), ours, BLOCK_SIZE)
    for row, example in zip(rows, examples, strict=True):
        expected = [*theirs.encode(row["prompt"]), *theirs.encode("yes"), KINDS[kind][3]]
        assert example.tokens.tolist() == expected
    batch = pad(examples)
    assert (batch.targets == IGNORE_INDEX).any()
    assert batch.idx.max() < theirs.vocab_size + len(theirs.get_added_vocab())


def assert_same_tokenizer(folder: Path, model: Path, kind: str) -> None:
    """transformers reads the same tokenizer and the same ends from both folders."""
    theirs, found = map(AutoTokenizer.from_pretrained, (model, folder))
    for prompt in PROMPTS:
        assert found.encode(prompt) == theirs.encode(prompt)
        ids = theirs.encode(prompt + TEXT[:200])
        assert found.decode(ids) == theirs.decode(ids)
    assert (found.eos_token, len(found)) == (theirs.eos_token, len(theirs))
    if (folder / "config.json").exists():
        config = json.loads((folder / "config.json").read_text())
        assert (config["vocab_size"], config["eos_token_id"]) == KINDS[kind][2:]


@pytest.mark.parametrize("kind", SOME_SLOW)
def test_fine_tuning_keeps_the_tokenizer(models, kind, tmp_path, write_rows):
    """Adapters, merged models, shared folders and fully fine-tuned checkpoints carry the base's
    tokenizer and end of text; a resumed run continues the curve.
    """
    rows = [{"prompt": f"{i} plus {i} is", "completion": f" {2 * i}"} for i in range(24)]
    options = {"data": write_rows(rows), "batch_size": 4, "examples_per_step": 4, "max_lr": 1e-2}
    options |= {"model_name_or_path": models[kind], "eval_every": 2, "save_every": 2}
    options |= {"device": "cpu", "precision": "fp32", "max_steps": 4, "warmup_steps": 1}
    flags = as_flags({**options, "out_dir": "lora", "merge_out": "merged", "sample_every": 2})
    result = run_script("finetune_lora.py", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    curve = read_curve(tmp_path / "lora")
    checkpoint = tmp_path / "lora" / "checkpoints" / "step_000004"
    assert_same_tokenizer(checkpoint, models[kind], kind)
    assert_same_tokenizer(tmp_path / "merged", models[kind], kind)
    shutil.rmtree(checkpoint)
    (tmp_path / "lora" / "metrics.jsonl").write_text("")
    result = run_script("finetune_lora.py", *flags[:-2], "--out_dir=lora", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert read_curve(tmp_path / "lora") == curve[-2:]
    if kind == "larger":
        flags = as_flags({**options, "out_dir": "full", "sample_every": 0, "use_lora": False})
        assert run_script("finetune_lora.py", *flags, cwd=tmp_path).returncode == 0
        flags = ["--run", "full", "--repo_id", "me/mine", "--dry_run"]
        assert run_script("share.py", *flags, cwd=tmp_path).returncode == 0
        assert_same_tokenizer(tmp_path / "full" / "share", models[kind], kind)


@pytest.fixture(scope="module")
def own_data(tmp_path_factory, models) -> Path:
    """A folder with data/own, whose tokenizer was trained on its text, and data/larger."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "text.txt").write_text(TEXT)
    for name, flags in {
        "own": ["--train_tokenizer", 500],
        "larger": ["--tokenizer", models["larger"]],
    }.items():
        flags += ["--dataset", "text.txt", "--val_tokens", 600, "--out_dir", f"data/{name}"]
        result = run_script("fineweb.py", *flags, cwd=folder)
        assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize(("name", "vocab_size"), [("own", 500), ("larger", 50260)])
def test_pretraining_takes_the_tokenizer_of_the_data(own_data, name, vocab_size):
    """A model gets the vocabulary of its data, and its checkpoint the tokenizer. It resumes bit for
    bit, and two ranks give the same curve.
    """
    settings = {"data_dir": f"data/{name}", "max_steps": 6, "eval_every": 2, "save_every": 3}
    args = tiny_run(f"runs/{name}", **settings)
    assert run_script(*args, cwd=own_data).returncode == 0
    run = own_data / "runs" / name
    curve, checkpoint = read_curve(run), run / "checkpoints" / "step_000006"
    theirs = AutoTokenizer.from_pretrained(checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["vocab_size"] == len(theirs) == vocab_size
    assert config["eos_token_id"] == theirs.eos_token_id
    documents = [np.load(file) for file in sorted((own_data / "data" / name).glob("*.npy"))]
    text = theirs.decode(np.concatenate(documents).tolist()).replace(theirs.eos_token, "")
    assert sorted(text) == sorted(TEXT)
    assert all(tokens[0] == theirs.eos_token_id for tokens in documents)
    shutil.rmtree(checkpoint)
    assert run_script(*args, cwd=own_data).returncode == 0
    assert read_curve(run) == curve
    args = tiny_run(f"runs/{name}_ranks", **settings, batch_size=1)
    assert run_script(*args, cwd=own_data, ranks=2).returncode == 0
    losses = [[r[1] for r in c] for c in (curve, read_curve(own_data / "runs" / f"{name}_ranks"))]
    assert losses[0][1:] == pytest.approx(losses[1][1:], rel=1e-4)
    sampled = run_script(
        "sample.py", "--model", f"runs/{name}", "--prompt", "def", "--device", "cpu", cwd=own_data
    )
    assert sampled.stdout.startswith("def")


def test_other_weights_need_the_tokenizer_of_the_data(own_data, models, workplace):
    """init_from continues a model on data with its own tokenizer, and refuses other data by the
    names of both tokenizers.
    """
    args = {"max_steps": 2, "init_from": str(models["larger"]), "eval_every": 2}
    args |= dict.fromkeys(("n_layer", "n_head", "n_embd", "warmup_steps"))
    result = run_script(*tiny_run("runs/from", data_dir="data/larger", **args), cwd=own_data)
    assert result.returncode == 0, result.stderr
    assert_same_tokenizer(
        own_data / "runs/from/checkpoints/step_000002", models["larger"], "larger"
    )
    for data_dir, name in (("data/own", "own"), (workplace / "data/text", "gpt2")):
        error = expect_error(*tiny_run("runs/no", data_dir=data_dir, **args), cwd=own_data)
        assert f"has tokens of {name}" in error
        assert "tokenizer larger" in error
        assert "--tokenizer" in error


def test_a_model_without_tokenizer_files(models, tmp_path, capsys):
    """A model without them has GPT-2's tokenizer if it has as many tokens, and a line says so. Any
    other needs --tokenizer, as does one whose tokenizer has more tokens than the model.
    """
    for kind in ("equal", "smaller"):
        (tmp_path / kind).mkdir()
        for file in ("config.json", "model.safetensors"):
            shutil.copy(models[kind] / file, tmp_path / kind)
    assert own_tokenizer(tmp_path / "equal").name == "gpt2"
    assert "no tokenizer files; using GPT-2's" in capsys.readouterr().err
    flags = ["--prompt", "a", "--max_new_tokens", 5, "--device", "cpu", "--model", "smaller"]
    error = expect_error("sample.py", *flags, cwd=tmp_path)
    assert "smaller has 600 tokens and no tokenizer files" in error
    assert "--tokenizer" in error
    error = expect_error("sample.py", *flags, "--tokenizer", "gpt2", cwd=tmp_path)
    assert "600 tokens and the tokenizer gpt2" in error
    given = run_script("sample.py", *flags, "--tokenizer", models["smaller"], cwd=tmp_path)
    assert given.returncode == 0
    assert given.stdout == run_script("sample.py", *flags[:-1], models["smaller"]).stdout


def test_a_tokenizer_is_read_again_when_preparation_resumes(tmp_path):
    """A preparation resumes with the tokenizer in its folder, and is byte for byte what it is
    without an interruption. Another tokenizer is refused, and a changed one.
    """
    (tmp_path / "text.txt").write_text(TEXT)
    flags = ["--dataset", "text.txt", "--val_tokens", 600, "--shard_size", 1000]
    flags += ["--train_tokenizer", 400, "--out_dir"]
    for name in ("once", "twice"):
        assert run_script("fineweb.py", *flags, f"data/{name}", cwd=tmp_path).returncode == 0
    once, twice = (
        {f.name: f for f in (tmp_path / "data" / n).iterdir()} for n in ("once", "twice")
    )
    assert once["tokenizer.json"].read_bytes() == twice["tokenizer.json"].read_bytes()
    shards = [name for name in once if name.endswith(".npy")]
    lost = max(name for name in twice if name.endswith(".npy"))
    twice[lost].unlink()
    result = run_script("fineweb.py", *flags, "data/twice", cwd=tmp_path)
    assert "resuming after" in result.stdout
    for name in shards:
        again = tmp_path / "data" / "twice" / name.replace("once", "twice")
        assert again.read_bytes() == once[name].read_bytes()
    other = [*flags[:-3], "--out_dir", "data/once"]
    assert "another train_tokenizer" in expect_error("fineweb.py", *other, cwd=tmp_path)
    spec = once["tokenizer.json"].read_text()
    once["tokenizer.json"].write_text(spec.replace('"use_regex": true', '"use_regex": false'))
    error = expect_error("train_gpt2.py", "--data_dir", "data/once", cwd=tmp_path)
    assert "tokenizer.json is not there or has changed" in error


def test_special_tokens_in_text_to_prepare(models, tmp_path, write_rows, capsys):
    """In rows they are ordinary text, and counted; in a text file <|endoftext|> separates documents
    whatever the tokenizer's end of text is.
    """
    documents = [
        "One <|im_start|>",
        "two<|endoftext|>s <|im_end|>",
        *(f"{i} more" for i in range(9)),
    ]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(documents))
    sources = {
        "rows": write_rows([{"text": d} for d in documents]),
        "text": str(tmp_path / "a.txt"),
    }
    theirs = AutoTokenizer.from_pretrained(models["larger"], split_special_tokens=True)
    for name, n in (("rows", 3), ("text", 2)):
        out_dir, flags = str(tmp_path / name), {"tokenizer": str(models["larger"]), "val_tokens": 9}
        prepare(PrepareConfig(dataset=[sources[name]], out_dir=out_dir, **flags))
        assert f"{n} special tokens in the documents" in capsys.readouterr().out
        whole = [documents[0], *documents[1].split("<|endoftext|>")] if n == 2 else documents[:2]
        expected = [[50258, *theirs.encode(d)] for d in (*whole, *documents[2:])]
        tokens = np.concatenate([np.load(file) for file in Path(out_dir).glob("*.npy")])
        starts = np.flatnonzero(tokens == 50258)
        assert sorted(d.tolist() for d in np.split(tokens, starts)[1:]) == sorted(expected)


def test_data_have_the_end_of_text_of_the_model(models, tmp_path):
    """Data prepared with a model's tokenizer have documents that start with the end of text of its
    config.json, and training takes it from there.
    """
    (tmp_path / "a.txt").write_text(TEXT)
    options = {"out_dir": str(tmp_path / "out"), "tokenizer": str(models["other_eos"])}
    prepare(PrepareConfig(dataset=[str(tmp_path / "a.txt")], **options))
    assert load_data_tokenizer(tmp_path / "out").end_of_text == 198
    assert all(np.load(file)[0] == 198 for file in (tmp_path / "out").glob("*.npy"))


def test_an_evaluation_has_one_tokenizer(models, tmp_path):
    """An evaluation is not continued with another tokenizer."""
    options = {"data": str(HELLASWAG_ROWS), "limit": 2, "out_dir": str(tmp_path), "device": "cpu"}
    evaluate(EvalConfig(str(models["equal"]), **options))
    with pytest.raises(ValueError, match="evaluation with other tokenizer"):
        evaluate(EvalConfig(str(models["equal"]), tokenizer="gpt2", **options))


def test_a_tokenizer_is_trained_on_training_text_up_to_a_limit(tmp_path, write_rows, monkeypatch):
    """Of your own files it sees the documents for training and no others, and it stops once they
    have enough bytes, or enough different words.
    """
    documents = [f"document {i} has its own words: w{i}x, y{i}z" for i in range(60)]
    seen: list[list[str]] = []

    def train(batches, vocab_size, name):
        seen[:] = batches
        return Tokenizer.gpt2()

    monkeypatch.setattr(Tokenizer, "train", train)
    monkeypatch.setattr("fineweb.BATCH_CHARS", 100)
    options = {"dataset": [write_rows([{"text": d} for d in documents])], "train_tokenizer": 300}
    prepare(PrepareConfig(out_dir=str(tmp_path / "all"), val_tokens=200, **options))
    texts = [text for batch in seen for text in batch]
    ids = np.concatenate([np.load(file) for file in (tmp_path / "all").glob("*_train_*.npy")])
    assert sorted(texts) == sorted(Tokenizer.gpt2().decode(ids.tolist()).split("<|endoftext|>")[1:])
    assert 0 < len(texts) < len(documents)
    for limit in ("TRAINING_BYTES", "WORD_BYTES"):
        with monkeypatch.context() as patch:
            patch.setattr(f"fineweb.{limit}", 1)
            prepare(PrepareConfig(out_dir=str(tmp_path / limit), val_tokens=200, **options))
        assert 0 < sum(map(len, seen)) < len(texts)


def test_unsuitable_tokenizers_are_refused(tmp_path, monkeypatch):
    """A vocabulary that does not fit in 16 bits, a folder without a tokenizer, and flags that
    contradict each other are errors; a text with too few pairs gives a smaller tokenizer.
    """
    backend = gpt2_backend()
    backend.add_tokens([f"word{i}" for i in range(20_000)])
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "tokenizer.json").write_text(backend.to_str())
    (tmp_path / "a.txt").write_text("a b. " * 2000 + "c")
    monkeypatch.chdir(tmp_path)
    for flags, expected in (
        ({"tokenizer": "large"}, r"large \(70,257 tokens.*at most 65,536"),
        ({"tokenizer": "."}, "no tokenizer.json in ., expected one"),
        ({"tokenizer": "large", "train_tokenizer": 300}, "train_tokenizer, not both"),
        ({"dataset": ["fineweb10B-gpt2"], "train_tokenizer": 300}, "ready-made"),
    ):
        with pytest.raises(ValueError, match=expected):
            prepare(PrepareConfig(**{"dataset": ["a.txt"], "out_dir": "out", **flags}))
    prepare(PrepareConfig(dataset=["a.txt"], out_dir="out", train_tokenizer=500))
    assert 257 <= find_tokenizer("out").vocab_size < 300


def test_training_a_tokenizer_twice_gives_the_same(tmp_path):
    """Neither hash seeds nor the number of threads change the tokenizer, and the words of the text
    become single tokens.
    """
    program = (
        "import sys; from pathlib import Path; from engine.tokenizer import Tokenizer\n"
        f"text = Path({str(ROOT / 'tests' / 'test_config.py')!r}).read_text()\n"
        "print(Tokenizer.train([text.splitlines(), [text]], 700, 'x').sha256)"
    )
    found = set()
    for seed, threads in (("0", "1"), ("1", "2"), ("2", "4")):
        env = {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)}
        found.add(subprocess.check_output([sys.executable, "-c", program], env=env, text=True))
    assert len(found) == 1


def test_tokenizers_by_hub_name(models, tmp_path, monkeypatch):
    """A hub name's tokenizer comes from the hub's cache, as its weights do."""
    monkeypatch.setattr("engine.hub.find_network_problem", lambda: "it is off")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--me--larger"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(models["larger"], cached / "snapshots" / ("0" * 40))
    expected = own_tokenizer(models["larger"]).sha256
    assert find_tokenizer("me/larger").sha256 == expected
    assert load_tokenizer(load_pretrained("me/larger")).sha256 == expected
