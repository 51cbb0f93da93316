"""Tests that need a CUDA GPU; skipped without one. The whole file takes a minute."""

import copy
import itertools
import time
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    CPU_DIST,
    GPT2_TOKENIZER,
    GPU_DIST,
    HELLASWAG_ROWS,
    NEEDS_GPU,
    SHARED_DATA,
    make_data,
    make_step,
    random_ids,
    run_worker,
    small_gpt2,
)
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from engine.data import Batch, validation_batches
from engine.decode import speed_up_decoding
from engine.distributed import shard_model
from engine.evaluation import eval_mode, evaluate_loss, evaluate_task
from engine.instructions import InstructionData, PromptCompletion
from engine.lora import (
    LoRAConfig,
    cast_frozen_weights,
    convert_linear_layer_to_lora,
    hold_copies,
    lora_linears,
    only_optimize_lora_parameters,
)
from engine.loss import HeadLoss, SummedLoss, cross_entropy_
from engine.metrics import read_metrics
from engine.optim import build_optimizers
from engine.recompute import apply_recompute
from engine.step import TrainingStep
from engine.tasks import Task, make_task
from engine.training import train
from model import GPT, GPTConfig
from train_gpt2 import PretrainConfig

pytestmark = NEEDS_GPU
CUDA = GPU_DIST.device
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def _restore_precision():
    """Undo what training in 16 bits does to the whole process: it allows TF32."""
    torch._dynamo.reset()
    yield
    torch.set_float32_matmul_precision("highest")


def cuda_model(**shape: int) -> GPT:
    """Make a small GPT-2 with the same weights at every call."""
    torch.manual_seed(0)
    config = {"block_size": 128, "vocab_size": 1000, "n_layer": 2, "n_head": 2, "n_embd": 128}
    return GPT(GPTConfig(**config | shape)).to(CUDA)


