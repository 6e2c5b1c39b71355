"""Distils a recycle head from a model; see `train_recycle`."""

from teco_kernels.training.acceptance import Acceptance, acceptance
from teco_kernels.training.distil import train_recycle
from teco_kernels.training.head import RecycleHead, load_head
from teco_kernels.training.trainer import TrainingSettings

__all__ = ["Acceptance", "RecycleHead", "TrainingSettings", "acceptance", "load_head", "train_recycle"]
