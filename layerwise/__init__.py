"""Modules that nc1, dib and the training of networks share. Importing this package does not import torch."""