def cuda_step(shards, model: GPT | None = None, **options):
    return make_step(model or cuda_model(block_size=16), shards, dist=GPU_DIST, **options)


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the error over the norm of `expected`."""
    return float((value.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(FP32, 1e-5), (FP16, 2e-3), (BF16, 1e-2)], ids=["fp32", "fp16", "bf16"]
)
def test_head_loss_equals_cross_entropy(dtype, tolerance, is_compiled):
    """Loss and gradients equal float64 cross-entropy, even for tokens that are nearly certain."""
    if is_compiled and dtype == FP32:
        pytest.skip("fp32 is never compiled")
    generator = torch.Generator().manual_seed(0)
    n, vocab_size, C = 5000, 50257, 768  # more rows than a chunk
    x = torch.randn(n, C, generator=generator).to(CUDA)
    weight = 0.02 * torch.randn(50304, C, generator=generator).to(CUDA)
    targets = torch.randint(vocab_size, (n,), generator=generator).to(CUDA)
    x[: n // 2] += 40 * weight[targets[: n // 2]]  # these logits are about 12 above the others
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    cross_entropy = cross_entropy_
    if is_compiled:
        from engine.triton_loss import triton_cross_entropy_ as cross_entropy
    x16 = leaves[0].to(dtype)
    loss = HeadLoss.apply(x16, leaves[1], targets, vocab_size, True, cross_entropy)
    grads = torch.autograd.grad(loss, leaves)
    exact = [t.to(dtype).double().requires_grad_() for t in (x, weight)]
    logits = exact[0] @ exact[1][:vocab_size].t()
    expected = F.cross_entropy(logits, targets, reduction="sum")
    expected_grads = torch.autograd.grad(expected, exact)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert relative_error(grad, expected_grad) < tolerance
    assert (grads[1][vocab_size:] == 0).all()


@pytest.mark.parametrize("compile_step", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bit_training_follows_fp32(shards, precision, compile_step):
    """In 16 bits, compiled or not, the losses of ten steps are close to fp32. Weights stay fp32."""
    step_fp32, model = cuda_step(shards, max_lr=1e-3), cuda_model(block_size=16)
    options = {"precision": precision, "compile": compile_step, "max_lr": 1e-3}
    step_16_bit = cuda_step(shards, model, **options)
    for s in range(1, 11):
        assert step_16_bit(s)[0].item() == pytest.approx(step_fp32(s)[0].item(), rel=5e-3)
    assert {p.dtype for p in model.parameters()} == {FP32}


def test_the_compiled_validation_loss_equals_the_eager_one(shards):
    """In bf16, the validation loss of the compiled model equals that of the plain model."""
    step = cuda_step(shards, precision="bf16", compile=True)
    val = [make_data(shards).micro_batch(s, 1) for s in (1, 2)]
    token_bytes = GPT2_TOKENIZER.token_bytes
    with eval_mode(step.model, step.config, GPU_DIST):
        expected, _ = evaluate_loss(SummedLoss(step.model), val, token_bytes, GPU_DIST)
    with eval_mode(step.model, step.config, GPU_DIST, compiled=True, fixed_shape=True):
        found, _ = evaluate_loss(step.summed_loss, val, token_bytes, GPU_DIST)
    assert found == pytest.approx(expected, rel=1e-3)


def test_steps_on_cuda_equal_those_on_a_cpu(shards):
    """In fp32, training has the same losses on a GPU as on a CPU, with AdamW and with Muon."""
    for optimizer, tolerance in (("adamw", 1e-4), ("muon", 5e-3)):  # Muon iterates in bf16
        model = cuda_model(block_size=16)
        options = {"optimizer": optimizer, "max_lr": 1e-3}
        on_cpu = make_step(copy.deepcopy(model).cpu(), shards, **options)
        on_gpu = cuda_step(shards, model, **options)
        for s in range(1, 8):
            assert on_gpu(s)[0].item() == pytest.approx(on_cpu(s)[0].item(), rel=tolerance)


@pytest.mark.parametrize("mode", ["none", "light", "block"])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_recompute_and_compile_do_not_change_gradients(mode, is_compiled):
    """Gradients equal those of the plain model, whatever is recomputed or compiled."""
    idx, results = random_ids(4, 128).to(CUDA), []
    for recompute, trunk_mode in (("none", None), (mode, "default" if is_compiled else None)):
        model = cuda_model()
        apply_recompute(model, recompute)
        loss = SummedLoss(model, trunk_mode=trunk_mode)
        results.append(torch.autograd.grad(loss(Batch(idx, idx.roll(1))), [*model.parameters()]))
    for grad, expected in zip(*results, strict=True):
        assert relative_error(grad, expected) < 1e-5


@pytest.mark.parametrize(
    "options",
    [{}, {"optimizer": "muon", "muon_beta2": 0.95}, {"optimizer": "muon", "compile": True}],
    ids=str,
)
def test_a_step_does_not_wait_for_the_device(shards, options):
    """A training step, from forward pass to optimizer update, never waits for the GPU."""
    step = cuda_step(shards, precision="bf16", **options)
    step(1)
    torch.cuda.set_sync_debug_mode("error")  # a synchronization raises
    try:
        step(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_restoring_a_snapshot_repeats_the_next_steps(shards, optimizer):
    """Training does not change a snapshot, and restoring it repeats the steps that followed."""
    model = cuda_model(block_size=16)
    step = cuda_step(shards, model, optimizer=optimizer)
    for s in (1, 2, 3):
        step(s)
    params, state = step.snapshot()
    saved = copy.deepcopy(params)
    expected = [step(s)[0].item() for s in (4, 5, 6)]
    assert all(torch.equal(params[name], saved[name]) for name in saved)
    model = cuda_model(block_size=16)
    model.load_state_dict(saved, strict=False)  # a tied head has two names
    step = cuda_step(shards, model, optimizer=optimizer)
    step.restore(state)
    assert [step(s)[0].item() for s in (4, 5, 6)] == pytest.approx(expected, rel=1e-5)


def test_lora_does_not_recompile_for_every_length():
    """Twelve lengths need only two graphs of the trunk, and there are no graph breaks."""
    model = cuda_model()
    convert_linear_layer_to_lora(model, config=LoRAConfig(lora_dim=8))
    only_optimize_lora_parameters(model)
    apply_recompute(model, "light")
    summed_loss = SummedLoss(model.train(), trunk_mode="default", compile_head=True)
    counters.clear()
    for T in range(20, 128, 9):
        idx = random_ids(4, T).to(CUDA)
        with torch.autocast("cuda", BF16):
            summed_loss(Batch(idx, idx)).backward()
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 2


def finetuning_step(use_graphs: bool, form: str, batch_size: int = 8, **options) -> TrainingStep:
    """Return a compiled step over 8 examples of up to 120 tokens. `form` is full or one of LoRA."""
    rows = [np.arange(n) % 1000 for n in range(8, 122, 2)]
    examples = [PromptCompletion("", "", row, row, n_prompt=1) for row in rows]
    sizes = {"examples_per_step": 8, "batch_size": batch_size, "seed": 1}
    data = InstructionData(examples, **sizes)
    if use_graphs:
        data.limit_lengths()
    model = cuda_model()
    if form != "full":
        lora_config = LoRAConfig(lora_dropout=options.pop("lora_dropout", 0.0))
        convert_linear_layer_to_lora(model, config=lora_config)
        only_optimize_lora_parameters(model)
    for linear in lora_linears(model).values():
        torch.nn.init.normal_(linear.lora_B, std=0.05)
        linear.use_summed_form = form == "summed"
    if options.pop("base_precision", "fp32") == "bf16":
        cast_frozen_weights(model, BF16)
    settings = {"batch_size": batch_size, "max_steps": 100, "warmup_steps": 2, "max_lr": 1e-3}
    settings |= {"precision": "bf16", "compile": True}
    return TrainingStep(model, data, PretrainConfig(**settings | options), GPU_DIST)


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("full", {"recompute": "none"}),
        ("full", {"recompute": "block", "batch_size": 2}),
        ("full", {"optimizer": "muon", "batch_size": 2}),
        ("separate", {"recompute": "light", "batch_size": 2}),
        ("separate", {"recompute": "none", "base_precision": "bf16"}),
        ("summed", {"recompute": "light"}),
        ("summed", {"recompute": "block", "batch_size": 2}),
    ],
)
def test_cuda_graphs_do_not_change_the_curve(form, options):
    """Losses and gradient norms with CUDA graphs equal those of the compiled step without: for
    each length, with one and with four micro-steps, and after a validation. No graph is skipped.
    """
    results = []
    for use_graphs in (False, True):
        torch._dynamo.reset()
        counters.clear()
        step = finetuning_step(use_graphs, form, **options)
        curve = [step(s) for s in range(1, 17)]
        with torch.no_grad(), torch.autocast("cuda", BF16):
            curve.append((step.summed_loss(step.batches(1, 1)),) * 2)
        curve += [step(s) for s in range(17, 21)]
        results.append([(loss.item(), norm.item()) for loss, norm in curve])
        if use_graphs:
            assert counters["inductor"]["cudagraph_skips"] == 0
    for (loss, norm), (expected_loss, expected_norm) in zip(*reversed(results), strict=True):
        assert loss == pytest.approx(expected_loss, rel=2e-3)
        assert norm == pytest.approx(expected_norm, rel=3e-2)


def test_a_micro_step_replays_two_graphs():
    """A micro-step launches the graph of its forward pass and that of its backward pass, and few
    kernels besides.
    """
    step = finetuning_step(True, "summed", batch_size=2)
    for s in (1, 2):
        step(s)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        step(3)
        torch.cuda.synchronize()
    launches = Counter(event.name for event in prof.events() if event.name.startswith("cuda"))
    assert launches["cudaGraphLaunch"] == 2 * step.data.grad_accum_steps
    assert launches["cudaLaunchKernel"] < 400  # 24 LoRA layers' copies, four heads, one update


def test_dropout_in_a_graph_depends_on_the_seed():
    """A replay draws the masks of the seed that was set before it: the same seed repeats the loss,
    another one changes it.
    """
    step = finetuning_step(True, "separate", lora_dropout=0.5)
    step(1)
    batch, losses = step.batches(1, 1), []
    with torch.autocast("cuda", BF16), hold_copies(step.copied_linears, BF16):
        for s in (1, 2, 1):
            step._seed_dropout(s, 1)
            losses.append(step._add_gradients(batch, 1).item())
    assert losses[0] == losses[2] != losses[1]


def test_clipping_launches_few_kernels():
    """The gradient norm needs a few launches in all, not several per parameter."""
    step = finetuning_step(False, "full")
    for param in step.model.parameters():
        param.grad = torch.ones_like(param)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        norm = step._clip_gradients()
        torch.cuda.synchronize()
    n_launches = sum("Launch" in e.name or "Memset" in e.name for e in prof.events())
    assert n_launches < len(list(step.model.parameters()))
    n_elements = sum(p.numel() for p in step.model.parameters())
    assert norm.item() == pytest.approx(n_elements**0.5, rel=1e-5)


def load_hellaswag() -> Task:
    """Return HellaSwag on its first 400 rows if this machine has them, else on the tests' 20."""
    file = SHARED_DATA / "hellaswag_val_raw_400.jsonl"
    return make_task("hellaswag", data=str(file if file.exists() else HELLASWAG_ROWS))


