"""The tables of a run's folder: their columns, what identifies a row, and the names that earlier versions used.

The programs that write the tables and those that read them import this module. It needs nothing but Python.
"""

from math import log

# The tables that get rows in every epoch. epochs.csv is written last.
COLUMNS = {
    "nc1.csv": "epoch,set,layer,dim,rank,nc1,kept,dropped",
    "dib.csv": "epoch,set,split,permutation,labeling,entropy,loss,upper",
    "epochs.csv": "epoch,set,loss,accuracy,seconds",
}
# The table of a learning-rate range test. `chosen` is 1 in the row of the rate that the run then used.
LR_RANGE = "step,learning_rate,loss,smoothed,chosen"
# The table of `make convergence`: the probes of the last epoch, trained for more steps.
CONVERGENCE = "factor,steps,set,split,permutation,labeling,entropy,loss,upper"

# A probe is known suboptimal if its loss is more than this above `upper`, in nats: a thousandth of a bit.
SUBOPTIMAL = 1e-3 * log(2)

# Flags that say how far, where and with what a run is made. A resumed run may change them.
ELSEWHERE = ("epochs", "resume", "run_dir", "data_dir", "download", "device", "torch", "torchvision", "processes")
# Flags that may be chosen again when a run is resumed, because the device decides them.
MAY_DIFFER = (*ELSEWHERE, "chosen", "compile", "precision")

# What the first version called things. Its tables are still read; its flags and targets are refused by name.
RENAMED_FLAGS = {"--heads": "--probes"}
RENAMED_TARGETS = {"settle": "convergence"}
RENAMED_FILES = {"settle.csv": "convergence.csv"}
RENAMED_COLUMNS = {"bound": "upper"}
RENAMED_HPARAMS = {"heads": "probes"}
