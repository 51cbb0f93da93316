import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.optim._muon as torchs
from test_training import CONFIG, make_step, new_model

import muon
from data import TokenShards
from muon import Muon, orthogonalized
from step import learning_rate
from train_gpt2 import PretrainConfig
from train_gpt2 import new_model as new_model_of

ROOT = Path(__file__).parents[1]


@pytest.fixture
def shards(make_shards):
    return TokenShards(make_shards(300, 390), "train")


PYTORCHS_ITERATION = torchs._zeropower_via_newtonschulz


class Kept(torch.Tensor):
    """A tensor that stays in fp32 when it is asked for bf16."""

    def bfloat16(self):
        return self.as_subclass(torch.Tensor).clone()


def in_fp32(gradient: torch.Tensor, *how: object) -> torch.Tensor:
    """PyTorch's iteration without its one cast to bf16."""
    return PYTORCHS_ITERATION(gradient.as_subclass(Kept), *how)


@pytest.mark.parametrize("shape", [(48, 48), (96, 24), (24, 96)])
def test_orthogonal_as_pytorchs_in_fp32(shape):
    """A batch of matrices comes out as PyTorch's iteration in fp32 makes each of them, wide, tall
    or square, with singular values in the band that the quintic is known for.
    """
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape)
    ours = orthogonalized(matrices)
    for mine, matrix in zip(ours, matrices, strict=True):
        theirs = in_fp32(matrix, muon.NS_COEFFICIENTS, muon.NS_STEPS, muon.NS_EPS)
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
        values = torch.linalg.svdvals(mine)
        assert 0.3 < values[-1] <= values[0] < 1.3
        # The same left and right vectors as the matrix had: U S' V', not some orthogonal matrix.
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        inner = u.T @ mine @ v.T
        off = inner - torch.diag(inner.diagonal())
        assert off.abs().max() < 1e-3


def test_zero_gradient_is_no_nan():
    """A gradient of zero, as zero-initialised projections give, moves nothing."""
    assert torch.equal(orthogonalized(torch.zeros(2, 8, 4)), torch.zeros(2, 8, 4))


