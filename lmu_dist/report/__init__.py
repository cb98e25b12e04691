"""The report of a study: figures, an HTML page, and files. The numbers come from scaling/. Uses neither torch nor Ray."""
