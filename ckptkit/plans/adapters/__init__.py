"""Plans with an adapter: folded into a base, or extracted from a tuned model."""
