"""Callbacks for trainers: ``l0hooks.integrations.transformers`` and ``l0hooks.integrations.lightning``."""
