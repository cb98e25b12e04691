"""Data: tokenizes a corpus to a token stream on disk, and reads batches from it. Called by launch and the command line."""
