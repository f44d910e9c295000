"""Quantised weights as numbers: a decoder for each scheme, and the payload that decodes while it is read."""
