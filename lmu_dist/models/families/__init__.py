"""The built-in families, one file each. models/registry finds every file of this folder."""
