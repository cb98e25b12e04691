"""Data: a corpus becomes a stream of tokens on disk, and the stream becomes batches. Called by launch and the command line."""
