"""Augmentation: rotation by random angles and Gaussian noise as in report 2, affine maps.

The transforms draw from a :class:`mnist_ops.torch7.Generator`, sample by sample in order, so that a
run with augmentation has its digits too. They go into ``transform=`` of
:func:`mnist_ops.training.fit`, whose checkpoints hold the generator's state::

    >>> generator = torch7.start(seed=1, data_kernel_size=None)
    >>> model = models.convnet(dtype=torch.float64, generator=generator)
    >>> turn = transforms.RandomRotation(0.2, generator)          # report 2's best: 11.46 degrees
    >>> history = training.fit(model, ..., generator=generator, transform=turn)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._common import check_finite
from ..torch7 import Generator

__all__ = ["Compose", "GaussianNoise", "RandomAffine", "RandomRotation", "affine", "rotate"]

INTERPOLATIONS = ("nearest", "bilinear")


def _check_images(name: str, images: Tensor) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(f"{name}: images must be a Tensor, got {type(images)}")
    if images.dim() != 4:
        raise ValueError(f"{name}: images must be (N, C, H, W), got shape {tuple(images.shape)}")
    if not images.is_floating_point():
        raise TypeError(f"{name}: images must be floating point, got {images.dtype}")


def _check_interpolation(name: str, interpolation: str) -> None:
    if interpolation not in INTERPOLATIONS:
        raise ValueError(
            f"{name}: interpolation must be 'nearest' or 'bilinear', got {interpolation!r}"
        )


def _one_per_image(name: str, what: str, value: Tensor, images: Tensor, *shape: int) -> Tensor:
    """An argument that has a ``shape`` for each image, on the images' device."""
    _check_images(name, images)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value)
        raise TypeError(f"{name}: {what} must be a floating point Tensor, got {kind}")
    expected = (len(images), *shape)
    if value.shape != expected:
        raise ValueError(
            f"{name}: {what} must be {expected}, one per image, got shape {tuple(value.shape)}"
        )
    return value.detach().to(images.device)


def rotate(
    images: Tensor, angles: Tensor, interpolation: str = "nearest", fill: float = 0.0
) -> Tensor:
    r"""Rotate every image about its centre by an angle of its own, anticlockwise where > 0.

    With the centre :math:`c_x = (W - 1)/2,\ c_y = (H - 1)/2`, the output's pixel in column i and
    row j comes from column u and row v of the input,

    .. math::
        u = \cos\theta\,(i - c_x) - \sin\theta\,(j - c_y) + c_x, \qquad
        v = \cos\theta\,(j - c_y) + \sin\theta\,(i - c_x) + c_y.

    ``"nearest"`` takes the pixel at u and v rounded, halves away from zero, and ``fill`` where that
    is outside. Angles, sines, cosines and coordinates are float32 in every dtype, one rounding per
    operation: this is Torch7's ``image.rotate(image, theta, 'simple')``, pixel by pixel. (Torch7
    also rounds the pixels to float32; here they are copied.)

    ``"bilinear"`` interpolates between four pixels, those outside being ``fill``, as torchvision's
    ``rotate(image, degrees, BILINEAR)`` does with ``fill=None``, in the images' dtype (half types
    in float32). Torch7's own ``'bilinear'``, in float32, agrees where all four are inside; at the
    border it repeats the outermost pixels for half a pixel more and is 0 beyond.

    Args:
        images: floating point, ``(N, C, H, W)``.
        angles: floating point, ``(N,)``, in radians. Moved to the images' device.
        interpolation: ``"nearest"`` or ``"bilinear"``.
        fill: the value outside. The reports' is 0, which is brighter than the normalised digits'
            background.

    Returns:
        The same shape, dtype and device. An image's result does not depend on the others. Gradients
        flow to ``images``, not to ``angles``.

    Raises:
        TypeError, ValueError: for a tensor of another kind or shape, an unknown interpolation, a
            ``fill`` that is no finite number.

    Source: report 2, "Data Augmentation"; Torch7's ``image.rotate``.

    Example::

        >>> rotate(torch.arange(9.0).view(1, 1, 3, 3), torch.tensor([math.pi / 2])).view(3, 3)
        tensor([[2., 5., 8.],
                [1., 4., 7.],
                [0., 3., 6.]])
    """
    angles = _one_per_image("rotate", "angles", angles, images)
    _check_interpolation("rotate", interpolation)
    fill = check_finite("rotate", "fill", fill)
    if images.numel() == 0:
        return images.clone()
    if interpolation == "nearest":
        return _rotate_nearest(images, angles, fill)
    theta = angles.double()
    cos, sin, zero = theta.cos(), theta.sin(), torch.zeros_like(theta)
    rows = [torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)]
    return _warp(images, torch.stack(rows, 1), fill)


