"""Plans: what an output will hold, decided before a byte is read, and carried out."""
