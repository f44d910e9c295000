"""Streaming writers: the output appears whole or not at all."""
