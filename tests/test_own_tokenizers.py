"""Models with their own tokenizers, in each command, compared to transformers and lm-eval."""

import json
import shutil
import subprocess
import sys
from functools import cache
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

TEXT = HELLASWAG_ROWS.read_text()
SHIFT = 7  # how far the shifted tokenizer moves the ids of GPT-2's tokens
BLOCK_SIZE = 128


def gpt2_backend() -> HFTokenizer:
    return HFTokenizer.from_str(Tokenizer.gpt2().backend.to_str())


def make_smaller() -> HFTokenizer:
    return Tokenizer.train([TEXT.splitlines()], 600, "smaller").backend


def make_shifted() -> HFTokenizer:
    """Make a tokenizer with GPT-2's tokens under other ids."""
    spec = json.loads(gpt2_backend().to_str())
    vocab, (end,) = spec["model"]["vocab"], spec["added_tokens"]
    spec["model"]["vocab"] = {token: (i + SHIFT) % len(vocab) for token, i in vocab.items()}
    end["id"] = (end["id"] + SHIFT) % len(vocab)
    return HFTokenizer.from_str(json.dumps(spec))


def make_larger() -> HFTokenizer:
    """Add the special tokens of a chat model to GPT-2's tokenizer, and an ordinary word."""
    backend = gpt2_backend()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    backend.add_tokens([AddedToken("covid19", normalized=False)])
    return backend


# The tokenizer, its eos_token, and the vocab_size and eos_token_id in config.json.
KINDS = {
    "smaller": (make_smaller, "<|endoftext|>", 600, 599),
    "shifted": (make_shifted, "<|endoftext|>", 50257, SHIFT - 1),
    "larger": (make_larger, "<|im_end|>", 50304, 50258),
    "other_eos": (gpt2_backend, "<|endoftext|>", 50257, 198),  # a newline
}
SOME_SLOW = [pytest.param(k, marks=[pytest.mark.slow] * (k != "larger")) for k in KINDS]
PROMPTS = ("The value of", "", "<|im_start|>user\nIs covid19 new?<|im_end|>\n<|endoftext|>")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """For each kind, a folder where transformers saved a small GPT-2 and its tokenizer."""
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


@cache  # several tests use the same four
def own_tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(load_pretrained(folder))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_samples_match_the_pipeline_of_transformers(models, kind, prompt, capsys):
    """sample.py prints what transformers' pipeline generates. Special tokens in the prompt are
    recognized, the model's end-of-text token ends the text, and special tokens are not shown.
    pipeline would also generate ids without a token, so the test suppresses them.
    """
    options = {"max_new_tokens": 40, "temperature": 0.0, "device": "cpu"}
    sample(SampleConfig(model=str(models[kind]), prompt=[prompt], **options))
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
    """If a model prefers the ids of padding, which have no token, real tokens are sampled."""
    folder = shutil.copytree(models["larger"], tmp_path / "padded")
    model = GPT2LMHeadModel.from_pretrained(folder)
    # The last hidden state becomes all ones, so a logit is the sum of its embedding.
    model.transformer.ln_f.weight.data.zero_()
    model.transformer.ln_f.bias.data.fill_(1)
    model.transformer.wte.weight.data[50260:] = 9  # by far the most likely
    model.save_pretrained(folder)
    options = {"prompt": ["a"], "max_new_tokens": 20, "num_return_sequences": 3, "device": "cpu"}
    sample(SampleConfig(model=str(folder), **options))
    printed = capsys.readouterr()
    assert "60 tokens" in printed.err
    assert all(len(text) > 20 for text in printed.out.split("> a")[1:])
    given = load_pretrained(folder), own_tokenizer(folder), [Prompt("a", 20)]
    assert len(generate_samples(*given, seed=1, device=torch.device("cpu"))[0]) > 20


def test_a_special_token_can_be_a_stop_text(models):
    """A special token is not shown. It ends a continuation if it is a stop text."""
    tokenizer = own_tokenizer(models["larger"])
    ids = tokenizer.encode("Well<|im_start|> done<|im_end|> no more")
    for stop, expected in ([], "Well done"), (["<|im_start|>", "x"], "Well"), (["ll"], "We"):
        row = Continuation(tokenizer, stop)
        assert "".join(map(row.add, ids)) + row.finish() == row.text == expected


