"""What decoders need and the headers of parts do not say: a module for each family, with a function for each form."""
