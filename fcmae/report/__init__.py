"""The report of a run, one HTML file: what its folder has, judged in words, drawn and laid out; runs no model."""