def test_hellaswag_predictions_equal_the_cpu():
    """In fp32, a GPU predicts the same endings as a CPU."""
    model, task = small_gpt2(block_size=1024).eval(), load_hellaswag()
    examples = task.load(GPT2_TOKENIZER, 1024)
    predictions = []
    for dist in (CPU_DIST, GPU_DIST):
        records = itertools.chain(*task.score_examples(model.to(dist.device), examples, dist))
        predictions.append({r["row"]: (r["pred"], r["pred_norm"]) for r in records})
    assert predictions[0] == predictions[1]


def test_training_evaluates_hellaswag_as_the_command_does(shards):
    """bf16 training uses TF32, but evaluations turn it off, so results equal hellaswag.py's."""
    model = small_gpt2(block_size=1024).to(CUDA)
    examples = load_hellaswag().load(GPT2_TOKENIZER, 1024)
    with torch.autocast("cuda", BF16):
        expected = evaluate_task("hellaswag", model.eval(), examples, GPU_DIST)
    step = cuda_step(shards, model, precision="bf16")
    assert torch.get_float32_matmul_precision() == "high"
    with eval_mode(model, step.config, GPU_DIST):
        assert torch.get_float32_matmul_precision() == "highest"
        assert evaluate_task("hellaswag", model, examples, GPU_DIST) == expected
    assert torch.get_float32_matmul_precision() == "high"


