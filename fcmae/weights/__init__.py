"""Weights in and out: one file for each format, which others reach through `read` and `export` alone."""
