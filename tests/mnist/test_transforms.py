"""Rotation and noise: Torch7's vectors, torchvision, loops, and the order of the random numbers."""

import math

import numpy as np
import pytest
import torch
from conftest import torch7_cases, torch7_tensor

from mnist_ops import torch7, training
from mnist_ops.mnist import data, models
from mnist_ops.mnist.transforms import (
    Compose,
    GaussianNoise,
    RandomAffine,
    RandomRotation,
    affine,
    rotate,
)
from mnist_ops.torch7 import Generator, optim
from mnist_ops.training import OptimizerEngine

CASES = torch7_cases("rotate")


def vector(case):
    images = torch7_tensor(case["input"]).unsqueeze(0)
    return images, torch.tensor([case["theta"]], dtype=torch.float64)


def nearest_loops(image, theta):
    """Pixel by pixel in NumPy's float32, which rounds after every operation; image (C, H, W)."""
    height, width = image.shape[-2:]
    theta = float(np.float32(theta))
    cos, sin = np.float32(math.cos(theta)), np.float32(math.sin(theta))
    cx, cy = np.float32((width - 1) / 2), np.float32((height - 1) / 2)

    def c_round(value):
        return math.copysign(math.floor(abs(value) + 0.5), value)

    result = np.zeros_like(image)
    for j in range(height):
        for i in range(width):
            x, y = np.float32(i) - cx, np.float32(j) - cy
            column = int(c_round(float(cos * x - sin * y + cx)))
            row = int(c_round(float(cos * y + sin * x + cy)))
            if 0 <= column < width and 0 <= row < height:
                result[:, j, i] = image[:, row, column]
    return result


def torch7_bilinear_loops(image, theta):
    """Torch7's own rule at the border: blank where rounding leads outside, else clamped."""
    height, width = image.shape
    cx, cy = (width - 1) / 2, (height - 1) / 2
    result = np.zeros_like(image)
    inner = np.zeros(image.shape, dtype=bool)
    for j in range(height):
        for i in range(width):
            u = math.cos(theta) * (i - cx) - math.sin(theta) * (j - cy) + cx
            v = math.cos(theta) * (j - cy) + math.sin(theta) * (i - cx) + cy
            inner[j, i] = 0 <= u <= width - 1 and 0 <= v <= height - 1
            if not (-0.5 < u < width - 0.5 and -0.5 < v < height - 0.5):
                continue
            u, v = min(max(u, 0), width - 1), min(max(v, 0), height - 1)
            i0, j0 = min(int(u), width - 2), min(int(v), height - 2)
            a, b = u - i0, v - j0
            top = (1 - a) * image[j0, i0] + a * image[j0, i0 + 1]
            bottom = (1 - a) * image[j0 + 1, i0] + a * image[j0 + 1, i0 + 1]
            result[j, i] = (1 - b) * top + b * bottom
    return result, inner


