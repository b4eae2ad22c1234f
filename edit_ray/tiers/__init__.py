"""Tiers of memory for what a run's segments reuse of each other: planned ahead, shared between two processes."""
