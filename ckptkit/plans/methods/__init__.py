"""The methods of merging: one file and one row of the table a method."""
