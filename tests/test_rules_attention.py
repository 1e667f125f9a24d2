from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from against_func import check, draw, dual
from torch.nn.attention import SDPBackend, sdpa_kernel


@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": torch.arange(5.0).double()}, {"dropout_p": 0.3}],
    ids=["plain", "causal", "scale", "mask", "dropout"],
)
def test_attention(options):
    q, k, v = draw(2, 2, 3, 4), draw(2, 2, 5, 4, seed=2), draw(2, 2, 5, 7, seed=3)
    with sdpa_kernel(SDPBackend.MATH):  # the only backend with a forward mode
        check(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options), q, k, v)
        check(lambda q: F.scaled_dot_product_attention(q, k, v, **options), q, k=1)


def test_fused_backends_have_no_forward_mode_in_pytorch():
    """The trap: torch.func.jvp fails on the backend PyTorch chooses by itself; a DualTensor does not meet it."""
    q = draw(2, 2, 5, 4)
    with pytest.raises(NotImplementedError, match="forward AD"):
        torch.func.jvp(lambda q: F.scaled_dot_product_attention(q, q, q), (q,), (q,))
    assert F.scaled_dot_product_attention(dual(q), q, q).tangents.shape == (3, 2, 2, 5, 4)
