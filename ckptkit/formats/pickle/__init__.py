"""Read, edit and write pickles without running code from them."""