@pytest.mark.parametrize("kind", KINDS)
def test_hellaswag_agrees_with_lm_eval(models, kind, tmp_path, capsys):
    """Log-probabilities of HellaSwag endings match lm-eval, which loads the tokenizer with
    transformers. A message counts the rows whose text contains special tokens.
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
        assert record["log_probs"] == pytest.approx(expected, rel=1e-6, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_examples_match_transformers(models, kind, write_rows):
    """An example is the tokens that transformers gives for prompt and completion, then one
    end-of-text token. A completion that already ends with that token gets no second one.
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
    """Check that transformers reads the same tokenizer and eos_token from both folders."""
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
    """Adapters, merged models, shared folders and fully fine-tuned checkpoints keep the tokenizer
    and the end-of-text token of the base. A resumed run continues the curve.
    """
    rows = [{"prompt": f"{i} plus {i} is", "completion": f" {2 * i}"} for i in range(24)]
    options = {"data": write_rows(rows), "batch_size": 4, "examples_per_step": 4, "max_lr": 1e-2}
    options |= {"model_name_or_path": models[kind], "eval_every": 2, "save_every": 2}
    options |= {"device": "cpu", "precision": "fp32", "max_steps": 4, "warmup_steps": 1}
    options |= {"out_dir": "lora"}
    flags = as_flags({**options, "merge_out": "merged", "sample_every": 2})
    result = run_script("finetune_lora.py", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    curve = read_curve(tmp_path / "lora")
    checkpoint = tmp_path / "lora" / "checkpoints" / "step_000004"
    assert_same_tokenizer(checkpoint, models[kind], kind)
    assert_same_tokenizer(tmp_path / "merged", models[kind], kind)
    shutil.rmtree(checkpoint)
    (tmp_path / "lora" / "metrics.jsonl").write_text("")
    result = run_script("finetune_lora.py", *as_flags(options), cwd=tmp_path)
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
    """A folder with data/own, whose tokenizer is trained on its text, and data/larger."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "text.txt").write_text(TEXT)
    tokenizers = {"own": ["--train_tokenizer", 500], "larger": ["--tokenizer", models["larger"]]}
    for name, flags in tokenizers.items():
        flags += ["--dataset", "text.txt", "--val_tokens", 600, "--out_dir", f"data/{name}"]
        result = run_script("fineweb.py", *flags, cwd=folder)
        assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize(("name", "vocab_size"), [("own", 500), ("larger", 50260)])
def test_pretraining_takes_the_tokenizer_of_the_data(own_data, name, vocab_size):
    """A model has the vocabulary of its data, and its checkpoints the same tokenizer. A run resumes
    bit for bit, and two ranks give the same curve.
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
    shards = [np.load(file) for file in sorted((own_data / "data" / name).glob("*.npy"))]
    text = theirs.decode(np.concatenate(shards).tolist()).replace(theirs.eos_token, "")
    assert sorted(text) == sorted(TEXT)  # the splits change the order
    assert all(tokens[0] == theirs.eos_token_id for tokens in shards)
    shutil.rmtree(checkpoint)
    assert run_script(*args, cwd=own_data).returncode == 0
    assert read_curve(run) == curve
    args = tiny_run(f"runs/{name}_ranks", **settings, batch_size=1)
    assert run_script(*args, cwd=own_data, ranks=2).returncode == 0
    curves = curve, read_curve(own_data / "runs" / f"{name}_ranks")
    one, two = ([loss for _, loss, *_ in each[1:]] for each in curves)  # step 0 has no train_loss
    assert one == pytest.approx(two, rel=1e-4)
    flags = ("--model", f"runs/{name}", "--prompt", "def", "--device", "cpu")
    sampled = run_script("sample.py", *flags, cwd=own_data)
    assert sampled.stdout.startswith("def")


def test_init_from_needs_the_tokenizer_of_the_data(own_data, models, workdir):
    """init_from continues a model on data with the same tokenizer. For other data, the error names
    both tokenizers.
    """
    args = {"max_steps": 2, "init_from": str(models["larger"]), "eval_every": 2}
    args |= dict.fromkeys(("n_layer", "n_head", "n_embd", "warmup_steps"))
    result = run_script(*tiny_run("runs/from", data_dir="data/larger", **args), cwd=own_data)
    assert result.returncode == 0, result.stderr
    checkpoint = own_data / "runs/from/checkpoints/step_000002"
    assert_same_tokenizer(checkpoint, models["larger"], "larger")
    for data_dir, name in (("data/own", "own"), (workdir / "data/text", "gpt2")):
        error = expect_error(*tiny_run("runs/no", data_dir=data_dir, **args), cwd=own_data)
        assert f"tokenized with {name}" in error
        assert "tokenizer larger" in error
        assert "--tokenizer" in error


def test_a_model_without_tokenizer_files(models, tmp_path, capsys):
    """A model without tokenizer files uses GPT-2's if its vocab_size is 50257, and says so. Other
    sizes need --tokenizer, with no more tokens than the model has.
    """
    for kind in ("shifted", "smaller"):
        (tmp_path / kind).mkdir()
        for file in ("config.json", "model.safetensors"):
            shutil.copy(models[kind] / file, tmp_path / kind)
    assert own_tokenizer(tmp_path / "shifted").name == "gpt2"
    assert "no tokenizer files; using GPT-2's" in capsys.readouterr().err
    flags = ["--prompt", "a", "--max_new_tokens", 5, "--device", "cpu", "--model", "smaller"]
    error = expect_error("sample.py", *flags, cwd=tmp_path)
    assert "smaller has 600 tokens and no tokenizer files" in error
    assert "--tokenizer" in error
    error = expect_error("sample.py", *flags, "--tokenizer", "gpt2", cwd=tmp_path)
    assert "600 tokens, but the tokenizer gpt2" in error
    given = run_script("sample.py", *flags, "--tokenizer", models["smaller"], cwd=tmp_path)
    assert given.returncode == 0
    assert given.stdout == run_script("sample.py", *flags[:-1], models["smaller"]).stdout


def test_a_tokenizer_is_read_again_when_preparation_resumes(tmp_path):
    """An interrupted preparation resumes with the tokenizer in its folder, and gives the same bytes
    as without interruption. Another tokenizer, or a changed one, is refused.
    """
    (tmp_path / "text.txt").write_text(TEXT)
    without_tokenizer = ["--dataset", "text.txt", "--val_tokens", 600, "--shard_size", 1000]
    flags = [*without_tokenizer, "--train_tokenizer", 400, "--out_dir"]
    for name in ("once", "twice"):
        assert run_script("fineweb.py", *flags, f"data/{name}", cwd=tmp_path).returncode == 0
    folders = tmp_path / "data" / "once", tmp_path / "data" / "twice"
    once, twice = ({f.name: f for f in folder.iterdir()} for folder in folders)
    assert once["tokenizer.json"].read_bytes() == twice["tokenizer.json"].read_bytes()
    shards = [name for name in once if name.endswith(".npy")]
    lost = max(name for name in twice if name.endswith(".npy"))
    twice[lost].unlink()
    result = run_script("fineweb.py", *flags, "data/twice", cwd=tmp_path)
    assert "resuming after" in result.stdout
    for name in shards:
        again = tmp_path / "data" / "twice" / name.replace("once", "twice")
        assert again.read_bytes() == once[name].read_bytes()
    other = [*without_tokenizer, "--out_dir", "data/once"]
    assert "train_tokenizer was 400" in expect_error("fineweb.py", *other, cwd=tmp_path)
    spec = once["tokenizer.json"].read_text()
    once["tokenizer.json"].write_text(spec.replace('"use_regex": true', '"use_regex": false'))
    error = expect_error("train_gpt2.py", "--data_dir", "data/once", cwd=tmp_path)
    assert "tokenizer.json is missing or has changed" in error


def test_special_tokens_in_text_to_prepare(models, tmp_path, write_rows, capsys):
    """Special tokens in rows become ordinary text, and a message counts them. In a text file,
    <|endoftext|> separates documents even if the tokenizer has another end-of-text token.
    """
    documents = ["One <|im_start|>", "two<|endoftext|>s <|im_end|>"]
    documents += [f"{i} more" for i in range(9)]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(documents))
    rows = write_rows([{"text": d} for d in documents])
    sources = {"rows": rows, "text": str(tmp_path / "a.txt")}
    theirs = AutoTokenizer.from_pretrained(models["larger"], split_special_tokens=True)
    for name, n_special in (("rows", 3), ("text", 2)):
        out_dir, flags = str(tmp_path / name), {"tokenizer": str(models["larger"]), "val_tokens": 9}
        prepare(PrepareConfig(dataset=[sources[name]], out_dir=out_dir, **flags))
        assert f"{n_special} special tokens in the documents" in capsys.readouterr().out
        is_split = name == "text"  # at the <|endoftext|> within documents[1]
        parts = documents[1].split("<|endoftext|>") if is_split else [documents[1]]
        expected = [[50258, *theirs.encode(d)] for d in (documents[0], *parts, *documents[2:])]
        tokens = np.concatenate([np.load(file) for file in Path(out_dir).glob("*.npy")])
        starts = np.flatnonzero(tokens == 50258)
        assert sorted(d.tolist() for d in np.split(tokens, starts)[1:]) == sorted(expected)


