"""Layers that blocks are built from: attention, the LSTM and the LMU, which mix tokens, and the feed-forward layer."""
