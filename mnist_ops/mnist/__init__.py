"""The MNIST digits, which are shipped with the package, and the reports' networks on them.

:mod:`~mnist_ops.mnist.data` reads and prepares the digits, :mod:`~mnist_ops.mnist.transforms`
changes them while training, :mod:`~mnist_ops.mnist.models` builds the networks.
"""

from .._extra import need

need(__name__, "numpy")
