import os

# A notebook exports MPLBACKEND to its subprocesses, which cannot load that backend. Figures are written with agg.
os.environ["MPLBACKEND"] = "agg"
