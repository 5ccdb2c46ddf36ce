"""Training, from scratch or from a checkpoint. Read train.py and loop.py first, then loss.py."""
