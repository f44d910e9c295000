"""Code that several commands share: their options, how they open and read files, and how they print and write."""
