"""Columns of the CSV files of a run, hparams that may change when a run is resumed, and names of earlier versions.

It imports the standard library only.
"""

from math import log

# Tables to which rows are appended at the end of an epoch. epochs.csv is written last.
COLUMNS = {
    "nc1.csv": "epoch,set,layer,dim,rank,nc1,kept,dropped",
    "dib.csv": "epoch,set,split,enumeration,labeling,entropy,loss,lower,upper",
    "epochs.csv": "epoch,set,loss,accuracy,seconds",
}
# The table of a learning-rate range test. `chosen` is 1 in the row of the selected learning rate, else 0.
LR_RANGE = "step,learning_rate,loss,smoothed,chosen"
# The table of `make convergence`: the probes of one epoch. `factor` multiplies the number of their steps.
CONVERGENCE = "factor,steps," + COLUMNS["dib.csv"]
# The table of linear probes on Gaussian features, which is written once.
NOISE = COLUMNS["dib.csv"].removeprefix("epoch,")

# Values of the column `labeling` besides the digits 0, 1, ... of the enumerations.
LABELS, SHUFFLED, HELD_OUT = "y", "shuffled", "held-out"

# A probe is known suboptimal if loss - upper > SUBOPTIMAL. In nats; it is 0.001 bits.
SUBOPTIMAL = 1e-3 * log(2)
# The optimum of a linear probe is proved if loss - lower <= PROVED. In nats.
PROVED = 1e-5

# Hparams that may change when a run is resumed.
MAY_CHANGE = ("epochs", "resume", "run_dir", "data_dir", "download", "device", "torch", "torchvision", "processes")
# Flags whose default depends on the device. Hparam `chosen` lists those not given. A resumed run sets them anew.
DEVICE_DEFAULTS = ("compile", "device", "precision")

# Names before version 0.1.0, mapped to the present names. CSV files of that time can be read. Flags and make targets of
# that time are errors with the new name.
RENAMED_FLAGS = {"--heads": "--probes", "--labelings": "--enumerations"}
RENAMED_TARGETS = {"settle": "convergence"}
RENAMED_FILES = {"settle.csv": "convergence.csv"}
RENAMED_COLUMNS = {"bound": "upper", "permutation": "enumeration"}
RENAMED_HPARAMS = {"heads": "probes", "labelings": "enumerations"}
