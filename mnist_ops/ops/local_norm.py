"""Subtractive, divisive and contrastive local normalization: everything Python knows of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._common import (
    autocast_to_float32,
    backward_jvp,
    check_floating,
    check_images,
    check_number,
    check_same_device,
    compute_type,
    direct,
    empty_images,
    register_autograd,
    register_fake,
    register_image_vmap,
)
from ._public import batch, public

_ops = torch.ops.mnist_ops
_subtractive_norm2d = direct("subtractive_norm2d")
_divisive_norm2d = direct("divisive_norm2d")
_divisive_norm2d_grad = direct("divisive_norm2d_backward")
_contrastive_norm2d = direct("contrastive_norm2d")
_contrastive_norm2d_grad = direct("contrastive_norm2d_backward")


@public(batch)
def subtractive_norm2d(input: Tensor, kernel: Tensor) -> Tensor:
    r"""Subtract from each pixel the weighted mean of its neighbourhood, over all channels.

    With :math:`u` the kernel divided by its sum and :math:`\star` the zero-padded cross-correlation
    of the same size,

    .. math:: y_c = x_c - \frac{\frac{1}{C} \sum_{c'} u \star x_{c'}}{u \star 1}

    so that the mean near the border is one over the pixels that are there. The channels are summed
    before they are blurred: one plane is blurred, not C.

    Args:
        input: images (N, C, H, W) or one image (C, H, W); float64, float32, float16 or bfloat16
            (the half types are computed in float32).
        kernel: weights of the neighbourhood, on the device of ``input``, in any floating dtype
            (normalised in float64): (k,) for the separable kernel ``outer(kernel, kernel)``, or
            (k_h, k_w); sizes odd, sum not 0. It is a constant: one that requires grad is refused.

    Returns:
        A tensor of the shape, dtype and memory format of ``input``.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: a shape is wrong, ``kernel`` has an even size or requires grad.
        RuntimeError: the kernel's sum is 0 (on the CPU; on CUDA, where checking would have to wait
            for the device, the result is then infinite or NaN), or the kernel is on the meta device
            and the input is not.

    Source:
        Torch7's ``nn.SpatialSubtractiveNormalization``. Differentiable any number of times. Under
        autocast it runs in float32.

    Example:
        >>> import torch, mnist_ops
        >>> x = torch.full((1, 3, 5, 5), 7.0)
        >>> mnist_ops.subtractive_norm2d(x, mnist_ops.gaussian1d(3)).abs().max() < 1e-5
        tensor(True)
    """
    op = "subtractive_norm2d"
    return _subtractive_norm2d(input, _checked(op, input, kernel))


@public(batch)
def divisive_norm2d(
    input: Tensor,
    kernel: Tensor,
    threshold: float | Tensor = 1e-4,
    threshold_value: float | None = None,
) -> Tensor:
    r"""Divide each pixel by the standard deviation of its neighbourhood, over all channels.

    With :math:`u` and :math:`\star` as in :func:`subtractive_norm2d`,

    .. math:: s = \frac{\sqrt{\frac{1}{C} \sum_c u \star x_c^2}}{u \star 1}, \qquad
              y_c = \frac{x_c}{d}, \qquad d = \begin{cases} s & s > \text{threshold} \\
              \text{threshold\_value} & \text{otherwise} \end{cases}

    The border correction divides the root, not what is under it: so does Torch7. The gradient
    flows through s only where s is above the threshold.

    A tensor is a threshold for each image, :math:`d = \max(s, \text{threshold})`, and has a
    gradient of its own. The images are divided by it, in one more pass over them, and normalized
    with the threshold 1, which is the same.

    Args:
        input: as in :func:`subtractive_norm2d`. The mean is taken as 0.
        kernel: as in :func:`subtractive_norm2d`.
        threshold: deviations up to here are replaced; >= 0. Or a floating-point tensor on the
            device of ``input``, (N,), or one number for all, (); for one image () or (1,). Its
            values are not looked at, which would have to wait for the device: what is below 1e-30
            (1e-290 in float64) is taken as that, NaN makes an image of NaN, and
            ``input / threshold`` must be in the range of the type that is computed in.
        threshold_value: by this, > 0 and finite in the type that is computed in; default
            ``threshold``. Not with a tensor.

    Returns:
        A tensor of the shape, dtype and memory format of ``input``.

    Raises:
        TypeError, ValueError, RuntimeError: as in :func:`subtractive_norm2d`; ValueError too for a
            threshold that is negative, a value that is not positive, a tensor that is no threshold
            for each image, or one with a value; RuntimeError for a tensor on another device.

    Source:
        Torch7's ``nn.SpatialDivisiveNormalization``. Differentiable any number of times. Under
        autocast it runs in float32.

    Example:
        >>> import torch, mnist_ops
        >>> x = torch.full((1, 3, 5, 5), 7.0, dtype=torch.float64)
        >>> y = mnist_ops.divisive_norm2d(x, mnist_ops.gaussian1d(3))
        >>> round(y[0, 0, 2, 2].item(), 6)
        1.0
    """
    op = "divisive_norm2d"
    kernel = _checked(op, input, kernel)
    if isinstance(threshold, Tensor):
        _check_image_thresholds(op, input, threshold, threshold_value)
        return _by_image(_divisive_norm2d, input, kernel, threshold)
    thresholds = check_thresholds(op, threshold, threshold_value, input.dtype)
    return _divisive_norm2d(input, kernel, *thresholds)


@public(batch)
def contrastive_norm2d(
    input: Tensor,
    kernel: Tensor,
    threshold: float | Tensor = 1e-4,
    threshold_value: float | None = None,
) -> Tensor:
    r"""Normalize local contrast: :func:`divisive_norm2d` of :func:`subtractive_norm2d`, in one.

    Args:
        input: as in :func:`subtractive_norm2d`.
        kernel: as in :func:`subtractive_norm2d`; both steps use it.
        threshold: as in :func:`divisive_norm2d`.
        threshold_value: as in :func:`divisive_norm2d`.

    Returns:
        A tensor of the shape, dtype and memory format of ``input``.

    Raises:
        TypeError, ValueError, RuntimeError: as in :func:`divisive_norm2d`.

    Source:
        Torch7's ``nn.SpatialContrastiveNormalization``; Jarrett, Kavukcuoglu, Ranzato and LeCun,
        "What is the best multi-stage architecture for object recognition?", ICCV 2009.
        Differentiable any number of times. Under autocast it runs in float32.

    Example:
        >>> import torch, mnist_ops
        >>> images = torch.rand(8, 1, 32, 32)
        >>> kernel = mnist_ops.gaussian1d(7)
        >>> mnist_ops.contrastive_norm2d(images, kernel, 1.0).shape
        torch.Size([8, 1, 32, 32])

        The threshold of Jarrett et al. is each image's mean deviation:

        >>> centred = mnist_ops.subtractive_norm2d(images, kernel)
        >>> deviation = mnist_ops.local_mean2d(centred.square(), kernel).sqrt()
        >>> mnist_ops.contrastive_norm2d(images, kernel, deviation.mean((1, 2, 3))).shape
        torch.Size([8, 1, 32, 32])
    """
    op = "contrastive_norm2d"
    kernel = _checked(op, input, kernel)
    if isinstance(threshold, Tensor):
        _check_image_thresholds(op, input, threshold, threshold_value)
        return _by_image(_contrastive_norm2d, input, kernel, threshold)
    thresholds = check_thresholds(op, threshold, threshold_value, input.dtype)
    return _contrastive_norm2d(input, kernel, *thresholds)


def check_kernel(op: str, kernel: object) -> Tensor:
    """Refuse a tensor that is no normalization kernel; return it."""
    check_floating(op, "kernel", kernel)
    assert isinstance(kernel, Tensor)
    sizes = kernel.shape
    if not 1 <= len(sizes) <= 2:
        raise ValueError(
            f"{op}: kernel must have 1 dimension (separable) or 2, got the shape {tuple(sizes)}"
        )
    if sizes[0] % 2 == 0 or sizes[-1] % 2 == 0:
        raise ValueError(f"{op}: kernel sizes must be odd, got {tuple(sizes)}")
    if kernel.requires_grad:
        raise ValueError(
            f"{op}: kernel requires grad, but no gradient with respect to it is offered; pass "
            "kernel.detach()"
        )
    return kernel


def _checked(op: str, input: Tensor, kernel: Tensor) -> Tensor:
    check_images(op, input)
    return kernel_beside(op, input, kernel)


def kernel_beside(op: str, input: Tensor, kernel: Tensor) -> Tensor:
    """Return a kernel on the device of input: one made on the CPU serves input on any device."""
    device = input.device
    if check_kernel(op, kernel).device == device:
        return kernel
    if kernel.is_meta:
        check_same_device(op, "kernel", kernel, "input", input)
    return kernel.to(device)


def check_thresholds(
    op: str, threshold: Any, value: Any, dtype: torch.dtype = torch.float64
) -> tuple[float, float]:
    """Refuse thresholds that divide by 0 or make no sense, computed with in dtype; return both."""
    threshold = check_number(op, "threshold", threshold)
    value = threshold if value is None else check_number(op, "threshold_value", value)
    if not 0 <= threshold < math.inf:
        raise ValueError(f"{op}: threshold must be >= 0 and finite, got {threshold}")
    if not 0 < value < math.inf:
        raise ValueError(
            f"{op}: threshold_value must be > 0 and finite, got {value} (it is what pixels are "
            "divided by where the deviation is not above the threshold)"
        )
    if not 1e-30 < value < 1e30 and dtype is not torch.float64:
        info = torch.finfo(torch.float32)
        if not info.smallest_normal * info.eps <= value <= info.max:
            raise ValueError(
                f"{op}: threshold_value must be > 0 and finite in float32, which {dtype} is "
                f"computed in, got {value}"
            )
    return threshold, value


def _check_image_thresholds(op: str, input: Tensor, threshold: Tensor, value: object) -> None:
    check_floating(op, "threshold", threshold)
    images = input.shape[0] if input.dim() == 4 else 1
    if threshold.dim() > 1 or (threshold.dim() == 1 and threshold.shape[0] != images):
        raise ValueError(
            f"{op}: threshold must be one number or one for each of {images} images, got the shape "
            f"{tuple(threshold.shape)}"
        )
    check_same_device(op, "threshold", threshold, "input", input)
    if value is not None:
        raise ValueError(f"{op}: threshold_value is not offered with a threshold in a tensor")


def _by_image(
    normalize: Callable[..., Tensor], input: Tensor, kernel: Tensor, threshold: Tensor
) -> Tensor:
    """Normalize images with a threshold for each: in units of it, it is 1."""
    wide = compute_type(input.dtype)
    least = 1e-290 if wide is torch.float64 else 1e-30
    units = threshold.to(wide).clamp(min=least).reshape((-1, 1, 1, 1)[: input.dim()])
    y = normalize(input.to(wide) / units, kernel, 1.0, 1.0)
    device = input.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return y if autocast else y.to(input.dtype)


# ------------------------------------------------------------------------------------------ fake


def _fake_like_input(input, *rest):
    return empty_images(input, *input.shape[-2:])


def _fake_backward_with_input(grad_output, input, *rest):
    return empty_images(input, *input.shape[-2:])


for _name in ("divisive_norm2d", "contrastive_norm2d"):
    register_fake(_name)(_fake_like_input)
for _name in ("divisive_norm2d_backward", "contrastive_norm2d_backward"):
    register_fake(_name)(_fake_backward_with_input)


# -------------------------------------------------------------------------------------- autograd


_NO_KERNEL_DERIVATIVE = "mnist_ops: local normalization offers no derivative for its kernel"


def refuse_kernel_gradient(kernel: Tensor) -> None:
    """Refuse a kernel whose gradient would silently be missing, in an operator's autograd."""
    if kernel.requires_grad:
        raise RuntimeError(_NO_KERNEL_DERIVATIVE)


