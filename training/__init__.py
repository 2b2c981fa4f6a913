"""Modules of train.py: flags, set-up, checkpoints, exit messages, and the learning-rate range test."""