class TestRotate:
    @pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["theta"]))
    def test_nearest_is_torch7s(self, case, device):
        images, theta = vector(case)
        expected = torch7_tensor(case["simple"]).unsqueeze(0)
        # Torch7 hands each pixel through a float; before that they are the input's own.
        for dtype in (torch.float64, torch.float32):
            result = rotate(images.to(device, dtype), theta)
            assert result.dtype == dtype and result.device.type == device
            assert torch.equal(result.float().cpu(), expected.float())

    @pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["theta"]))
    def test_bilinear_is_torch7s_inside(self, case):
        images, theta = vector(case)
        theirs = torch7_tensor(case["bilinear"])[0].numpy()
        explained, inner = torch7_bilinear_loops(images[0, 0].numpy(), case["theta"])
        np.testing.assert_allclose(explained, theirs, atol=2e-6)  # the rule that we document
        ours = rotate(images, theta, "bilinear")[0, 0].numpy()
        assert 50 <= inner.sum() < inner.size
        np.testing.assert_allclose(ours[inner], theirs[inner], atol=2e-6)
        assert np.abs(ours - theirs)[~inner].max() > 0.05

    @pytest.mark.parametrize("shape", [(2, 7, 10), (1, 9, 4), (1, 32, 32), (1, 1, 1)])
    def test_nearest_is_that_of_loops(self, shape):
        images = torch.rand(12, *shape, dtype=torch.float64) + 0.5  # nothing is 0 by itself
        # A quarter turn puts pixels at halves where one side is even; far angles show the rounding
        # of theta itself.
        special = [0.0, math.pi / 2, -math.pi / 2, 4000.1234567]
        angles = torch.cat([torch.randn(8), torch.tensor(special, dtype=torch.float64)])
        result = rotate(images, angles)
        for image, theta, turned in zip(images, angles, result, strict=True):
            np.testing.assert_array_equal(turned, nearest_loops(image.numpy(), float(theta)))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
    def test_every_dtype_takes_the_same_pixels(self, dtype):
        images = torch.randint(0, 200, (5, 1, 12, 12)).double()
        angles = torch.randn(5, dtype=torch.float64)
        result = rotate(images.to(dtype), angles)
        assert result.dtype == dtype and torch.equal(result.double(), rotate(images, angles))
        bilinear = rotate(images.to(dtype), angles, "bilinear")
        assert bilinear.dtype == dtype
        expected = rotate(images, angles, "bilinear")
        torch.testing.assert_close(bilinear.double(), expected, rtol=1e-2, atol=1.0)

    @pytest.mark.parametrize("size", [(31, 28), (8, 32), (32, 32)])
    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-5)]
    )
    def test_bilinear_is_torchvisions(self, size, dtype, tolerance):
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2.functional import rotate as torchvision_rotate

        images = torch.randn(8, 2, *size, dtype=dtype)
        angles = torch.randn(8, dtype=torch.float64)

        def theirs(images, **options):
            return torch.stack(
                [
                    torchvision_rotate(
                        image, math.degrees(t), InterpolationMode.BILINEAR, **options
                    )
                    for image, t in zip(images, angles, strict=True)
                ]
            )

        # torchvision computes its matrix in float64 but applies it in the images' dtype.
        close = {"rtol": 0, "atol": tolerance}
        torch.testing.assert_close(rotate(images, angles, "bilinear"), theirs(images), **close)
        # A value outside: torchvision's fill darkens the border twice, so shift the values here.
        filled = rotate(images, angles, "bilinear", fill=3.0)
        torch.testing.assert_close(filled, theirs(images - 3.0) + 3.0, **close)
        whole = theirs(torch.ones_like(images)) > 1 - 1e-6
        expected = theirs(images, fill=3.0)
        torch.testing.assert_close(filled[whole], expected[whole], **close)

    def test_both_rotate_anticlockwise(self):
        image = torch.zeros(1, 1, 9, 9)
        image[0, 0, 4, 8] = 1.0  # right of the centre
        for interpolation in ("nearest", "bilinear"):
            turned = rotate(image, torch.tensor([math.pi / 2]), interpolation)
            assert turned.argmax() == 4 and turned[0, 0, 0, 4] > 0.99  # above it

    def test_fill(self):
        images = torch.ones(2, 1, 10, 10)
        angles = torch.tensor([math.pi / 4, 0.0])
        result = rotate(images, angles, fill=-7.0)
        assert result[0, 0, 0, 0] == -7.0 and (result[1] == 1.0).all()
        assert set(result.unique().tolist()) == {-7.0, 1.0}

    @pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
    def test_a_batch_is_its_images(self, interpolation):
        images = torch.randn(300, 1, 32, 32)
        angles = torch.randn(300, dtype=torch.float64)
        together = rotate(images, angles, interpolation)
        alone = [rotate(images[i : i + 1], angles[i : i + 1], interpolation) for i in range(300)]
        assert torch.equal(together, torch.cat(alone))

    @pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
    def test_layouts_empty_and_gradients(self, interpolation):
        images = torch.randn(3, 2, 6, 5, dtype=torch.float64)
        angles = torch.tensor([0.3, -1.0, 2.0])
        expected = rotate(images, angles, interpolation)
        last = images.to(memory_format=torch.channels_last)
        torch.testing.assert_close(rotate(last, angles, interpolation), expected)
        part = torch.randn(3, 4, 6, 10, dtype=torch.float64)
        part[:, ::2, :, ::2] = images
        torch.testing.assert_close(rotate(part[:, ::2, :, ::2], angles, interpolation), expected)
        for shape in [(0, 1, 4, 4), (2, 0, 4, 4), (2, 1, 0, 4)]:
            empty = rotate(torch.ones(shape), torch.zeros(shape[0]), interpolation)
            assert empty.shape == shape
        wanted = images.requires_grad_()
        assert torch.autograd.gradcheck(lambda x: rotate(x, angles, interpolation, 0.5), wanted)

    def test_angles_that_are_no_numbers(self):
        images = torch.ones(2, 1, 4, 4)
        result = rotate(images, torch.tensor([math.nan, math.inf]), fill=5.0)
        assert (result == 5.0).all()

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ((np.ones((1, 1, 4, 4)), torch.ones(1)), TypeError, "images must be a Tensor, got"),
            ((torch.ones(1, 4, 4), torch.ones(1)), ValueError, r"\(N, C, H, W\), got shape \(1, 4"),
            ((torch.ones(1, 1, 4, 4).int(), torch.ones(1)), TypeError, "floating point, got torch"),
            ((torch.ones(2, 1, 4, 4), torch.ones(1)), ValueError, r"must be \(2,\), one per image"),
            ((torch.ones(1, 1, 4, 4), torch.ones(1).int()), TypeError, "angles must be a floating"),
            ((torch.ones(1, 1, 4, 4), 0.5), TypeError, "angles must be a floating point Tensor"),
            ((torch.ones(1, 1, 4, 4), torch.ones(1), "cubic"), ValueError, "'bilinear', got 'cubi"),
            ((torch.ones(1, 1, 4, 4), torch.ones(1), "nearest", math.nan), ValueError, "fill must"),
            (
                (torch.ones(1, 1, 4, 4), torch.ones(1), "nearest", "0"),
                TypeError,
                "fill must be a n",
            ),
        ],
    )
    def test_arguments(self, arguments, error, message):
        with pytest.raises(error, match=f"rotate: .*{message}"):
            rotate(*arguments)


