"""Train the original network of report 1 on MNIST, one digit at a time.

    python examples/train_mnist.py                          # one epoch, as in 2016
    python examples/train_mnist.py --epochs 10 --resume     # go on to epoch 10
    python examples/train_mnist.py --limit 2000             # a quick look

Expected of the default run on the CPU: training 96.71 %, test 99.04 %, as in Table 3.1.
"""

import sys

try:
    from mnist_ops.lab.train_command import main
except ImportError as error:  # the extra is not installed, or no library compiled
    sys.exit(f"error: {error}")

if __name__ == "__main__":
    sys.exit(main())
