"""Results as text and as JSON documents: no decision is made here, and nothing is printed."""
