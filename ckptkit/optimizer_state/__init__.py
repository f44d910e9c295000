"""The state of an optimizer by the names of its parameters: read in each of torch's forms, edited as weights are.

Everything here takes values and gives values; ``open_optimizer`` opens a file for it.
"""
