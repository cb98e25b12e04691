"""What a block mixes its tokens with: attention, the LSTM, the LMU, and the feed-forward layer between them."""
