"""Distils a recycle head from a model, or trains a small model together with its head; see `train_recycle` and
`train_joint`.
"""

from teco_kernels.training.acceptance import Acceptance, acceptance
from teco_kernels.training.distil import train_recycle
from teco_kernels.training.head import RecycleHead, load_head
from teco_kernels.training.joint import JointSettings
from teco_kernels.training.pretrain import train_joint
from teco_kernels.training.trainer import TrainingSettings

__all__ = [
    "Acceptance",
    "JointSettings",
    "RecycleHead",
    "TrainingSettings",
    "acceptance",
    "load_head",
    "train_joint",
    "train_recycle",
]
