"""What train.py stands on: its flags, its checkpoints, its messages, and the learning-rate range test."""
