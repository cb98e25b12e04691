"""The built-in families, one file each. A new file here is a new family: models/registry finds it."""
