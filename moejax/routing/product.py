"""The product that router logits are: of bfloat16 activations on a GPU in three parts on tensor cores, else in float32.

Letters: T tokens, D model, E experts.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Float32

IN_PARTS: bool | None = None
"""Whether bfloat16 activations meet the kernel's parts: None is where the program runs on a GPU, True is anywhere."""


def matmul(x: Float[Array, "T D"], kernel: Float32[Array, "D E"]) -> Float32[Array, "T E"]:
    """``x @ kernel`` in float32 at full precision: :func:`in_float32`, or :func:`in_parts` where that is as exact but
    for how sums are rounded, and faster. Gradients are those of :func:`in_float32` in both cases."""
    wanted = _on_gpu() if IN_PARTS is None else IN_PARTS
    if wanted and x.dtype == jnp.bfloat16:
        return in_parts(x, kernel)
    return in_float32(x, kernel)


def _on_gpu() -> bool:
    # As `kernels_pallas.dispatch.default_platform`, which routers know nothing of.
    device = jax.config.jax_default_device
    if device is None:
        return jax.default_backend() == "gpu"
    return (device if isinstance(device, str) else device.platform) in ("gpu", "cuda", "rocm")


def in_float32(x: Float[Array, "T D"], kernel: Float32[Array, "D E"]) -> Float32[Array, "T E"]:
    """The product of the activations cast to float32. A GPU makes it without tensor cores."""
    return jnp.dot(x.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)


@jax.custom_vjp
def in_parts(x: BFloat16[Array, "T D"], kernel: Float32[Array, "D E"]) -> Float32[Array, "T E"]:
    """``x @ a + (x @ b + x @ c)`` with the :func:`parts` of the kernel, accumulated in float32.

    The parts sum to the kernel and a product of two bfloat16 numbers is exact in float32, so only sums are inexact, as
    they are in :func:`in_float32`. What is not finite is what ``x @ a`` has there: an infinity times a part of 0 would
    otherwise make NaN of infinite logits.
    """
    made = jnp.einsum(
        "td,dpe->tpe", x, parts(kernel), precision=jax.lax.Precision.DEFAULT, preferred_element_type=jnp.float32
    )
    leading = made[:, 0]
    return jnp.where(jnp.isfinite(leading), leading + (made[:, 1] + made[:, 2]), leading)


def parts(kernel: Float32[Array, "D E"]) -> BFloat16[Array, "D 3 E"]:
    """bfloat16 ``a``, ``b`` and ``c`` with ``a + b + c`` the kernel: 8 of the 24 bits of each number in each.

    Not so from 3.4e38 on, which bfloat16 rounds to infinity, nor below 1e-31, where ``c`` may be a subnormal number,
    which not every device keeps. With an axis for the parts a kernel that is split over devices stays split as it was.
    """
    # Casts to bfloat16 and back would not do: XLA may leave them out, and then b and c are 0.
    a = jax.lax.reduce_precision(kernel, exponent_bits=8, mantissa_bits=7)
    b = jax.lax.reduce_precision(kernel - a, exponent_bits=8, mantissa_bits=7)
    return jnp.stack([part.astype(jnp.bfloat16) for part in (a, b, kernel - a - b)], axis=1)


def _fwd(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return in_parts(x, kernel), (x, kernel)


def _bwd(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    return jax.vjp(in_float32, *saved)[1](dy)


in_parts.defvjp(_fwd, _bwd)
