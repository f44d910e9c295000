"""The basic types of the whole package: checkpoints, tensors, files, patterns, texts and findings."""
