"""Callbacks that check param groups in other training loops, one module for each library."""