def affine_loops(image, matrix, fill):
    """Pixel by pixel in float64; image (C, H, W)."""
    channels, height, width = image.shape
    cx, cy = (width - 1) / 2, (height - 1) / 2

    def pixel(c, j, i):
        return image[c, j, i] if 0 <= i < width and 0 <= j < height else fill

    result = np.zeros_like(image)
    for c in range(channels):
        for j in range(height):
            for i in range(width):
                u, v = matrix @ np.array([i - cx, j - cy, 1.0]) + np.array([cx, cy])
                i0, j0 = math.floor(u), math.floor(v)
                a, b = u - i0, v - j0
                top = (1 - a) * pixel(c, j0, i0) + a * pixel(c, j0, i0 + 1)
                bottom = (1 - a) * pixel(c, j0 + 1, i0) + a * pixel(c, j0 + 1, i0 + 1)
                result[c, j, i] = (1 - b) * top + b * bottom
    return result


class TestAffine:
    @pytest.mark.parametrize("shape", [(2, 7, 10), (1, 12, 5), (1, 1, 1)])
    def test_is_that_of_loops(self, shape):
        images = torch.randn(8, *shape, dtype=torch.float64)
        matrices = torch.eye(2, 3, dtype=torch.float64) + 0.4 * torch.randn(8, 2, 3).double()
        matrices[:, :, 2] *= 3
        results = affine(images, matrices, 0.7)
        for image, matrix, result in zip(images, matrices, results, strict=True):
            expected = affine_loops(image.numpy(), matrix.numpy(), 0.7)
            np.testing.assert_allclose(result.numpy(), expected, rtol=1e-10, atol=1e-10)
        close = affine(images.float(), matrices, 0.7)
        torch.testing.assert_close(close.double(), results, rtol=0, atol=2e-4)

    def test_a_rotation_is_one(self):
        images, angles = torch.randn(5, 1, 8, 11).double(), torch.randn(5, dtype=torch.float64)
        cos, sin, zero = angles.cos(), angles.sin(), torch.zeros(5, dtype=torch.float64)
        matrices = torch.stack([cos, -sin, zero, sin, cos, zero], 1).view(5, 2, 3)
        assert torch.equal(affine(images, matrices), rotate(images, angles, "bilinear"))

    def test_whole_pixels_gradients_and_nothing(self):
        images = torch.randn(2, 1, 6, 7, dtype=torch.float64, requires_grad=True)
        matrices = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]]).expand(2, 2, 3)
        moved = affine(images, matrices)
        torch.testing.assert_close(moved[:, :, 1:, :-2], images[:, :, :-1, 2:])
        assert (moved[:, :, 0].abs() < 1e-12).all()
        assert torch.autograd.gradcheck(lambda x: affine(x, matrices, 0.3), images)
        assert affine(images[:0], matrices[:0]).shape == (0, 1, 6, 7)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ((torch.ones(3, 3), torch.ones(1, 2, 3)), ValueError, r"must be \(N, C, H, W\)"),
            ((torch.ones(2, 1, 3, 3), torch.ones(1, 2, 3)), ValueError, r"\(2, 2, 3\), one per"),
            ((torch.ones(1, 1, 3, 3), torch.ones(1, 2, 3).long()), TypeError, "got torch.int64"),
            ((torch.ones(1, 1, 3, 3), torch.ones(1, 2, 3), math.nan), ValueError, "fill must be"),
        ],
    )
    def test_arguments(self, arguments, error, message):
        with pytest.raises(error, match=f"affine: .*{message}"):
            affine(*arguments)


