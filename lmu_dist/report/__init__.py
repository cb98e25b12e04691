"""What people are shown of a study: figures, one page, files. No torch, no Ray; numbers come from scaling/."""
