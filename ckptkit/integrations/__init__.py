"""The gate in other people's training loops: a room for each, and only importing that room imports its library."""