def state(generator):
    return [
        x.tolist() if isinstance(x, torch.Tensor) else x for x in generator.get_state().values()
    ]


def pipelines(seed=3):
    """Every transform, with the generators that it draws from."""
    one, two = Generator(seed), Generator(seed + 1)
    return [
        (RandomRotation(0.2, one), [one]),
        (RandomRotation(0.2, two, "bilinear"), [two]),
        (GaussianNoise(0.3, g := Generator(5)), [g]),
        (Compose(RandomRotation(0.2, g := Generator(6)), GaussianNoise(0.3, g)), [g]),
        (
            Compose(
                RandomRotation(0.2, g := Generator(7)),
                GaussianNoise(0.1, h := Generator(8)),
                Compose(GaussianNoise(0.3, g), RandomRotation(0.1, h)),
            ),
            [g, h],
        ),
        (Compose(RandomRotation(0.2, g := Generator(9)), lambda x: x + g.uniform().to(x)), [g]),
        (Compose(), []),
        (RandomAffine(g := Generator(10), 0.2, 0.1, 0.2, 1.5), [g]),
    ]


class TestRandom:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("index", range(len(pipelines())))
    def test_batches_of_any_size_give_the_same_bits(self, index, dtype):
        images = torch.randn(21, 1, 9, 11, dtype=dtype)
        results, states = [], []
        for size in (1, 4, 21):
            transform, generators = pipelines()[index]
            results.append(torch.cat([transform(batch) for batch in images.split(size)]))
            states.append([state(generator) for generator in generators])
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
        assert states[0] == states[1] == states[2]
        assert results[0].dtype == dtype and results[0].shape == images.shape

    def test_angles_are_drawn_per_sample(self):
        images = torch.randn(7, 1, 12, 12)
        transform = RandomRotation(0.2, Generator(4))
        generator = Generator(4)
        angles = torch.cat([generator.normal(0, 0.2) for _ in range(7)])
        assert torch.equal(transform(images), rotate(images, angles))
        assert not torch.equal(transform(images), rotate(images, angles))  # it goes on

    def test_draws_of_one_sample_come_together(self):
        images = torch.randn(5, 1, 6, 6, dtype=torch.float64)
        both = Compose(RandomRotation(0.4, g := Generator(4)), GaussianNoise(0.3, g))
        generator = Generator(4)
        expected = []
        for image in images.split(1):
            turned = rotate(image, generator.normal(0, 0.4))
            expected.append(turned + generator.normal(0, 0.3, image.shape))
        assert torch.equal(both(images), torch.cat(expected))
        assert state(g) == state(generator)

    def test_whether_a_batch_can_be_given(self):
        several, function = False, False
        expected = [True] * 4 + [several, function, True, True]
        assert [transform.batched for transform, _ in pipelines()] == expected

    def test_nothing_happens_without_strength(self):
        images = torch.randn(3, 1, 8, 8)
        assert torch.equal(RandomRotation(0, Generator())(images), images)
        assert torch.equal(GaussianNoise(0.0, Generator())(images), images)

    def test_affine_is_what_its_numbers_say(self):
        images = torch.randn(6, 1, 9, 12, dtype=torch.float64)
        transform = RandomAffine(Generator(3), 0.3, 0.1, 0.2, 1.5, fill=-2.0)
        generator, matrices = Generator(3), []
        for _ in range(6):
            z = generator.normal(size=5).numpy()
            turn = 0.3 * z[0]
            matrix = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
            matrix = matrix @ np.array([[1, 0.2 * z[2]], [0, 1]]) / math.exp(0.1 * z[1])
            matrices.append(np.column_stack([matrix, 1.5 * z[3:]]))
        expected = affine(images, torch.from_numpy(np.stack(matrices)), fill=-2.0)
        torch.testing.assert_close(transform(images), expected, rtol=1e-12, atol=1e-12)
        assert state(transform.generator) == state(generator)
        torch.testing.assert_close(RandomAffine(Generator())(images), images, rtol=0, atol=1e-12)
        for name in ("rotation", "scale", "shear", "shift"):
            with pytest.raises(ValueError, match=f"RandomAffine: {name} must be >= 0 and finite"):
                RandomAffine(Generator(), **{name: -1.0})
        words = "RandomAffine(rotation=0.3, scale=0.1, shear=0.2, shift=1.5, fill=-2.0)"
        assert str(transform) == words

    def test_noise_has_its_strength(self):
        noise = GaussianNoise(0.5, Generator(2))(torch.full((40, 1, 32, 32), 2.0)) - 2.0
        assert abs(float(noise.std()) - 0.5) < 0.01 and abs(float(noise.mean())) < 0.01

    @pytest.mark.parametrize("transform", [RandomRotation, GaussianNoise])
    def test_arguments(self, transform):
        name = transform.__name__
        for std in (-0.1, math.inf, math.nan):
            with pytest.raises(ValueError, match=f"{name}: std must be >= 0 and finite, got {std}"):
                transform(std, Generator())
        with pytest.raises(TypeError, match=f"{name}: std must be a number, got str"):
            transform("1", Generator())
        with pytest.raises(TypeError, match=f"{name}: generator must be a torch7.Generator, got"):
            transform(0.1, torch.Generator())
        with pytest.raises(ValueError, match=rf"{name}: images must be \(N, C, H, W\), got"):
            transform(0.1, Generator())(torch.ones(4, 4))
        with pytest.raises(ValueError, match="interpolation must be 'nearest' or 'bilinear', got"):
            RandomRotation(0.1, Generator(), "linear")
        with pytest.raises(TypeError, match="Compose: transform 1 must be callable, got 3"):
            Compose(transform(0.1, Generator()), 3)

    def test_what_they_print(self):
        both = Compose(RandomRotation(0.2, g := Generator()), GaussianNoise(0.1, g))
        text = str(both)
        assert "RandomRotation(std=0.2, interpolation='nearest')" in text
        assert "GaussianNoise(std=0.1)" in text


