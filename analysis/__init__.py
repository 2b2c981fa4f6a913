import os

os.environ["MPLBACKEND"] = "agg"  # a notebook hands on its own to what it starts, which is not to be had there