def _rotate_nearest(images: Tensor, angles: Tensor, fill: float) -> Tensor:
    count, channels, height, width = images.shape
    # Torch7 takes theta as float and its sine and cosine by sinf and cosf, which round right.
    theta = angles.float().double().view(-1, 1, 1)
    cos, sin = theta.cos().float(), theta.sin().float()
    centre_x, centre_y = (width - 1) / 2, (height - 1) / 2
    x = torch.arange(width, dtype=torch.float32, device=images.device) - centre_x
    y = (torch.arange(height, dtype=torch.float32, device=images.device) - centre_y).unsqueeze(1)
    column = _round(cos * x - sin * y + centre_x)
    row = _round(cos * y + sin * x + centre_y)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    # An angle that is not a number lands outside, as in Torch7, since its comparisons are false.
    index = torch.where(inside, row * width + column, 0).long().view(count, 1, height * width)
    turned = images.reshape(count, channels, -1).gather(2, index.expand(-1, channels, -1))
    return turned.view(images.shape).where(inside.unsqueeze(1), fill)


def _round(x: Tensor) -> Tensor:
    """C's round: halves away from zero. torch.round would take them to the even neighbour."""
    whole = x.trunc()
    return whole + x.sign() * ((x - whole).abs() >= 0.5)


def _warp(images: Tensor, matrices: Tensor, fill: float) -> Tensor:
    """Bilinear; the float64 matrices map the output's pixels to the input's about the centre."""
    height, width = images.shape[-2:]
    dtype = images.dtype if images.dtype == torch.float64 else torch.float32
    (a, b, c), (d, e, f) = (row.unbind(1) for row in matrices.unbind(1))
    # grid_sample wants coordinates in which the image reaches from -1 to 1.
    rows = (a, b * height / width, 2 * c / width), (d * width / height, e, 2 * f / height)
    matrix = torch.stack([torch.stack(row, 1) for row in rows], 1).to(dtype)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    # Outside, grid_sample has zeros.
    shifted = images.to(dtype) - fill
    return F.grid_sample(shifted, grid, align_corners=False).add(fill).to(images.dtype)


def affine(images: Tensor, matrices: Tensor, fill: float = 0.0) -> Tensor:
    r"""Take every image's pixels from where a matrix of its own says, bilinearly.

    As :func:`rotate`, whose matrix has the cosine on its diagonal, but with

    .. math::
        u = m_{00}(i - c_x) + m_{01}(j - c_y) + m_{02} + c_x, \qquad
        v = m_{10}(i - c_x) + m_{11}(j - c_y) + m_{12} + c_y.

    Args:
        images: floating point, ``(N, C, H, W)``.
        matrices: floating point, ``(N, 2, 3)``, the last column in pixels. Moved to the images'
            device.
        fill: the value outside.

    Returns:
        The same shape, dtype and device, computed in float64 for float64 and in float32 otherwise.
        Gradients flow to ``images``, not to ``matrices``.

    Raises:
        TypeError, ValueError: for a tensor of another kind or shape, a ``fill`` that is no finite
            number.

    Example::

        >>> left = torch.tensor([[[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]])
        >>> affine(torch.arange(9.0).view(1, 1, 3, 3), left).view(3, 3)
        tensor([[1., 2., 0.],
                [4., 5., 0.],
                [7., 8., 0.]])
    """
    matrices = _one_per_image("affine", "matrices", matrices, images, 2, 3)
    fill = check_finite("affine", "fill", fill)
    return _warp(images, matrices.double(), fill) if images.numel() else images.clone()


