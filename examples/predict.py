"""The assignment's result script: what a saved network sees in images, as `Id,Prediction` lines.

    python examples/predict.py --model runs/train_mnist/checkpoint.pt --split test
    python examples/predict.py --model model.net --normalization none --images digits.npy

The model is checkpoint.pt or model.pt in a run's folder, or a network that Torch7 saved, which does
not record how its images were normalised. Predictions are class numbers, digit + 1, as in 2016, or
with `--labels digits` the digits themselves. Where the labels are known (`--split`) the accuracy is
printed, too.
"""

import sys

try:
    from mnist_ops.lab.predict_command import main
except ImportError as error:  # the extra is not installed, or no library compiled
    sys.exit(f"error: {error}")

if __name__ == "__main__":
    sys.exit(main())