def test_steps_equal_pytorchs_muon(monkeypatch):
    """Five steps over two shapes equal torch.optim.Muon's, its iteration in fp32, c_attn given to
    it as three matrices.
    """
    monkeypatch.setattr(torchs, "_zeropower_via_newtonschulz", in_fp32)
    torch.manual_seed(0)
    qkv, proj = torch.randn(72, 24), torch.randn(24, 96)
    mine = [torch.nn.Parameter(qkv.clone()), torch.nn.Parameter(proj.clone())]
    theirs = [torch.nn.Parameter(t.clone()) for t in (*qkv.chunk(3), proj)]
    groups = [{"params": [mine[0]], "parts": 3}, {"params": [mine[1]]}]
    ours = Muon(groups, lr=0.02, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95)
    for _ in range(5):
        a, b = torch.randn(72, 24), torch.randn(24, 96)
        for param, grad in zip([*mine, *theirs], [a, b, *a.chunk(3), b], strict=True):
            param.grad = grad.clone()
        ours.step()
        reference.step()
    torch.testing.assert_close(mine[0], torch.cat(theirs[:3]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mine[1], theirs[3], atol=1e-5, rtol=1e-4)


def test_batches_do_not_matter(monkeypatch, shards):
    """How many matrices are iterated at once changes nothing but the order of sums."""
    losses = []
    for at_once in (muon.ELEMENTS_AT_ONCE, 1):
        monkeypatch.setattr(muon, "ELEMENTS_AT_ONCE", at_once)
        step = make_step(new_model(), shards, optimizer="muon")
        losses.append([step(s)[0].item() for s in range(1, 6)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_who_gets_muon(shards):
    """The matrices of the blocks, c_attn as three, and nothing else; AdamW has all others once."""
    model = new_model()
    adamw, ours = make_step(model, shards, optimizer="muon", muon_lr=0.5).optimizers
    names = {id(p): n for n, p in model.named_parameters()}
    parts = {names[id(p)]: g["parts"] for g in ours.param_groups for p in g["params"]}
    expected = {
        f"transformer.h.{i}.{n}.weight": 3 if n == "attn.c_attn" else 1
        for i in range(CONFIG.n_layer)
        for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert parts == expected
    others = [names[id(p)] for g in adamw.param_groups for p in g["params"]]
    assert sorted([*others, *parts]) == sorted(names.values())


def test_rates_and_momentum_follow_the_step(shards):
    """Muon's rate follows the schedule from its own peak; its momentum rises from 0.85 to 0.95 over
    300 steps.
    """
    step = make_step(new_model(), shards, optimizer="muon", muon_lr=0.02)
    for s in (1, 2, 3, 10):
        step(s)
        adamw, ours = step.optimizers
        assert adamw.param_groups[0]["lr"] == learning_rate(s, step.config)
        assert ours.param_groups[0]["lr"] == pytest.approx(2 * learning_rate(s, step.config))
        assert ours.param_groups[0]["momentum"] == pytest.approx(0.85 + 0.1 * (s - 1) / 300)
    assert muon.momentum_at(301) == muon.momentum_at(9999) == 0.95


def test_wsd_schedule():
    """Warm-up, plateau, and a line that reaches 0 one step after the last."""
    sizes = {"max_steps": 100, "warmup_steps": 10, "max_lr": 1.0, "decay_fraction": 0.2}
    config = PretrainConfig(schedule="wsd", **sizes)
    rates = [learning_rate(s, config) for s in range(1, 102)]
    assert rates[:10] == pytest.approx([s / 10 for s in range(1, 11)])
    assert rates[10:81] == [1.0] * 71
    assert rates[80:] == pytest.approx([s / 20 for s in range(20, -1, -1)])
    with pytest.raises(ValueError, match=r"decay_fraction is 1.5, expected 0 to 1"):
        PretrainConfig(decay_fraction=1.5)


def test_muons_state_continues_to_the_bit(shards):
    """Weights and state after 3 steps, put into a new model, give the same steps 4 to 6 exactly."""
    step = make_step(new_model(), shards, optimizer="muon")
    for s in (1, 2, 3):
        step(s)
    weights, state = step.snapshot()
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    expected = [step(s) for s in (4, 5, 6)]
    model = new_model()
    model.load_state_dict(weights, strict=False)
    step = make_step(model, shards, optimizer="muon")
    step.load_state(state)
    assert [step(s) for s in (4, 5, 6)] == expected


def test_zero_residual_blocks_add_nothing():
    """With zero_residual the new model's blocks are the identity, and all else is as without."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16}
    make = functools.partial(PretrainConfig, **sizes)
    zeroed, plain = (new_model_of(make(zero_residual=flag)) for flag in (True, False))
    x = torch.randn(1, 16, 32)
    for block in zeroed.transformer.h:
        assert torch.equal(block(x), x)
    for (name, a), b in zip(zeroed.named_parameters(), plain.parameters(), strict=True):
        assert name.endswith("c_proj.weight") or torch.equal(a, b)
    with pytest.raises(ValueError, match="does not go with init_from gpt2"):
        make(zero_residual=True, init_from="gpt2")


def test_nothing_for_muon(shards):
    """Where the matrices are frozen Muon is refused, with the remedy."""
    model = new_model()
    model.transformer.h.requires_grad_(False)
    with pytest.raises(ValueError, match="use adamw, or train the whole model"):
        make_step(model, shards, optimizer="muon")


def test_ranks_share_the_work(tmp_path):
    """On two ranks with whole matrices and with sharded ones, each orthogonalises a part of them,
    and steps, a skipped one among them, are those of one process.
    """
    (tmp_path / "ranks.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import torch, muon, torch.distributed as d\n"
        "from torch.distributed.tensor import distribute_tensor, Shard\n"
        "from torch.distributed.device_mesh import init_device_mesh\n"
        "plain, done = muon.orthogonalized, []\n"
        "def counted(m):\n    done.append(len(m)); return plain(m)\n"
        "muon.orthogonalized = counted\n"
        "def steps(wrap):\n"
        "    torch.manual_seed(0)\n"
        "    shapes = (72, 24), (24, 24), (24, 96)\n"
        "    ps = [torch.nn.Parameter(wrap(torch.randn(s))) for s in shapes]\n"
        "    opt = muon.Muon([{'params': ps[:1], 'parts': 3}, {'params': ps[1:]}], 0.1, 0.1)\n"
        "    for skip in (0.0, 1.0, 0.0):\n"
        "        opt.found_inf = torch.tensor(skip)\n"
        "        for p in ps: p.grad = wrap(torch.randn(p.shape))\n"
        "        opt.step()\n"
        "    return [muon.whole(p.detach()) for p in ps]\n"
        "one = steps(lambda t: t); alone = sum(done)\n"
        "d.init_process_group('gloo'); mesh = init_device_mesh('cpu', (2,))\n"
        "for wrap in (lambda t: t, lambda t: distribute_tensor(t, mesh, [Shard(0)])):\n"
        "    done.clear()\n"
        "    for a, b in zip(steps(wrap), one):\n"
        "        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)\n"
        "    assert sum(done) < alone, (done, alone)\n"
        "d.destroy_process_group()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "ranks.py"], cwd=tmp_path, capture_output=True, text=True, env=env, timeout=120
    )
    assert result.returncode == 0, result.stderr
