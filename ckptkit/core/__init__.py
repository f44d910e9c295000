"""What everything else is written in: names, tensors, files, findings."""
