"""The check of lmu-dist on one GPU: check.sh runs it, README.md explains it."""
