"""WHERE an entry lives: which tier holds it, what makes room, what is brought ahead of time. Keys and bytes only."""
