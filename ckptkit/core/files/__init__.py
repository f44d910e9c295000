"""Files and folders of this machine and of stores, and byte ranges in them."""
