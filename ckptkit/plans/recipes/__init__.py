"""Recipes of merges: parsed, written, and planned."""
