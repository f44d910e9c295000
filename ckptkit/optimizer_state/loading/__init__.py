"""The steps of ``load_optimizer_state``."""
