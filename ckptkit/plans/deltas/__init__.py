"""What a plan does with a patch: each tensor of the result, compared with its digest while it is written."""
