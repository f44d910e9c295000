"""The files of an output: what is refused, how they are written, and what the result says."""
