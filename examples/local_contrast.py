"""Local contrast as three fields compute it, each a few lines on ``local_mean2d``.

    python examples/local_contrast.py

MSCN coefficients are what BRISQUE and NIQE judge the quality of a picture by; stereo networks match
pictures by their local contrast; Jarrett et al. (ICCV 2009) divide by the deviation or its mean
over the image, whichever is larger. The picture is a ramp with two bars and noise. SciPy, where it
is installed, computes each once more. Expected, the deviations to a few hundredths:

    MSCN:    deviation 0.65, SciPy's to 1e-06: True
    stereo:  deviation 0.54, SciPy's to 1e-06: True
    Jarrett: deviation 0.69, SciPy's to 1e-06: True
"""

import numpy as np
import torch

import mnist_ops

SIZE = 7
WINDOW = mnist_ops.gaussian1d(SIZE, sigma=1 / 6, normalize=True)  # 7/6 pixels, as BRISQUE's


def deviation(x: torch.Tensor, mean: torch.Tensor, **options: str) -> torch.Tensor:
    """The root of the mean square less the square of the mean, in each neighbourhood."""
    square = mnist_ops.local_mean2d(x.square(), WINDOW, "each", **options)
    return (square - mean.square()).abs().sqrt()


def mscn(x: torch.Tensor) -> torch.Tensor:
    """Mean-subtracted, contrast-normalized: pixels from 0 to 255, 1 beside the deviation.

    The border is BRISQUE's in MATLAB; piq's coefficients are those with ``"zeros"``.
    """
    mean = mnist_ops.local_mean2d(x, WINDOW, "each", "replicate")
    return (x - mean) / (deviation(x, mean, padding_mode="replicate") + 1)


def stereo(x: torch.Tensor, eta: float = 1e-2) -> torch.Tensor:
    """Local contrast of pixels from 0 to 1, whatever the brightness of the camera."""
    mean = mnist_ops.local_mean2d(x, WINDOW, "each", "reflect")
    return (x - mean) / (deviation(x, mean, padding_mode="reflect") + eta)


def jarrett(x: torch.Tensor) -> torch.Tensor:
    """The larger of the deviation and its mean over the image divides."""
    v = x - mnist_ops.local_mean2d(x, WINDOW, padding_mode="zeros")
    sigma = mnist_ops.local_mean2d(v.square(), WINDOW, padding_mode="zeros").sqrt()
    return v / torch.maximum(sigma.mean((-2, -1), keepdim=True), sigma)


def by_scipy(name: str, x: np.ndarray) -> np.ndarray:
    """The same formulas with scipy.ndimage, on one plane."""
    from scipy import ndimage

    def mean(plane: np.ndarray) -> np.ndarray:
        mode = {"MSCN": "nearest", "stereo": "mirror", "Jarrett": "constant"}[name]
        rows = ndimage.correlate1d(plane, WINDOW.numpy(), axis=1, mode=mode)
        return ndimage.correlate1d(rows, WINDOW.numpy(), axis=0, mode=mode)

    v = x - mean(x)
    if name == "Jarrett":
        sigma = np.sqrt(mean(v * v))
        return v / np.maximum(sigma.mean(), sigma)
    return v / (np.sqrt(np.abs(mean(x * x) - mean(x) ** 2)) + (1 if name == "MSCN" else 1e-2))


def main() -> None:
    """Compute the three of one picture and compare them with SciPy's."""
    torch.manual_seed(0)
    ramp = torch.linspace(0, 0.5, 64, dtype=torch.float64).expand(48, 64).clone()
    ramp[8:40, 16:20] += 0.4
    ramp[20:24, 30:60] -= 0.2
    picture = (ramp + 0.02 * torch.randn(48, 64).double()).clamp(0, 1)[None]
    for name, function, scale in (
        ("MSCN", mscn, 255),
        ("stereo", stereo, 1),
        ("Jarrett", jarrett, 1),
    ):
        y = function(scale * picture)
        line = f"{name + ':':8} deviation {y.std():.2f}"
        try:
            other = torch.from_numpy(by_scipy(name, scale * picture[0].numpy()))
            line += f", SciPy's to 1e-06: {torch.allclose(y[0], other, rtol=0, atol=1e-6)}"
        except ImportError:
            line += ", SciPy is not installed"
        print(line)


if __name__ == "__main__":
    main()
