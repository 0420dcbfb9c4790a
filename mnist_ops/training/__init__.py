"""The training loop: online SGD, accuracies counted as in the reports, checkpoints, resuming.

::

    >>> from mnist_ops.mnist import data, models
    >>> from mnist_ops.torch7 import optim
    >>> from mnist_ops import torch7, training
    >>> digits = data.prepare()
    >>> generator = torch7.start(seed=1)
    >>> model = models.convnet(dtype=torch.float64, generator=generator)
    >>> sgd = optim.SGD(model.parameters(), lr=1e-3, lr_decay=1e-7)
    >>> history = training.fit(
    ...     model,
    ...     (digits.train_images, digits.train_labels),
    ...     (digits.test_images, digits.test_labels),
    ...     epochs=1, optimizer=sgd, generator=generator, folder="runs/original",
    ... )

After every epoch ``folder`` holds ``checkpoint.pt``, from which ``resume=True`` continues to
bit-identical results, and ``log.csv``. Optimizers may take turns: ``optimizer={1: sgd, 6: lbfgs}``
trains epochs 1 to 5 with one and goes on with the other.
"""

from .._extra import need

need(__name__, "filelock", "tqdm")

from ._files import (  # noqa: E402
    DamagedFileError,
    FolderInUseError,
    locked,
    read_torch,
    write_atomically,
    write_text,
    write_torch,
)
from .averaging import AveragedSGD  # noqa: E402
from .checkpoint import (  # noqa: E402
    BACKUP_CHECKPOINT,
    CHECKPOINT,
    LOG,
    PREVIOUS_CHECKPOINT,
    CheckpointError,
    load_checkpoint,
    load_latest,
)
from .engine import AutogradEngine, Criterion, Engine, OptimizerEngine, choose_engine  # noqa: E402
from .loop import Loop, alone, evaluate, fit, fitting, repeatable, side_by_side  # noqa: E402
from .metrics import ConfusionMatrix, EpochResult, predicted_classes  # noqa: E402

__all__ = [
    "BACKUP_CHECKPOINT",
    "CHECKPOINT",
    "LOG",
    "PREVIOUS_CHECKPOINT",
    "AutogradEngine",
    "AveragedSGD",
    "CheckpointError",
    "ConfusionMatrix",
    "Criterion",
    "DamagedFileError",
    "Engine",
    "EpochResult",
    "FolderInUseError",
    "Loop",
    "OptimizerEngine",
    "alone",
    "choose_engine",
    "evaluate",
    "fit",
    "fitting",
    "load_checkpoint",
    "load_latest",
    "locked",
    "predicted_classes",
    "read_torch",
    "repeatable",
    "side_by_side",
    "write_atomically",
    "write_text",
    "write_torch",
]