def test_greedy_text_equals_the_cpu():
    """In fp32, a GPU generates the same tokens as a CPU, even past the end of the context."""
    model, idx = small_gpt2(block_size=64).eval(), random_ids(2, 40)
    expected = model.generate(idx, 60, temperature=0)
    model.to(CUDA)
    for uses_graphs in (False, True):
        if uses_graphs:
            speed_up_decoding(model)
        for rows in (slice(2), slice(1), slice(2)):  # other batch sizes need other graphs
            found = model.generate(idx[rows].to(CUDA), 60, temperature=0)
            assert torch.equal(found.cpu(), expected[rows])


@pytest.fixture
def nccl(tmp_path):
    torch.cuda.set_device(CUDA)
    torch.distributed.init_process_group(
        "nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_one_rank_over_nccl(nccl, parallel):
    """On one rank, compiled DDP or FSDP2 with Muon takes the same steps as the plain model."""
    idx, results = random_ids(4, 128).to(CUDA), []
    batch = Batch(idx, idx.roll(1))
    config = PretrainConfig(optimizer="muon", precision="fp32", batch_size=4)
    for kind in ("plain", parallel):
        model = cuda_model()
        if kind == "fsdp":
            shard_model(model, GPU_DIST, None, compile_blocks=True)
        loss = SummedLoss(model, trunk_mode="default" if kind == "ddp" else None)
        loss = DistributedDataParallel(loss) if kind == "ddp" else loss
        optimizers = build_optimizers(model, config)
        for _ in range(3):
            value = loss(batch)
            value.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        results.append(loss(batch).item())
    assert results[1] == pytest.approx(results[0], rel=1e-3)


def test_resuming_is_exact_with_deterministic_kernels(monkeypatch):
    """With deterministic kernels, a compiled bf16 run that is stopped and resumed has the same
    losses as an uninterrupted one, bit for bit.
    """
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    straight, resumed = run_worker("resume_on_cuda.py").splitlines()[-2:]
    assert straight == resumed


def test_each_step_logs_its_own_time(shards, tmp_path, monkeypatch, no_plots):
    """Each step logs how long the GPU worked on it, although its results are read while the next
    step runs, and evaluations and saves come in between.
    """
    unit = 200_000_000  # cycles, about 0.1 s; the model itself takes much less

    def sleep(cycles: int) -> float:
        """Let the GPU wait. Return how many seconds it waits if nothing else is in its queue."""
        torch.cuda.synchronize()
        started = time.perf_counter()
        torch.cuda._sleep(cycles)
        torch.cuda.synchronize()
        return time.perf_counter() - started

    class SlowStep(TrainingStep):
        def __call__(self, step):
            results = super().__call__(step)
            torch.cuda._sleep(unit * (1 + step % 3))
            return results

    def evaluate_slowly(*args):
        torch.cuda._sleep(5 * unit)
        return evaluate_loss(*args)

    monkeypatch.setattr("engine.training.TrainingStep", SlowStep)
    monkeypatch.setattr("engine.evaluation.evaluate_loss", evaluate_slowly)
    sizes = {"batch_size": 4, "total_batch_size": 192, "warmup_steps": 3, "sample_every": 0}
    often = {"max_steps": 10, "eval_every": 5, "save_every": 7}
    config = PretrainConfig(
        out_dir=str(tmp_path), precision="bf16", compile=False, **sizes, **often
    )
    val = partial(validation_batches, shards, block_size=16, batch_size=4, eval_tokens=100)
    model, data = cuda_model(block_size=16), make_data(shards)
    train(model, GPT2_TOKENIZER, data, val, [], config, GPU_DIST)
    sleep(unit)  # warm up
    expected = {n: sleep(unit * n) for n in (1, 2, 3, 5)}
    records = read_metrics(tmp_path)
    for record in records[2:]:  # step 1 also waits for libraries to load
        extra = record["step_ms"] / 1e3 - expected[1 + record["step"] % 3]
        assert -0.01 < extra < 0.08, record
    evaluated = {r["step"]: r["eval_ms"] / 1e3 for r in records if "eval_ms" in r}
    assert [*evaluated] == [0, 5, 10]
    assert all(seconds > expected[5] - 0.01 for seconds in evaluated.values())