def test_data_has_the_end_of_text_of_the_model(models, tmp_path):
    """With a model's tokenizer, each prepared document starts with the eos_token_id of the model's
    config.json, and the data's tokenizer keeps that id.
    """
    (tmp_path / "a.txt").write_text(TEXT)
    options = {"out_dir": str(tmp_path / "out"), "tokenizer": str(models["other_eos"])}
    prepare(PrepareConfig(dataset=[str(tmp_path / "a.txt")], **options))
    assert load_data_tokenizer(tmp_path / "out").end_of_text == 198
    assert all(np.load(file)[0] == 198 for file in (tmp_path / "out").glob("*.npy"))


def test_an_evaluation_has_one_tokenizer(models, tmp_path):
    """An evaluation cannot be continued with another tokenizer."""
    options = {"data": str(HELLASWAG_ROWS), "limit": 2, "out_dir": str(tmp_path), "device": "cpu"}
    evaluate(EvalConfig(str(models["shifted"]), **options))
    with pytest.raises(ValueError, match="results with different tokenizer"):
        evaluate(EvalConfig(str(models["shifted"]), tokenizer="gpt2", **options))


def test_a_tokenizer_is_trained_on_training_text_up_to_a_limit(tmp_path, write_rows, monkeypatch):
    """A tokenizer is trained on the training documents and none held out for validation, and only
    until it has seen enough bytes, or enough different words.
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
    contradict each other are errors. A text with too few pairs gives a smaller tokenizer.
    """
    backend = gpt2_backend()
    backend.add_tokens([f"word{i}" for i in range(20_000)])
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "tokenizer.json").write_text(backend.to_str())
    (tmp_path / "a.txt").write_text("a b. " * 2000 + "c")
    monkeypatch.chdir(tmp_path)
    for flags, expected in (
        ({"tokenizer": "large"}, r"large \(70,257 tokens.*at most 65,536"),
        ({"tokenizer": "."}, r"no tokenizer files in \.; pass"),
        ({"tokenizer": "large", "train_tokenizer": 300}, "train_tokenizer, not both"),
        ({"dataset": ["fineweb10B-gpt2"], "train_tokenizer": 300}, "ready-made"),
    ):
        with pytest.raises(ValueError, match=expected):
            prepare(PrepareConfig(**{"dataset": ["a.txt"], "out_dir": "out", **flags}))
    prepare(PrepareConfig(dataset=["a.txt"], out_dir="out", train_tokenizer=500))
    assert 257 <= find_tokenizer("out").vocab_size < 300


def test_training_a_tokenizer_is_deterministic():
    """Neither hash seeds nor the number of threads change a trained tokenizer."""
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
    """A model given by its hub name gets its tokenizer from the hub's cache, like its weights."""
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
