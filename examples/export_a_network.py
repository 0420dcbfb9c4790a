"""A network of your own, compiled, exported and run elsewhere: the same numbers everywhere.

    python examples/export_a_network.py

It needs a C++ compiler for torch.compile, and for the last line onnx, onnxscript and onnxruntime.
Expected, with differences that are rounding:

    torch.compile:  largest difference 2.4e-07
    torch.export:   largest difference 0.0e+00
    onnxruntime:    largest difference 4.8e-07
"""

import importlib.util
import tempfile
from pathlib import Path

import torch
from torch import nn

import mnist_ops


def network() -> nn.Module:
    """Images (N, 3, 32, 32) to the logarithms of ten probabilities."""
    return nn.Sequential(
        mnist_ops.nn.ContrastiveNorm2d(mnist_ops.gaussian1d(9), threshold=0.1),
        nn.Conv2d(3, 16, 5),
        nn.Tanh(),
        mnist_ops.nn.LPPool2d(2, 2),
        mnist_ops.nn.SubtractiveNorm2d(mnist_ops.gaussian1d(5)),
        mnist_ops.nn.GeM2d(3.0),
        nn.Flatten(),
        nn.Linear(16, 10),
        mnist_ops.nn.LogSoftmax(),
    ).eval()


def main() -> None:
    """Run the network in each way and compare."""
    torch.manual_seed(0)
    model, images = network(), torch.rand(5, 3, 32, 32)
    expected = model(images).detach()

    def report(where: str, result: torch.Tensor) -> None:
        difference = (result - expected).abs().max().item()
        print(f"{where + ':':15} largest difference {difference:.1e}")

    with torch.no_grad():
        report("torch.compile", torch.compile(model, fullgraph=True)(images))

    batch = {0: torch.export.Dim("batch")}
    example = (torch.zeros(2, 3, 32, 32),)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "network.pt2")
        program = torch.export.export(model, example, dynamic_shapes=(batch,))
        torch.export.save(program, file)
        with torch.no_grad():
            report("torch.export", torch.export.load(file).module()(images))

        missing = [m for m in ("onnxscript", "onnxruntime") if importlib.util.find_spec(m) is None]
        if missing:
            print(f"onnxruntime:    not run, there is no {' or '.join(missing)}")
            return
        import onnxruntime

        file = Path(folder, "network.onnx")
        torch.onnx.export(
            model,
            example,
            file,
            dynamo=True,
            verbose=False,
            dynamic_shapes=(batch,),
            custom_translation_table=mnist_ops.onnx.translations(),
        )
        session = onnxruntime.InferenceSession(file)
        (result,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        report("onnxruntime", torch.from_numpy(result))


if __name__ == "__main__":
    main()
