"""Programs beside train.py, each started as python -m tools.<name> from the folder of the project."""