class _RandomTransform(nn.Module):
    """A transform that uses a fixed number of normal numbers per sample.

    Attributes:
        batched: a batch gives the same bits, and leaves the generator in the same state, as its
            samples one at a time in order. :class:`mnist_ops.training.OptimizerEngine`
            therefore hands over many samples at once.
    """

    batched = True
    #: The attributes that :meth:`extra_repr` shows.
    shown: tuple[str, ...] = ("std",)

    def __init__(self, std: float, generator: Generator) -> None:
        super().__init__()
        name = type(self).__name__
        self.std = check_finite(name, "std", std, 0)
        if not isinstance(generator, Generator):
            raise TypeError(f"{name}: generator must be a torch7.Generator, got {type(generator)}")
        self.generator = generator

    def count(self, images: Tensor) -> int:
        """How many numbers a sample of ``images`` uses."""
        raise NotImplementedError

    def apply_numbers(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Transform ``images`` with the standard normal ``numbers``, float64 ``(N, count)``."""
        raise NotImplementedError

    def draw(self, images: Tensor) -> Tensor:
        """The standard normal numbers for these samples, float64 ``(N, count)``."""
        return self.generator.normal(size=(len(images), self.count(images)))

    def forward(self, images: Tensor) -> Tensor:
        """Transform ``(N, C, H, W)`` to the same shape."""
        _check_images(type(self).__name__, images)
        return self.apply_numbers(images, self.draw(images))

    def extra_repr(self) -> str:
        """Return the arguments, as in the constructor."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self.shown)


class RandomRotation(_RandomTransform):
    """Rotate each image by an angle drawn from a normal distribution. See :func:`rotate`.

    For each sample in turn the angle is ``generator.normal(0, std)``, in radians.

    Args:
        std: standard deviation of the angles, >= 0. Report 2's best is 0.2.
        generator: shared with the rest of the run. It is not part of the ``state_dict``.
        interpolation: ``"nearest"``, the reports', or ``"bilinear"``.

    Raises:
        TypeError, ValueError: for an impossible argument.
    """

    shown = ("std", "interpolation")

    def __init__(self, std: float, generator: Generator, interpolation: str = "nearest") -> None:
        super().__init__(std, generator)
        _check_interpolation("RandomRotation", interpolation)
        self.interpolation = interpolation

    def count(self, images: Tensor) -> int:
        """One angle."""
        return 1

    def apply_numbers(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Rotate by ``std * numbers``."""
        return rotate(images, numbers.squeeze(1) * self.std, self.interpolation)


class GaussianNoise(_RandomTransform):
    """Add ``generator.normal(0, std)`` to every pixel, sample by sample, row-major.

    Report 2 tried "a random gaussian noise" without giving its strength.

    Args:
        std: standard deviation of the noise, >= 0; the normalised digits' own is 1.
        generator: shared with the rest of the run. It is not part of the ``state_dict``.

    Raises:
        TypeError, ValueError: for an impossible argument.
    """

    def count(self, images: Tensor) -> int:
        """One number per pixel."""
        return images[0].numel() if len(images) else 0

    def apply_numbers(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Add ``std * numbers``."""
        return images + (numbers * self.std).view(images.shape).to(images)


class RandomAffine(_RandomTransform):
    r"""Rotate, scale, shear and shift each image at random, in one interpolation.

    For each sample in turn five numbers :math:`z` are drawn from ``generator.normal()``. With
    :math:`\theta = rotation \cdot z_0`, the factor :math:`s = \exp(scale \cdot z_1)`, the shear
    :math:`k = shear \cdot z_2` and the shift :math:`shift \cdot (z_3, z_4)` the pixels come from

    .. math::
        \frac{1}{s} \begin{pmatrix} \cos\theta & -\sin\theta \\ \sin\theta & \cos\theta
        \end{pmatrix} \begin{pmatrix} 1 & k \\ 0 & 1 \end{pmatrix}

    times their place about the centre, and the shift; see :func:`affine`.

    Args:
        generator: shared with the rest of the run. It is not part of the ``state_dict``.
        rotation: standard deviation of the angles in radians, >= 0 as all of these.
        scale: of the size's logarithm; 0.08 is about 8 %.
        shear: of the columns' shift for each row.
        shift: of the shifts in pixels.
        fill: the value outside; 0 is the background of digits with local normalization.

    Raises:
        TypeError, ValueError: for an impossible argument.
    """

    shown = ("rotation", "scale", "shear", "shift", "fill")

    def __init__(
        self,
        generator: Generator,
        rotation: float = 0.0,
        scale: float = 0.0,
        shear: float = 0.0,
        shift: float = 0.0,
        fill: float = 0.0,
    ) -> None:
        given = {"rotation": rotation, "scale": scale, "shear": shear, "shift": shift}
        numbers = [check_finite("RandomAffine", name, value, 0) for name, value in given.items()]
        super().__init__(numbers[0], generator)
        self.rotation, self.scale, self.shear, self.shift = numbers
        self.fill = check_finite("RandomAffine", "fill", fill)

    def count(self, images: Tensor) -> int:
        """Angle, size, shear and two shifts."""
        return 5

    def apply_numbers(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Transform by the matrices that the numbers make."""
        angle, size, slope, right, down = numbers.unbind(1)
        angle, slope = angle * self.rotation, slope * self.shear
        larger = torch.exp(-size * self.scale)
        cos, sin = angle.cos() * larger, angle.sin() * larger
        rows = [
            torch.stack([cos, cos * slope - sin, right * self.shift], 1),
            torch.stack([sin, sin * slope + cos, down * self.shift], 1),
        ]
        return affine(images, torch.stack(rows, 1), self.fill)


class Compose(nn.Module):
    """Apply transforms one after the other, each sample's random numbers drawn together.

    For a batch the order is: all transforms' numbers for the first sample, then all of the second
    sample's, and so on, as if the samples came one at a time. The batch size therefore changes
    neither the numbers nor the result.

    Args:
        transforms: those of this module, or any function of ``(N, C, H, W)``.

    Attributes:
        batched: whether a batch is transformed as a whole, to the same bits: by transforms of this
            module that draw from one generator.

    Example::

        >>> both = Compose(RandomRotation(0.2, generator), GaussianNoise(0.1, generator))
    """

    def __init__(self, *transforms: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.transforms: list[Any] = []
        for i, transform in enumerate(transforms):
            if not callable(transform):
                raise TypeError(f"Compose: transform {i} must be callable, got {transform!r}")
            parts = transform.transforms if isinstance(transform, Compose) else [transform]
            self.transforms.extend(parts)
        generators = {id(getattr(part, "generator", None)) for part in self.transforms}
        known = all(isinstance(part, _RandomTransform) for part in self.transforms)
        self.batched = known and len(generators) < 2

    def forward(self, images: Tensor) -> Tensor:
        """Transform ``(N, C, H, W)``."""
        _check_images("Compose", images)
        if not self.batched:
            if len(images) > 1:
                return torch.cat([self(image) for image in images.split(1)])
            for transform in self.transforms:
                images = transform(images)
            return images
        return self.apply_numbers(images, self.draw(images))

    def draw(self, images: Tensor) -> Tensor:
        """The numbers of all transforms, side by side, if they are ``batched``."""
        if not self.transforms:
            return torch.empty(len(images), 0, dtype=torch.float64, device="cpu")
        count = sum(part.count(images) for part in self.transforms)
        numbers: Tensor = self.transforms[0].generator.normal(size=(len(images), count))
        return numbers

    def apply_numbers(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Transform with the numbers that :meth:`draw` returned."""
        counts = [part.count(images) for part in self.transforms]
        for part, own in zip(self.transforms, numbers.split(counts, 1), strict=True):
            images = part.apply_numbers(images, own)
        return images

    def extra_repr(self) -> str:
        """Return the transforms, one per line."""
        return "\n".join(map(str, self.transforms))
