"""Code that runs in exported folders, where `exporting/flat_modules` copies it. Nothing of this package imports it."""
