"""Training: one specification, one loop, resumable to the bit.

All randomness is keyed by (seed, epoch) or (seed, epoch, step), none is carried along: a run killed at any moment and
started again with the same command ends with the weights of the uninterrupted run (same version, CPU and threads; the
sums of a GPU differ from run to run).
"""

from sparsetrail.training.kept import read_events as read_events
from sparsetrail.training.run import first_nonfinite as first_nonfinite
from sparsetrail.training.run import train as train
from sparsetrail.training.spec import Seams as Seams
from sparsetrail.training.spec import TrainingFailed as TrainingFailed
from sparsetrail.training.spec import TrainingStopped as TrainingStopped
from sparsetrail.training.spec import TrainSpec as TrainSpec
from sparsetrail.training.step import Optimizer as Optimizer
from sparsetrail.training.step import Step as Step
from sparsetrail.training.step import accuracy as accuracy
from sparsetrail.training.step import scores as scores
