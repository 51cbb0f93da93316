"""Compare the Triton kernel, in Triton's interpreter on a CPU, with float64. Print "equal"."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from engine.triton_loss import triton_cross_entropy_

# Rounding to 16 bits. The interpreter does not round to the nearest bf16, but towards zero.
TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-11}
# Of logits: several blocks, one incomplete block, the largest vocabulary, no rows.
SHAPES = [(5, 50257, 50304), (3, 1000, 1024), (2, 65536, 65536), (0, 1000, 1024)]

if __name__ == "__main__":
    for n, vocab_size, padded_vocab_size in SHAPES:
        for dtype, tolerance in TOLERANCE.items():
            generator = torch.Generator().manual_seed(0)
            logits = 3 * torch.randn(n, padded_vocab_size, generator=generator)
            ids = torch.randint(vocab_size, (n, 1), generator=generator)
            logits[:1].scatter_(1, ids[:1], 22.0)  # here p is 0.999 for any of the vocabularies
            logits = logits.to(dtype)
            expected = logits[:, :vocab_size].double().log_softmax(dim=-1)
            expected_log_probs = expected.gather(1, ids)
            expected = expected.exp().scatter_add(1, ids, -torch.ones_like(expected_log_probs))
            log_probs = triton_cross_entropy_(logits, ids, vocab_size)  # overwrites the logits
            torch.testing.assert_close(log_probs.double(), expected_log_probs, rtol=1e-6, atol=1e-6)
            found = logits[:, :vocab_size].double()
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-6)
            assert (logits[:, vocab_size:] == 0).all()
    print("equal")
