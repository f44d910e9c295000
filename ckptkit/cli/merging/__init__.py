"""The forms of ``ckpt merge``: which options belong to which, and the plan of each."""
