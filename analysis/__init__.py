import os

# A notebook sets a backend of its own for the programs that it starts, and they cannot load it.
os.environ["MPLBACKEND"] = "agg"
