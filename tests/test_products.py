"""Products in bfloat16: float32 sums on CPUs, in both directions; plain products elsewhere."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softprompt_jax.models.products import matmul

CASES = {"matrices": ((5, 8), (8, 7)), "batches": ((2, 3, 5, 8), (2, 3, 8, 7)), "shared": ((2, 3, 5, 8), (2, 1, 8, 7))}


def arrays(shapes, dtype):
    return [jax.random.normal(jax.random.key(n), shape).astype(dtype) for n, shape in enumerate(shapes)]


@pytest.mark.parametrize("made", [None, "float32"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_a_product_and_its_gradients_are_those_of_numpy(case, dtype, made):
    a, b = arrays(CASES[case], dtype)
    back = jnp.ones((*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), 5, 7)) * jnp.arange(1, 8)
    found, pull = jax.vjp(lambda a, b: matmul(a, b, made), a, b)
    assert found.dtype == (made or dtype)
    exact, pull_exact = jax.vjp(jnp.matmul, a.astype("float32"), b.astype("float32"))
    near = 1e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(found.astype("float32"), exact, rtol=near, atol=20 * near)
    for one, other in zip(pull(back.astype(found.dtype)), pull_exact(back), strict=True):
        assert one.dtype == dtype
        np.testing.assert_allclose(one.astype("float32"), other, rtol=near, atol=20 * near)


def test_cpus_sum_bfloat16_in_float32_forth_and_back_and_other_devices_have_the_plain_product():
    a, b = arrays(CASES["matrices"], "bfloat16")
    step = jax.jit(jax.value_and_grad(lambda a, b: matmul(a, b).astype("float32").sum(), argnums=(0, 1)))

    def results(platform):
        text = step.trace(a, b).lower(lowering_platforms=(platform,)).as_text()
        return re.findall(r"dot_general.*\(tensor<\w+xbf16>, tensor<\w+xbf16>\) -> tensor<\d+x\d+x(\w+)>", text)

    assert results("cpu") == ["f32"] * 3
    assert results("tpu") == results("cuda") == ["bf16"] * 3