def refuse_kernel_tangent(tangent: Tensor | None) -> None:
    """Refuse a kernel whose tangent would silently be dropped, in an operator's forward mode."""
    if tangent is not None:
        raise RuntimeError(_NO_KERNEL_DERIVATIVE)


def register_linear(name: str, adjoint: str) -> None:
    """Register an operator of images, a kernel and options that is linear in its images.

    ``adjoint`` names that of the same kernel and options, whose own adjoint is ``name``.
    """
    itself, transposed = direct(name), direct(adjoint)

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        refuse_kernel_gradient(inputs[1])
        ctx.save_for_backward(inputs[1])
        ctx.options = inputs[2:]

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradient = transposed(grad, *ctx.saved_tensors, *ctx.options)
        return gradient, None, *(None for _ in ctx.options)

    def jvp(ctx: Any, tangent: Tensor, kernel_tangent: Tensor | None, *_: None) -> Tensor:
        refuse_kernel_tangent(kernel_tangent)
        return itself(tangent, *ctx.saved_tensors, *ctx.options)

    register_fake(name)(_fake_like_input)
    register_autograd(name, backward, jvp, setup_context=save)
    register_image_vmap(name, images=1, other_tensors=1)


def _save_divisive(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, kernel, threshold, value = inputs
    refuse_kernel_gradient(kernel)
    ctx.save_for_backward(input, kernel)
    ctx.options = threshold, value


def _divisive_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    grad = _divisive_norm2d_grad(grad_output, *ctx.saved_tensors, *ctx.options)
    return grad, None, None, None


def _contrastive_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    grad = _contrastive_norm2d_grad(grad_output, *ctx.saved_tensors, *ctx.options)
    return grad, None, None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_output, input, kernel, threshold, value = inputs
    refuse_kernel_gradient(kernel)
    ctx.save_for_backward(grad_output, input, kernel)
    ctx.options = threshold, value


def _correlate(plane: Tensor, unit_kernel: Tensor, adjoint: bool = False) -> Tensor:
    """Return one plane per image, (N, 1, H, W), correlated with a kernel of sum 1."""
    if adjoint:
        unit_kernel = unit_kernel.flip(list(range(unit_kernel.dim())))
    if unit_kernel.dim() == 2:
        k_h, k_w = unit_kernel.shape
        return F.conv2d(plane, unit_kernel[None, None], padding=(k_h // 2, k_w // 2))
    radius = unit_kernel.shape[0] // 2
    rows = F.conv2d(plane, unit_kernel[None, None, None, :], padding=(0, radius))
    return F.conv2d(rows, unit_kernel[None, None, :, None], padding=(radius, 0))


class _Divisive:
    r"""Derivatives of divisive normalization, in PyTorch's own differentiable operators.

    With E the blurred channel mean, A its adjoint on one plane, r = E(sum_c v_c x_c) and m = 1
    where s is above the threshold: J v = v / d - x m r / (s^3 coef^2).

    All of it in float64, whatever x has: squares and third powers of float32 are in its range. The
    images are brought to a largest magnitude of 2^150 before they are squared. So 1 / s^5 is in
    range for deviations down to 10^-90 of the image's largest number: all of float32's.
    """

    LARGEST = 2.0**150

    def __init__(self, x: Tensor, kernel: Tensor, threshold: float, value: float) -> None:
        self.dtype, self.shape = x.dtype, x.shape
        x = self._widen(x)
        kernel = kernel.double()
        self.unit = kernel / kernel.sum()
        largest = x.detach().abs().amax((1, 2, 3), keepdim=True)
        self.largest = torch.where((largest > 0) & (largest < math.inf), largest, 1.0)
        self.x = x / self.largest * self.LARGEST
        self.coef = _correlate(torch.ones_like(x[:1, :1]), self.unit)
        energy = self.blur(self.x * self.x)
        # sqrt's own derivative is infinite at 0, where the convention is 0.
        positive = energy > 0
        s = torch.where(positive, energy, 1.0).sqrt() * positive / self.coef
        unscaled = s / self.LARGEST * self.largest
        self.above = (unscaled > threshold) & positive
        self.s = torch.where(self.above, s, 1.0)
        self.d = torch.where(unscaled > threshold, unscaled, value)
        self.cubed = torch.where(self.above, 1 / (self.s**3 * self.coef**2), 0.0)

    def _widen(self, tensor: Tensor) -> Tensor:
        return tensor.double().reshape(-1, *self.shape[-3:])

    def _narrow(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype).reshape(self.shape)

    def _per_unit(self, tensor: Tensor) -> Tensor:
        """Return a derivative by the scaled images as one by the images."""
        return tensor / self.largest * self.LARGEST

    def blur(self, images: Tensor) -> Tensor:
        """E: what each pixel's neighbourhood has of the mean over the channels."""
        return _correlate(images.sum(1, keepdim=True), self.unit) / self.x.shape[1]

    def adjoint(self, plane: Tensor) -> Tensor:
        """A."""
        return _correlate(plane, self.unit, adjoint=True) / self.x.shape[1]

    def first_order(self, v: Tensor) -> Tensor:
        """J v."""
        v = self._widen(v)
        along_s = self.x * self.cubed * self.blur(v * self.x)
        return self._narrow(v / self.d - self._per_unit(along_s))

    def second_order(self, v: Tensor, g: Tensor) -> Tensor:
        """The gradient of the sum of g * (J v) with respect to x; linear in v."""
        v, g = (self._per_unit(self._widen(t)) for t in (v, g))
        q = (g * self.x).sum(1, keepdim=True)
        r = self.blur(v * self.x)
        # Through s: d/ds of v.g/d is -v.g/s^2, d/ds of the other term +3 q r / (s^4 coef^2); ds/dx
        # is x A(. / (s coef^2)).
        through_s = 3 * q * r * self.cubed / self.s - (v * g).sum(1, keepdim=True) / self.s**2
        through_s = torch.where(self.above, through_s / (self.s * self.coef**2), 0.0)
        grad = self.x * self.adjoint(through_s)
        grad = grad - v * self.adjoint(q * self.cubed) - g * self.cubed * r
        return self._narrow(grad)


def _directional(v: Tensor, x: Tensor, kernel: Tensor, threshold: float, value: float) -> Tensor:
    """What the derivative of divisive normalization makes of v."""
    if x.numel() == 0:
        return v * x
    return _Divisive(x, kernel, threshold, value).first_order(v)


def _second_order(
    v: Tensor, g: Tensor, x: Tensor, kernel: Tensor, threshold: float, value: float
) -> tuple[Tensor, Tensor]:
    """Gradients of the sum of ``v * divisive_norm2d_backward(g, x)`` with respect to g and x."""
    if x.numel() == 0:
        return v * x, v * g * x
    divisive = _Divisive(x, kernel, threshold, value)
    return divisive.first_order(v), divisive.second_order(v, g)


def _divisive_double_backward(ctx: Any, grad_grad_input: Tensor) -> tuple[Tensor | None, ...]:
    grad_g, grad_x = _second_order(grad_grad_input, *ctx.saved_tensors, *ctx.options)
    return grad_g, grad_x, None, None, None


def _contrastive_second_order(
    v: Tensor, g: Tensor, x: Tensor, kernel: Tensor, threshold: float, value: float
) -> tuple[Tensor, Tensor]:
    # backward(g, x) = S^T D(g, S x), with S the subtractive normalization and D the divisive
    # gradient: the chain rule over the pieces.
    centred, v = (_ops.subtractive_norm2d(t.double(), kernel) for t in (x, v))
    grad_g, grad_centred = _second_order(v, g.double(), centred, kernel, threshold, value)
    grad_x = _ops.subtractive_norm2d_backward(grad_centred, kernel)
    return grad_g.to(x.dtype), grad_x.to(x.dtype)


def _contrastive_double_backward(ctx: Any, grad_grad_input: Tensor) -> tuple[Tensor | None, ...]:
    grad_g, grad_x = _contrastive_second_order(grad_grad_input, *ctx.saved_tensors, *ctx.options)
    return grad_g, grad_x, None, None, None


def _divisive_jvp(ctx: Any, tangent: Tensor, kernel_tangent: Tensor | None, *_: None) -> Tensor:
    refuse_kernel_tangent(kernel_tangent)
    return _directional(tangent, *ctx.saved_tensors, *ctx.options)


def _contrastive_jvp(ctx: Any, tangent: Tensor, kernel_tangent: Tensor | None, *_: None) -> Tensor:
    refuse_kernel_tangent(kernel_tangent)
    input, kernel = ctx.saved_tensors
    wide, centred = (_ops.subtractive_norm2d(t.double(), kernel) for t in (tangent, input))
    return _directional(wide, centred, kernel, *ctx.options).to(input.dtype)


def normalization_backward_jvp(name: str, second_order: Any) -> Any:
    """Return the forward mode of ``name``, whose kernel has no tangent.

    ``second_order`` is symmetric: its second result is what the input's tangent adds.
    """
    return backward_jvp(
        name,
        lambda *args: second_order(*args)[1],
        lambda tangent, kernel_tangent, *_: refuse_kernel_tangent(kernel_tangent),
    )


for _name, _backward, _jvp, _setup in (
    ("divisive_norm2d", _divisive_backward, _divisive_jvp, _save_divisive),
    ("contrastive_norm2d", _contrastive_backward, _contrastive_jvp, _save_divisive),
    (
        "divisive_norm2d_backward",
        _divisive_double_backward,
        normalization_backward_jvp("divisive_norm2d_backward", _second_order),
        _save_backward,
    ),
    (
        "contrastive_norm2d_backward",
        _contrastive_double_backward,
        normalization_backward_jvp("contrastive_norm2d_backward", _contrastive_second_order),
        _save_backward,
    ),
):
    register_autograd(_name, _backward, _jvp, setup_context=_setup)
register_linear("subtractive_norm2d", "subtractive_norm2d_backward")
register_linear("subtractive_norm2d_backward", "subtractive_norm2d")

# -------------------------------------------------------------------------------- vmap, autocast

for _name in ("divisive_norm2d", "contrastive_norm2d"):
    register_image_vmap(_name, images=1, other_tensors=1)
register_image_vmap("divisive_norm2d_backward", images=2, other_tensors=1)
register_image_vmap("contrastive_norm2d_backward", images=2, other_tensors=1)
for _name in ("subtractive_norm2d", "divisive_norm2d", "contrastive_norm2d"):
    autocast_to_float32(_name)