def training_run(transform, engine=None, chunk=None):
    """A small network with ``transform`` after its generator; what training gives."""
    generator = torch7.start(1, data_kernel_size=None)
    model = models.convnet((4, 6), image_size=16, dtype=torch.float64, generator=generator)
    sgd = optim.SGD(model.parameters(), lr=0.05)
    random = np.random.default_rng(0)
    images = torch.from_numpy(random.standard_normal((40, 1, 16, 16))).float()
    labels = torch.from_numpy(random.integers(0, 10, 40))
    samples, turn = (images, labels), transform(generator)
    if engine is not None:
        engine = engine(model, sgd, transform=turn)
    history = training.fit(
        model,
        samples,
        samples,
        epochs=2,
        optimizer=sgd,
        generator=generator,
        transform=turn,
        engine=engine,
        chunk=chunk,
        verbose=False,
    )
    return [result.train_loss for result in history], torch.cat(
        [parameter.detach().reshape(-1) for parameter in model.parameters()]
    )


@pytest.mark.usefixtures("one_thread")
class TestTraining:
    @staticmethod
    def both(generator):
        return Compose(RandomRotation(0.2, generator), GaussianNoise(0.1, generator))

    def test_the_engine_gives_the_same_bits_in_chunks(self):
        """A whole chunk at once, one image at a time as before, and PyTorch's autograd."""

        class OneByOne:
            def __init__(self, transform):
                self.transform = transform

            def __call__(self, images):
                assert len(images) == 1
                return self.transform(images)

        calls = []

        def counted(generator):
            transform = self.both(generator)
            transform.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
            return transform

        losses, weights = training_run(counted, chunk=16)
        assert calls == [16, 16, 8] * 2
        for transform, options in (
            (self.both, {}),
            (self.both, {"chunk": 1}),
            (lambda generator: OneByOne(self.both(generator)), {}),
        ):
            again = training_run(transform, **options)
            assert again[0] == losses and torch.equal(again[1], weights)
        autograd = training_run(self.both, engine=training.AutogradEngine)
        torch.testing.assert_close(autograd[1], weights, rtol=0, atol=1e-11)
        without = training_run(lambda generator: None)
        assert not torch.allclose(without[1], weights, atol=1e-4)

    def test_fit_takes_the_compiled_engine(self):
        generator = torch7.start(1)
        model = models.convnet(dtype=torch.float64, generator=generator)
        sgd = optim.SGD(model.parameters())
        engine = training.choose_engine(model, sgd, transform=RandomRotation(0.2, generator))
        assert isinstance(engine, OptimizerEngine)


def test_background_of_rotated_digits():
    """Report 2's picture: what comes in from outside is 0, brighter than the background."""
    images, _ = data.load("train")
    mean, std = data.global_statistics(images)
    digits = data.global_norm(data.pad32(images[:5]), mean, std)
    turned = rotate(digits, torch.full((5,), 0.5))
    corner = turned[:, 0, 0, 0]
    assert (corner == 0).all() and abs(float(digits.min()) + 0.3635) < 1e-4
