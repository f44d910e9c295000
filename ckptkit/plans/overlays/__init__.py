"""What donors give to the keys of a base, and the errors where that is not clear."""
