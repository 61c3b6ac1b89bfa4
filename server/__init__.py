"""The Flower ServerApp: rounds, checkpoints and releases."""
